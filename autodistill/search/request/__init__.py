"""What a person asked for, checked before any work is spent."""
