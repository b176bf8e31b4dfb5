"""One exporter a file, and the proof that what was written is what was evaluated."""
