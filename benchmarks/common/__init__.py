"""What the benchmarks share, and the programs that make what several of them read."""
