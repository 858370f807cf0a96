"""Gated DeltaNet-2 (arXiv 2605.22791), token by token: slow, obvious, the judge."""

import jax
import jax.numpy as jnp
from jax.lax import Precision


def gdn2(
  q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, e: jax.Array, w: jax.Array, S: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """S decays channel by channel. Its answer to e k is erased and w v is written, both at the key k.

  Args:
    q, k, g, e: [B, T, H, K]. v, w: [B, T, H, V]. S: [B, H, K, V], float32 or float64.

  Returns:
    o [B, T, H, V] in v's dtype, and S after the last token. Everything is computed in the dtype of S.
  """

  def step(S: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    q, k, v, g, e, w = token
    S = jnp.exp(g)[..., None] * S
    u = w * v - jnp.einsum("bhkv,bhk->bhv", S, e * k, precision=Precision.HIGHEST)
    S = S + k[..., :, None] * u[..., None, :]
    return S, jnp.einsum("bhkv,bhk->bhv", S, q, precision=Precision.HIGHEST)

  tokens = tuple(jnp.moveaxis(x, 1, 0).astype(S.dtype) for x in (q, k, v, g, e, w))
  S, o = jax.lax.scan(step, S, tokens)
  return jnp.moveaxis(o, 0, 1).astype(v.dtype), S
