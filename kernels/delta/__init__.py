"""The delta rule: `delta(q, k, v, b, S)`."""

from kernels.delta.api import delta

__all__ = ["delta"]
