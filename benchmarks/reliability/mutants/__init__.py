"""Random wrong changes of the core's lines, and how many of them the tests find."""
