"""Memory and speed, predicted and measured."""
