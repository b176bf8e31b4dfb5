"""A search for several budgets: shared work is done once, and each budget with its own student has its own run."""
