"""The end of a search: the best student exported, verified, and scored on the test split."""
