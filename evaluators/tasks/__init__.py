"""Evaluators of tasks: questions of task files, lm-eval, and a person's own command."""
