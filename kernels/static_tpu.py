"""Prices the TPU kernels without a TPU: `sleep_jax.kernels.measure.static_tpu`."""

import sys

from sleep_jax.kernels.measure.static_tpu import main

if __name__ == "__main__":
  sys.exit(main())
