"""Registers, spills and memory of the GPU programs without a GPU: `sleep_jax.kernels.measure.static_gpu`."""

import sys

from sleep_jax.kernels.measure.static_gpu import main

if __name__ == "__main__":
  sys.exit(main())
