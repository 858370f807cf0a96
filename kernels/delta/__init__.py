"""The delta rule: `delta(q, k, v, b, S)`, and `delta_step` for one token."""

from sleep_jax.kernels.delta.api import delta, delta_step

__all__ = ["delta", "delta_step"]
