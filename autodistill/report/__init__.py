"""Charts of runs, for notebooks and pages."""
