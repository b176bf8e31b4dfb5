"""Answers without a search: the memory and speed of a model, which student to pick, and measurements."""
