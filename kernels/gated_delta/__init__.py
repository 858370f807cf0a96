"""The gated delta rule: `gated_delta(q, k, v, g, b, S)`."""

from kernels.gated_delta.api import gated_delta

__all__ = ["gated_delta"]
