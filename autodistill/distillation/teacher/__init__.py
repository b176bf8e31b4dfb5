"""The teacher: found, checked, run once, and its outputs kept."""
