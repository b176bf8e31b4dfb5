"""The end of a search: exports the best student, verifies it and scores it on the test split."""
