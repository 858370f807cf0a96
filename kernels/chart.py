"""Draws a table of `kernels.bench`: `sleep_jax.kernels.measure.chart`."""

from sleep_jax.kernels.measure.chart import main

if __name__ == "__main__":
  main()
