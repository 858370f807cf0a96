"""One token of any rule, for awake decoding: S is updated where it lies."""

import functools

import jax
import jax.numpy as jnp
from jax.lax import Precision


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def update(rule: str, token: dict[str, jax.Array], S: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The recurrence once. S is read once for both its answers and written once, into its own memory.

  Inside a larger jitted program the donation is that program's to make: `jax.jit(..., donate_argnames="S")`.

  Args:
    rule: a name in `kernels.dispatch.OPERANDS`.
    token: the rule's arguments without their axis T: q, k [B, H, K], v [B, H, V] and its gates.
    S: [B, H, K, V] fast weights, donated: the array that was passed is gone afterwards.

  Returns:
    o [B, H, V] in v's dtype, and S.
  """
  dtype = token["v"].dtype
  x = {name: value.astype(S.dtype) for name, value in token.items()}
  q, k, v = x["q"], x["k"], x["v"]
  decay = jnp.exp(x.get("g", jnp.zeros_like(q[..., :1])))
  decay = decay if decay.ndim == 3 else decay[..., None]
  write, erase = (x["w"], x["e"]) if "w" in x else (x["b"][..., None],) * 2
  reads = jnp.stack([q, erase * k], -2) * decay[..., None, :]
  answers = jnp.einsum("bhrk,bhkv->bhrv", reads, S, precision=Precision.HIGHEST)
  u = write * v
  if rule != "gated_hebbian":
    u = u - answers[..., 1, :]
  o = answers[..., 0, :] + jnp.sum(q * k, -1, keepdims=True) * u
  return o.astype(dtype), decay[..., None] * S + k[..., :, None] * u[..., None, :]
