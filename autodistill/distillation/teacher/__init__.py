"""The teacher: found, checked, run once, and its outputs cached."""
