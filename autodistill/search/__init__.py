"""Proposing, scheduling and running trials under a budget and a time box."""
