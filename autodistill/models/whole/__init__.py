"""Descriptions of models whose layers differ in kind, from their configs: such models are trained whole, never cut."""
