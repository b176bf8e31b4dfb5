"""A search in progress: the state of its trials, and what to do next."""
