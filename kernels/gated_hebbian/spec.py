"""What the gated Hebbian rule takes, and its form for one token."""

import jax
import jax.numpy as jnp
from jax.lax import Precision

from sleep_jax.kernels.common.op import Op


def step(
  q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, b: jax.Array, S: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Arguments as in `api.gated_hebbian_step`.

  o is read from the new S. A delta rule's error needs the old S first; here nothing does, and XLA could write
  the new S before it reads the old one, of which it would then make a copy.
  """
  dtype = v.dtype
  q, k, v, g, b = (x.astype(S.dtype) for x in (q, k, v, g, b))
  S = jnp.exp(g)[..., None, None] * S + k[..., :, None] * (b[..., None] * v)[..., None, :]
  return jnp.einsum("bhk,bhkv->bhv", q, S, precision=Precision.HIGHEST).astype(dtype), S


SPEC = Op(
  "gated_hebbian",
  operands={"q": "BTHK", "k": "BTHK", "v": "BTHV", "g": "BTH", "b": "BTH"},
  float32=("g", "b"),
  log_decay="g",
  implementations={
    "xla": "sleep_jax.kernels.gated_hebbian.xla:gated_hebbian",
    "reference": "sleep_jax.kernels.gated_hebbian.reference:gated_hebbian",
  },
  step=step,
)
