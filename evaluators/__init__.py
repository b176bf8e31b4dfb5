"""Evaluators, one measurement per file. Each is found by its entry point."""
