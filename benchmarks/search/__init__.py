"""What a search finds, for how much, beside other ways to look."""
