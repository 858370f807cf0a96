"""Errors and times of `pallas_gpu` on a Hopper GPU: `sleep_jax.kernels.measure.gpu_check`."""

import sys

from sleep_jax.kernels.measure.gpu_check import main

if __name__ == "__main__":
  sys.exit(main())
