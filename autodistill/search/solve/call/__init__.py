"""One call of solve: what is asked for, what is loaded for it, what is said of it, and what is written."""
