"""The initial student: its shape, and its weights before training."""
