"""How a student may begin and be stored under a budget: by plain rules, or solved, as choices of a space."""
