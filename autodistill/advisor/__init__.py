"""Answers without a search: what a model would take, which student to pick, what was measured where."""
