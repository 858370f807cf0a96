"""What Kimi Delta Attention takes, and its form for one token."""

import jax

from sleep_jax.kernels.common import decode
from sleep_jax.kernels.common.op import Op


def step(
  q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, b: jax.Array, S: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Arguments as in `api.kda_step`."""
  b = b[..., None]
  return decode.delta_rule(q, k, v, S, log_decay=g, erase=b, write=b)


SPEC = Op(
  "kda",
  operands={"q": "BTHK", "k": "BTHK", "v": "BTHV", "g": "BTHK", "b": "BTH"},
  float32=("g", "b"),
  log_decay="g",
  implementations={
    "xla": "sleep_jax.kernels.kda.xla:kda",
    "reference": "sleep_jax.kernels.kda.reference:kda",
  },
  step=step,
)
