"""Measurements of the whole model: training speed, what sleep costs, and memory. See benchmarks/README.md."""
