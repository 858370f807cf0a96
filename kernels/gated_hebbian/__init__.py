"""The gated Hebbian rule: `gated_hebbian(q, k, v, g, b, S)`."""

from kernels.gated_hebbian.api import gated_hebbian

__all__ = ["gated_hebbian"]
