"""How a student begins: its shape, and its weights before training."""
