"""Exporters to files that runtimes of phones run."""
