"""Where the time of a training step, or of serving, goes: a trace, its parts compared with a floor, and advice."""
