"""What the delta rule takes, and its form for one token."""

import jax

from sleep_jax.kernels.common import decode
from sleep_jax.kernels.common.op import Op


def step(q: jax.Array, k: jax.Array, v: jax.Array, b: jax.Array, S: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Arguments as in `api.delta_step`."""
  b = b[..., None]
  return decode.delta_rule(q, k, v, S, log_decay=None, erase=b, write=b)


SPEC = Op(
  "delta",
  operands={"q": "BTHK", "k": "BTHK", "v": "BTHV", "b": "BTH"},
  float32=("b",),
  implementations={
    "xla": "sleep_jax.kernels.delta.xla:delta",
    "reference": "sleep_jax.kernels.delta.reference:delta",
  },
  step=step,
)
