"""Where the time of a training step, or of serving, goes: a trace, its parts against a floor, and what to do."""
