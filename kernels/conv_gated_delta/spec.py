"""What the gated delta rule behind its convolution and gates takes. It has no form for one token."""

from sleep_jax.kernels.common.op import Derived, Op

CLOSED = (
  -1e30
)  # what the input of a gate is at a pad: softplus and sigmoid of it are 0, and so are their slopes

SPEC = Op(
  "conv_gated_delta",
  operands={
    "x": "BTHX",
    "taps": "cHX",
    "context": ("B", "c-1", "H", "X"),
    "a": "BTH",
    "b": "BTH",
    "A_log": "H",
    "dt_bias": "H",
  },
  derived={
    "X": Derived("K + K + V", lambda sizes: 2 * sizes["K"] + sizes["V"]),
    "c-1": Derived("taps - 1", lambda sizes: sizes["c"] - 1),
  },
  float32=("taps", "a", "b", "A_log", "dt_bias"),
  same_dtype={"context": "x"},
  at_pads={"a": CLOSED, "b": CLOSED},
  before={"x": "context"},
  implementations={
    "xla": "sleep_jax.kernels.conv_gated_delta.xla:conv_gated_delta",
    "reference": "sleep_jax.kernels.conv_gated_delta.reference:conv_gated_delta",
    "pallas_tpu_fused": "sleep_jax.kernels.conv_gated_delta.pallas_tpu_fused:conv_gated_delta",
  },
)
