"""The gated Hebbian rule: `gated_hebbian(q, k, v, g, b, S)`, and `gated_hebbian_step` for one token."""

from sleep_jax.kernels.gated_hebbian.api import gated_hebbian, gated_hebbian_step

__all__ = ["gated_hebbian", "gated_hebbian_step"]
