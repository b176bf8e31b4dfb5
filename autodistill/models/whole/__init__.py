"""Descriptions, from their configs, of models that are trained whole: with layers of several kinds, or with experts."""
