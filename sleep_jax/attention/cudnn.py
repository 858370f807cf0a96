"""cuDNN's fused attention on CUDA, through `jax.nn.dot_product_attention`.

What it can be asked for: causal (always, since without it a window reaches into the future too), a window,
and a length for each row. Its masks are [T, S] arrays, so pads are no masks here: they are moved behind the
tokens, where the length ends. Causal attention sees no difference: the order of the tokens stays, and with
it what each of them sees.
"""

import jax
import jax.numpy as jnp

from sleep_jax.attention.blocked import blocked


def cudnn(
  q: jax.Array, k: jax.Array, v: jax.Array, *, reach: int | None = None, valid: jax.Array | None = None
) -> jax.Array:
  """Causal softmax attention of queries at the last T of S keys; see `forms.attend`.

  With a reach and pads between the tokens of some row, distances would change as the pads go: then `blocked`
  runs instead, as the device finds out.

  Returns:
    [B, T, num_heads, d] in q's dtype; 0 at pads.

  Raises:
    NotImplementedError: cuDNN is not installed, or does not take the dtype (bfloat16 and float16) or the
      width of a head (multiples of 8, up to 256, before Hopper 128).
  """
  T, S = q.shape[1], k.shape[1]
  if T < S:  # its diagonal begins at the first query and the first key
    q = jnp.pad(q, ((0, 0), (S - T, 0), (0, 0), (0, 0)))
  out = fused(q, k, v, reach, None) if valid is None else _without_pads(q, k, v, reach, valid)
  return out[:, S - T :]


def fused(
  q: jax.Array, k: jax.Array, v: jax.Array, reach: int | None, lengths: jax.Array | None
) -> jax.Array:
  """Causal attention of S queries to S keys, in each row of its first `lengths` [B] alone."""
  try:
    return jax.nn.dot_product_attention(
      q,
      k,
      v,
      is_causal=True,
      local_window_size=None if reach is None else (reach - 1, 0),
      query_seq_lengths=lengths,
      key_value_seq_lengths=lengths,
      implementation="cudnn",
    )
  except RuntimeError as error:  # also what it is where cuDNN is missing
    raise NotImplementedError(f"cudnn: {' '.join(str(error).split())}") from error


def _without_pads(q: jax.Array, k: jax.Array, v: jax.Array, reach: int | None, valid: jax.Array) -> jax.Array:
  """`fused` of the tokens of each row, 0 at its pads."""
  order = jnp.argsort(~valid, axis=1, stable=True)  # the tokens as they were, then the pads
  back = jnp.argsort(order, axis=1)
  lengths = jnp.maximum(jnp.sum(valid, axis=1, dtype=jnp.int32), 1)  # a row of pads reads one of them

  def moved(q, k, v):
    q, k, v = (_taken(x, order) for x in (q, k, v))
    return _taken(fused(q, k, v, reach, lengths), back)

  def in_place(q, k, v):
    return blocked(q, k, v, offset=0, reach=reach, valid=valid)

  if reach is None:
    out = moved(q, k, v)
  else:
    begins = valid & ~jnp.pad(valid, ((0, 0), (1, 0)))[:, :-1]
    out = jax.lax.cond(jnp.all(jnp.sum(begins, axis=1) <= 1), moved, in_place, q, k, v)
  return jnp.where(valid[:, :, None, None], out, 0)


def _taken(x: jax.Array, order: jax.Array) -> jax.Array:
  """x [B, S, ...] in another order of the S, [B, S]."""
  rows = jnp.arange(x.shape[0])[:, None]
  return x.at[rows, order].get(unique_indices=True, mode="promise_in_bounds")
