"""Exporters to files for the runtimes of phones."""
