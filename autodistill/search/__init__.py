"""Proposing, scheduling, running and finishing trials under a budget and a time budget."""
