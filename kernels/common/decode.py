"""One token of any rule, for awake decoding: S is updated where it lies."""

import jax
import jax.numpy as jnp
from jax.lax import Precision


def update(rule: str, token: dict[str, jax.Array], S: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The recurrence once. S is read once for both answers of a delta rule and written into its own memory.

  `kernels.dispatch.step` donates S; inside a larger jitted program the donation is that program's to make:
  `jax.jit(..., donate_argnames="S")`.

  Args:
    rule: a name in `kernels.dispatch.OPERANDS`.
    token: the rule's arguments without their axis T: q, k [B, H, K], v [B, H, V] and its gates.
    S: [B, H, K, V] fast weights.

  Returns:
    o [B, H, V] in v's dtype, and S.
  """
  dtype = token["v"].dtype
  x = {name: value.astype(S.dtype) for name, value in token.items()}
  q, k, v = x["q"], x["k"], x["v"]
  decay = jnp.exp(x.get("g", jnp.zeros_like(q[..., :1])))
  decay = decay if decay.ndim == 3 else decay[..., None]
  if rule == "gated_hebbian":
    # Read from the new S: without an error that depends on it, XLA may write the new S before the old one is
    # read, and copy the old one to do so.
    S = decay[..., None] * S + k[..., :, None] * (x["b"][..., None] * v)[..., None, :]
    return jnp.einsum("bhk,bhkv->bhv", q, S, precision=Precision.HIGHEST).astype(dtype), S
  write, erase = (x["w"], x["e"]) if "w" in x else (x["b"][..., None],) * 2
  reads = jnp.stack([q, erase * k], -2) * decay[..., None, :]
  answers = jnp.einsum("bhrk,bhkv->bhrv", reads, S, precision=Precision.HIGHEST)
  u = write * v - answers[..., 1, :]
  o = answers[..., 0, :] + jnp.sum(q * k, -1, keepdims=True) * u
  return o.astype(dtype), decay[..., None] * S + k[..., :, None] * u[..., None, :]
