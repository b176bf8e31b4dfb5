"""Evaluators, one measurement a file; each is found by its entry point."""
