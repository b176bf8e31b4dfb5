"""The optimiser: AdamW, with moments of 32, 16 or 8 bits."""
