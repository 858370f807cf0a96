"""Sleep: N passes over a window that move what matters of it into the fast weights."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# One pass over the blocks: (h, S, state private to the pass) -> the same three, updated.
Blocks = Callable[[Any, Any, Any], tuple[Any, Any, Any]]


def sleep(
  blocks: Blocks,
  h: jax.Array,
  S: Any,
  per_pass: Any = None,
  *,
  num_passes: int,
  backprop_passes: int | None = None,
  remat: bool = False,
  unroll: bool = False,
) -> tuple[Any, Any, Any]:
  """Consolidates one window into the fast weights.

  Repeats `h, S <- Blocks(h, S)`: the branch without a loss in Algorithm 1 of arXiv:2605.26099. The
  caller drops h and the attention cache, so that gradients reach the passes through S alone.

  >>> add = lambda h, S, per_pass: (h, S + h, per_pass)  # a toy: each pass writes h into S
  >>> h, S, _ = sleep(add, jnp.ones(2), jnp.zeros(2), num_passes=3)
  >>> S.tolist()
  [3.0, 3.0]

  Args:
    blocks: one pass over all blocks, (h, S, per_pass[n]) -> (h, S, per_pass[n]); closes over the slow
      weights.
    h: embedded window, [B, L, D], in the activation dtype.
    S: fast weights on entry, a pytree of float arrays.
    per_pass: state private to each pass, a pytree of [N, ...], such as its attention cache under sliding
      eviction. None: passes share everything.
    num_passes: N, in passes over the window; static. N = 1 is the plain hybrid.
    backprop_passes: k; what the first N - k passes write counts as a constant. The gradient with
      respect to S on entry goes past them unchanged, so that earlier windows still learn; none
      flows through their h. None: k = N, no truncation.
    remat: recompute each pass on the way back. Residuals shrink from N sets of activations to N
      carries, for about one more forward pass of time.
    unroll: write the passes out instead of `lax.scan`: the same numbers.

  Returns:
    h and S after the last pass, and `per_pass` after each pass: same structures, shapes, dtypes and
      shardings.

  Raises:
    ValueError: if num_passes < 1 or backprop_passes is not in 1..num_passes.
    TypeError: if a pass changes the shape, dtype or sharding of h or S.
  """
  k = _learning(num_passes, backprop_passes)
  per_pass = {} if per_pass is None else per_pass

  def one_pass(carry, private):
    with jax.named_scope("pass"):
      h, S, private = blocks(carry[0], carry[1], private)
    return (h, S), private

  early = jax.tree.map(lambda x: x[:-k], per_pass)
  late = jax.tree.map(lambda x: x[-k:], per_pass)
  if k < num_passes:
    (h, after), early = loop(one_pass, (h, S), early, length=num_passes - k, unroll=unroll)
    h, early = jax.lax.stop_gradient((h, early))
    S = jax.tree.map(_past, S, after)
  if remat:
    one_pass = jax.checkpoint(one_pass, prevent_cse=unroll or k == 1)  # inside a scan no barrier is needed
  (h, S), late = loop(one_pass, (h, S), late, length=k, unroll=unroll)
  if k < num_passes:
    late = jax.tree.map(lambda *x: jnp.concatenate(x), early, late)
  return h, S, late


def read_and_sleep(
  read: Callable[[Any, Any, Any], tuple[tuple[Any, Any, Any], Any]],
  blocks: Blocks,
  h: jax.Array,
  S: Any,
  per_pass: Any = None,
  *,
  num_passes: int,
  backprop_passes: int | None = None,
  remat: bool = False,
  unroll: bool = False,
) -> tuple[Any, Any, Any, Any]:
  """Sleeps on a window that is also read awake: the first pass is that reading.

  Both start from the same state and compute the same, so that N passes are made in all, not N + 1.

  >>> add = lambda h, S, per_pass: (h, S + h, per_pass)
  >>> read = lambda h, S, per_pass: (add(h, S, per_pass), S + h)  # what is read is S after the pass
  >>> y, h, S, _ = read_and_sleep(read, add, jnp.ones(2), jnp.zeros(2), num_passes=3)
  >>> y.tolist(), S.tolist()
  ([1.0, 1.0], [3.0, 3.0])

  Args:
    read: the first pass and what is read from it: (h, S, per_pass[0]) -> ((h, S, per_pass[0]), y).
    blocks: passes 2 .. N, as for `sleep`.
    backprop_passes: as for `sleep`; the gradient of y goes through the first pass, whatever it is.
    h, S, per_pass, num_passes, remat, unroll: as for `sleep`.

  Returns:
    y, and then what `sleep` returns.

  Raises:
    ValueError, TypeError: as `sleep`.
  """
  k = _learning(num_passes, backprop_passes)
  per_pass = {} if per_pass is None else per_pass
  with jax.named_scope("pass"):
    first = jax.checkpoint(read) if remat else read
    (h, after, private), y = first(h, S, jax.tree.map(lambda x: x[0], per_pass))
  if k < num_passes:
    h, private = jax.lax.stop_gradient((h, private))
    after = jax.tree.map(_past, S, after)
  private = jax.tree.map(lambda x: x[None], private)
  if num_passes > 1:
    later = jax.tree.map(lambda x: x[1:], per_pass)
    how = {"num_passes": num_passes - 1, "backprop_passes": min(k, num_passes - 1)}
    h, after, later = sleep(blocks, h, after, later, **how, remat=remat, unroll=unroll)
    private = jax.tree.map(lambda *x: jnp.concatenate(x), private, later)
  return y, h, after, private


def loop(body: Callable, carry: Any, xs: Any = None, *, length: int, unroll: bool) -> tuple[Any, Any]:
  """`jax.lax.scan`, or the same written out: (carry, x) -> (carry, y), ys stacked.

  Written out, XLA fuses over the steps and stacks no residuals; it compiles `length` times as long. A
  single step is always written out.
  """
  if not unroll and length > 1:
    return jax.lax.scan(body, carry, xs, length=length)
  ys = []
  for i in range(length):
    before = jax.tree.map(_type, carry)
    carry, y = body(carry, jax.tree.map(lambda x, i=i: x[i], xs))
    after = jax.tree.map(_type, carry)
    if before != after:
      raise TypeError(f"a step changed its carry from {before} to {after}")
    ys.append(y)
  return carry, jax.tree.map(lambda *y: jnp.stack(y), *ys)


def _learning(num_passes: int, backprop_passes: int | None) -> int:
  """k, the last passes that gradients flow through; raises ValueError where N or k is none."""
  if num_passes < 1:
    raise ValueError(f"num_passes must be at least 1, got {num_passes}")
  k = num_passes if backprop_passes is None else backprop_passes
  if not 1 <= k <= num_passes:
    raise ValueError(f"backprop_passes must lie in 1..{num_passes}, got {k}")
  return k


def _type(x: jax.Array) -> Any:
  """Shape, dtype and sharding of `x`; a weak type counts as its dtype, as in `jax.lax.scan`."""
  return jax.typeof(x).strip_weak_type()


def _past(before: jax.Array, after: jax.Array) -> jax.Array:
  """The value of `after`, to the bit, with the gradient of `before`; a flag has none."""
  if not jnp.issubdtype(after.dtype, jnp.inexact):
    return after
  return jax.lax.stop_gradient(after) + (before - jax.lax.stop_gradient(before))
