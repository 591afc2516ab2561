"""Holds the parts that benchmarks with random weights share."""
