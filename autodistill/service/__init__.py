"""A student as a service: what is served and how, its server process, its clients, and whether it keeps its promise."""
