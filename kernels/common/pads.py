"""Pads in front of tokens, where something goes on from before: as if they were not there."""

import jax
import jax.numpy as jnp


def in_front(mask: jax.Array) -> jax.Array:
  """How many pads stand in front of the first token: [B, T] bool, False for pads -> [B] int32.

  >>> in_front(jnp.array([[False, False, True], [True, False, True], [False, False, False]])).tolist()
  [2, 0, 3]
  """
  return jnp.where(jnp.any(mask, axis=1), jnp.argmax(mask, axis=1), mask.shape[1]).astype(jnp.int32)


def next_to(before: jax.Array, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Puts what came before x directly in front of its first token, over the pads that stand between.

  >>> before, x = jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 0.0, 0.0, 3.0]])
  >>> before, x = next_to(before, x, jnp.array([[False, False, False, True]]))
  >>> x.tolist()
  [[0.0, 1.0, 2.0, 3.0]]

  Args:
    before: [B, n, ...], a few entries: each is a pass over x.
    x: [B, T, ...].
    mask: [B, T] bool, False for pads. Pads behind the first token stay where they are.

  Returns:
    Both with entry j of `before` of a row with p pads in front at place p + j of the two together. What stood
    there is gone; the entries of `before` in front of them mean nothing.
  """
  few, pads = before.shape[1], in_front(mask)
  both = jnp.concatenate([before, x], axis=1)
  at = jnp.arange(both.shape[1])
  for j in range(few):
    here = jnp.expand_dims(at == pads[:, None] + j, tuple(range(2, x.ndim)))
    both = jnp.where(here, before[:, j : j + 1], both)
  return both[:, :few], both[:, few:]
