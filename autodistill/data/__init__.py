"""Preparation of data: from text, conversations and tasks to tokens, sequences and splits."""
