"""Code that the benchmarks share, and programs whose results several benchmarks read."""
