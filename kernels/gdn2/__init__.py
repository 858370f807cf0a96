"""Gated DeltaNet-2: `gdn2(q, k, v, g, e, w, S)`, and `gdn2_step` for one token."""

from sleep_jax.kernels.gdn2.api import gdn2, gdn2_step

__all__ = ["gdn2", "gdn2_step"]
