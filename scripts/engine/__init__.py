"""What the benchmarks with random weights share."""
