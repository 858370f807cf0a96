"""The gated delta rule: `gated_delta(q, k, v, g, b, S)`, and `gated_delta_step` for one token."""

from sleep_jax.kernels.gated_delta.api import gated_delta, gated_delta_step

__all__ = ["gated_delta", "gated_delta_step"]
