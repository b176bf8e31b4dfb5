"""What a search finds and at what cost, compared with other ways to search."""
