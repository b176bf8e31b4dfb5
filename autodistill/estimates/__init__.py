"""Memory and speed, predicted from a model's description; nothing is loaded."""
