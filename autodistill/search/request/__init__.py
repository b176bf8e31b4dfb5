"""The user's request, resolved and checked before any work is spent."""
