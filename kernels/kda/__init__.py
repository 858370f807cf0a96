"""Kimi Delta Attention: `kda(q, k, v, g, b, S)`, and `kda_step` for one token."""

from sleep_jax.kernels.kda.api import kda, kda_step

__all__ = ["kda", "kda_step"]
