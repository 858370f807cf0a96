"""The part of the backward pass for which no chunk needs another, in half precision.

Derivation: kernels/README.md. Products of operands in the inputs' dtype, summed in float32; XLA fuses what is
between them. In shape comments `...` stands for the rows of a batch and the chunks.

dG is <q, dq> + <k, dk as it reads> - <k, dk as it writes>, not the shorter form with <v, dv>. What a query
reads of its own token appears in both and cancels; here it is left out, as its rounding would be much of the
result: an error of 1.4e-2 of dg's largest entry became 6e-3, with strong decay 1.6e-2 became 1.2e-2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

F32 = jnp.float32


class Gates(NamedTuple):
  """The gates of each chunk, float32. G_i is the sum of the log decays up to token i."""

  decay: jax.Array  # [..., C, C] exp(G_i - G_j) for j <= i, else 0
  decay_in: jax.Array  # [..., C] exp(G_i)
  decay_out: jax.Array  # [..., C] exp(G_C - G_i)
  b: jax.Array  # [..., C]


def gradients(
  q: jax.Array,
  k: jax.Array,
  gates: Gates,
  do: jax.Array,
  dv: jax.Array,
  E: jax.Array,
  S: jax.Array,
  dS_after: jax.Array,
  end: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Gradients of q, k, g and b from the results of the walks along the chunks.

  Args:
    q, k: [..., C, K]. gates: of the same chunks.
    do, dv, E: turned, [..., V, C]; E are the errors, dv the gradient of v.
    S, dS_after: turned, [..., V, K]; S as the chunk met it, and the gradient of what it left.
    end: [...] float32, the inner product of the S that the chunk left with its gradient.

  Returns:
    dq, dk [..., C, K], dg, db [..., C], float32.
  """
  decay, decay_in, decay_out, b = gates
  half = lambda x: x.astype(q.dtype)  # noqa: E731
  below = jnp.tril(decay, -1)
  M = below * _dot("...vi,...vj->...ij", do, E)  # by the queries, then by the keys as they read
  L = -below * _dot("...vi,...vj->...ij", dv, E)
  own = jnp.sum(do.astype(F32) * E.astype(F32), -2)[..., None]  # the diagonal of M: decay 1
  asks, reads = (
    sign * decay_in[..., None] * _dot("...vi,...vk->...ik", x, S)
    + _dot("...ij,...jk->...ik", half(scores * b[..., None, :]), k)
    for sign, x, scores in ((1.0, do, M), (-1.0, dv, L))
  )
  writes = _dot("...ij,...ik->...jk", half(M), q) + _dot("...ij,...ik->...jk", half(L), k)
  writes = writes + decay_out[..., None] * _dot("...vj,...vk->...jk", E, dS_after)
  q, k, b = q.astype(F32), k.astype(F32), b[..., None]
  dG = jnp.sum(q * asks + k * (reads - b * writes), -1)
  dg = jnp.flip(jnp.cumsum(jnp.flip(dG, -1), -1), -1) + end[..., None]
  writes = writes + own * q
  return asks + own * b * k, reads + b * writes, dg, jnp.sum(k * writes, -1)


def _dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.einsum(spec, x, y, preferred_element_type=F32)
