"""Text, conversations and tasks become tokens, sequences and splits."""
