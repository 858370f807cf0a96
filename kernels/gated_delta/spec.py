"""What the gated delta rule takes, and its form for one token."""

import jax

from sleep_jax.kernels.common import decode
from sleep_jax.kernels.common.op import Op


def step(
  q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, b: jax.Array, S: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Arguments as in `api.gated_delta_step`."""
  b = b[..., None]
  return decode.delta_rule(q, k, v, S, log_decay=g[..., None], erase=b, write=b)


SPEC = Op(
  "gated_delta",
  operands={"q": "BTHK", "k": "BTHK", "v": "BTHV", "g": "BTH", "b": "BTH"},
  float32=("g", "b"),
  log_decay="g",
  implementations={
    "xla": "sleep_jax.kernels.gated_delta.xla:gated_delta",
    "reference": "sleep_jax.kernels.gated_delta.reference:gated_delta",
    "pallas_tpu": "sleep_jax.kernels.gated_delta.pallas_tpu:gated_delta",
    "pallas_gpu": "sleep_jax.kernels.gated_delta.pallas_gpu:gated_delta",
  },
  step=step,
)
