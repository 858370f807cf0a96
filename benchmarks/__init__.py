"""Measurements of the whole model: training speed, what sleep costs, and memory. See benchmarks/README.md."""

import os

# No banners about slow compilation; see experiments/__init__.py.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
