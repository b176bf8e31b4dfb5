"""Predictions and measurements of memory and speed."""
