"""Shapes, peers and charts of the benchmarks."""

import sleep_jax

sleep_jax.require("figures", "matplotlib")
