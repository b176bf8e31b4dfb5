"""What happens when things go wrong, and how well the tests and the figures hold."""
