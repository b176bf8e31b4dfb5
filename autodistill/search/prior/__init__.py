"""Knowledge before a search: the recipe that it begins with, and the test of its learning rate."""
