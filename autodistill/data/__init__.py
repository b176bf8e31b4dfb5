"""From text, conversations and tasks to tokens, sequences and splits."""
