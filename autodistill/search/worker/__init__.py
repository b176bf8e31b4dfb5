"""What one worker does for one trial, and what it reports."""
