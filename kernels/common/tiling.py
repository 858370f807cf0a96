"""What the chunked forms share: the plan, blocks of batch rows, chunks of tokens, the triangular inverse."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.lax import Precision

from sleep_jax.kernels.common import target

# Longest chunk by platform. CPU: a compromise (kernels/README.md has what others cost). TPU: by the
# compiler's own estimate, 128 takes a quarter fewer cycles than 64 forward and backward. GPU: not measured.
MAX_CHUNK = {"cpu": 64, "gpu": 64, "tpu": 128}
CACHE_BYTES = 2 << 20  # what a block of batch rows should fit into, on a CPU
LEAF = 8  # triangles up to this width are inverted row by row; each row is code to compile
FORGET = -1000.0  # log decay whose exp is 0 in every dtype; keeps -inf - -inf = nan out of the sums


class Plan(NamedTuple):
  """What is decided before tracing."""

  solve: bool  # delta rule: solve for the error; else the write is b v
  hoist: bool  # prepare all chunks before the scan (accelerators), or each inside it (CPU: stays in cache)
  block: int  # batch rows that run at a time; what is missing to a whole last block is padded
  max_chunk: int = MAX_CHUNK["cpu"]
  precision: Precision = (
    Precision.HIGHEST
  )  # of the products with inputs and S; sums of decays are always exact

  def chunks(self, T: int) -> tuple[int, int]:
    """n and C: as few chunks as max_chunk allows, of equal length, so that little is padded."""
    n = -(-T // self.max_chunk)
    return n, -(-T // n)

  def dot(self, spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, y, precision=self.precision)


def make_plan(
  q: jax.Array,
  v: jax.Array,
  S: jax.Array,
  *,
  solve: bool,
  extra: int = 0,
  max_chunk: dict[str, int] = MAX_CHUNK,
  platform: str | None = None,
) -> Plan:
  """The default plan for shapes q [B, T, H, K] and v [B, T, H, V].

  Args:
    q, v, S: of the call; what counts are shapes and dtypes.
    solve: delta rule or not.
    extra: floats that a token needs beside q, k, v and its row of scores.
    max_chunk: longest chunk by platform.
    platform: None: the one that the program is for (`target.platform`).
  """
  (B, T, H, K), V = q.shape, v.shape[-1]
  platform = platform or target.platform()
  plan = Plan(solve, hoist=platform != "cpu", block=B, max_chunk=max_chunk.get(platform, 64))
  if platform != "cpu":
    # Three bfloat16 passes (TPU) or tf32 (GPU) lose less than a bfloat16 input has lost already.
    half = all(x.dtype.itemsize == 2 for x in (q, v))
    return plan._replace(precision=Precision.HIGH) if half else plan
  _, C = plan.chunks(T)
  row = H * S.dtype.itemsize * (C * (2 * K + V + extra) + 2 * K * V)
  most = max(1, CACHE_BYTES // row)
  if B <= 4 * most:  # a few caches' worth runs as well in one piece
    return plan
  divisor = max(m for m in range(1, most + 1) if B % m == 0)
  even = -(-B // -(-B // most))  # the fewest blocks, of equal size: less than a row a block is padded
  return plan._replace(block=divisor if 2 * divisor >= most else even)


def blocked(f):
  """Applies f to blocks of batch rows, one after the other: what a block touches stays in cache.

  Rows that fill up the last block are zero and dropped. Traced once per shape, however often a model calls
  it: hence the jit.
  """

  @functools.partial(jax.jit, static_argnums=0)
  @functools.wraps(f)
  def run(plan: Plan, *args):
    B, m = args[0].shape[0], plan.block
    if m == B:
      return f(plan, *args)
    n = -(-B // m)
    if n * m > B:
      args = [jnp.pad(x, [(0, n * m - B)] + [(0, 0)] * (x.ndim - 1)) for x in args]
    out = jax.lax.map(lambda block: f(plan, *block), [x.reshape(n, m, *x.shape[1:]) for x in args])
    return jax.tree.map(lambda x: x.reshape(n * m, *x.shape[2:])[:B], out)

  return run


def with_gradient(forward: Callable, backward: Callable) -> Callable[..., Any]:
  """The function (plan, *inputs) -> (o, S) with a gradient by hand, which keeps the inputs only.

  Args:
    forward: (plan, *inputs) -> (o, S).
    backward: (plan, *inputs, do, dS) -> gradients of the inputs.
  """

  @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
  def run(plan, *inputs):
    return forward(plan, *inputs)

  def keep_inputs(plan, *inputs):
    o, S_out = forward(plan, *inputs)
    return (checkpoint_name(o, "fast_weight_o"), checkpoint_name(S_out, "fast_weight_S")), inputs

  def pull(plan, inputs, cotangents):
    return backward(plan, *inputs, *cotangents)

  run.defvjp(keep_inputs, pull)
  return run


def unit_lower_inverse(A: jax.Array) -> jax.Array:
  """(I + A)^-1 for strictly lower triangular A [..., C, C].

  By blocks: [[X, 0], [-Y L X, Y]] from the inverses X, Y of the diagonal blocks and the block L below.
  All pairs of a level go through one product. No powers of A, so nothing grows that the inverse does not
  hold, and no LAPACK call, which crawls through subnormal numbers when the decay is strong.
  """
  C = A.shape[-1]
  levels = (-(-C // LEAF) - 1).bit_length()
  m = -(-C // 2**levels)
  size = m * 2**levels
  A = jnp.pad(A, [(0, 0)] * (A.ndim - 2) + [(0, size - C)] * 2)
  X = _leaf_inverse(jnp.stack([A[..., i : i + m, i : i + m] for i in range(0, size, m)]))
  while m < size:
    below = jnp.stack([A[..., i + m : i + 2 * m, i : i + m] for i in range(0, size, 2 * m)])
    X, Y = X[0::2], X[1::2]
    corner = -dot("...ij,...jk->...ik", Y, dot("...ij,...jk->...ik", below, X))
    upper = jnp.concatenate([X, jnp.zeros_like(X)], -1)
    X = jnp.concatenate([upper, jnp.concatenate([corner, Y], -1)], -2)
    m *= 2
  return X[0, ..., :C, :C]


def _leaf_inverse(A: jax.Array) -> jax.Array:
  m = A.shape[-1]
  eye = jnp.eye(m, dtype=A.dtype)
  rows = []
  for i in range(m):
    row = jnp.broadcast_to(eye[i], (*A.shape[:-2], m))
    for j in range(i):
      row = row - A[..., i, j, None] * rows[j]
    rows.append(row)
  return jnp.stack(rows, -2)


def dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """A product in full precision."""
  return jnp.einsum(spec, x, y, precision=Precision.HIGHEST)


def inner(x: jax.Array, y: jax.Array) -> jax.Array:
  """sum(x * y, -1), in full precision.

  As a product: for a sum of two arrays of [1, 2000, 12, 256] jax 0.10.2 took a CPU core 22 ms, for this 1.6.
  """
  return dot("...k,...k->...", x, y)


def split(x: jax.Array, n: int, C: int, dtype) -> jax.Array:
  """[B, T, H, ...] -> [n, B, H, C, ...], padded with zeros: no write, no decay."""
  x = x.astype(dtype)
  if n * C > x.shape[1]:
    x = jnp.pad(x, [(0, 0), (0, n * C - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
  return jnp.moveaxis(x.reshape(x.shape[0], n, C, *x.shape[2:]), (1, 3), (0, 2))


def join(x: jax.Array, T: int) -> jax.Array:
  """[n, B, H, C, ...] -> [B, T, H, ...]."""
  x = jnp.moveaxis(x, (0, 2), (1, 3))
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]


def prepared(plan: Plan, prepare: Callable[..., Any], tokens: Sequence[jax.Array]) -> tuple[Any, Callable]:
  """What a loop over chunks goes along, and the function that makes a prepared chunk of an element of it.

  With `plan.hoist` all chunks are prepared at once before the loop, else each of them inside it.

  Args:
    prepare: (plan, *tokens, **known) -> chunk. `known` are parts of the chunk from an earlier loop.
    tokens: arrays [n, B, H, C, ...].
  """
  if plan.hoist:
    return prepare(plan, *tokens), lambda chunk, **known: chunk
  return tokens, lambda chunk_of_tokens, **known: prepare(plan, *chunk_of_tokens, **known)


def scan(f, init, xs, reverse: bool = False):
  """`jax.lax.scan`, without the loop if there is one chunk."""
  if jax.tree.leaves(xs)[0].shape[0] > 1:
    return jax.lax.scan(f, init, xs, reverse=reverse)
  carry, y = f(init, jax.tree.map(lambda x: x[0], xs))
  return carry, jax.tree.map(lambda y: y[None], y)
