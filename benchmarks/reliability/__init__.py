"""What holds when things go wrong, and what holds the figures and the tests."""
