"""Exporters, one per file, and the proof that the exported file contains the evaluated weights."""
