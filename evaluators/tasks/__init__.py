"""Evaluators of tasks: questions of task files, lm-eval, and the user's own command."""
