"""A test of learning rates in a few steps, compared with the ends of longer trainings."""
