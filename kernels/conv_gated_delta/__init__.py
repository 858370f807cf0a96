"""The gated delta rule behind its layer's short convolution, norms and gates: `conv_gated_delta`."""

from sleep_jax.kernels.conv_gated_delta.api import conv_gated_delta

__all__ = ["conv_gated_delta"]
