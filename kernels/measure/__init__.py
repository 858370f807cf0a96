"""Shapes, peers and charts of the benchmarks."""
