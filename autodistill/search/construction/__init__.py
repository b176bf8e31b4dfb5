"""The ways to begin and store a student under a budget, by plain rules or solved, as choices of a space."""
