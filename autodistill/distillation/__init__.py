"""The engine: the teacher's outputs, the losses, the student, and its training."""
