"""The rows of a run: how they are made, ranked, compared and chosen."""
