"""What Gated DeltaNet-2 takes, and its form for one token."""

import jax

from sleep_jax.kernels.common import decode
from sleep_jax.kernels.common.op import Op


def step(
  q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, e: jax.Array, w: jax.Array, S: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Arguments as in `api.gdn2_step`."""
  return decode.delta_rule(q, k, v, S, log_decay=g, erase=e, write=w)


SPEC = Op(
  "gdn2",
  operands={"q": "BTHK", "k": "BTHK", "v": "BTHV", "g": "BTHK", "e": "BTHK", "w": "BTHV"},
  float32=("g", "e", "w"),
  log_decay="g",
  implementations={
    "xla": "sleep_jax.kernels.gdn2.xla:gdn2",
    "reference": "sleep_jax.kernels.gdn2.reference:gdn2",
  },
  step=step,
)
