"""What the TPU kernels of the gated delta rule share: products, decays, the inverse, the tiles.

Everything here runs inside a kernel on one chunk, except `Tiles` and its methods, which run around it.
"""

import dataclasses
from collections.abc import Generator, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import Precision

CHUNK = 128  # tokens: the width of the matrix unit
HEADS = 8  # at most so many rows of [B * H] a grid step: their products hide each other's latency
DONE = object()  # what a task that has ended answers
LEAF = 16  # width of the blocks on the diagonal that are inverted row by row
WIDEST = 512  # K and V up to which the blocks of a grid step fit into VMEM
VMEM_BYTES = 48 << 20
STEP, FORGET = 16.0, -1000.0  # as in kernels/common/chunked_head.py and tiles.py
TINY = 1e-20  # stands in for b = 0 where the gradient of b divides by it


@dataclasses.dataclass(frozen=True)
class Tiles:
  """How arrays [B, T, H, ...] are tiled: R = B * H rows in groups of r, T in n chunks of C, K and V padded.

  Attributes:
    B, T, H, K, V: the caller's sizes.
    r: rows a grid step; groups: how many of them (rows that are missing in the last one are zeros).
    n, C: chunks and their length, a power of two.
    Kp, Vp: K and V, rounded up to whole tiles of 16.
    dtype: of the operands of the products: bfloat16 if q, k and v are, else float32.
  """

  B: int
  T: int
  H: int
  K: int
  V: int
  r: int
  groups: int
  n: int
  C: int
  Kp: int
  Vp: int
  dtype: jnp.dtype

  def rows(self, x: jax.Array, width: int) -> jax.Array:
    """[B, T, H, K or V] -> [groups * r, n * C, width], padded with zeros: no write, no decay."""
    x = jnp.moveaxis(x, 2, 1).reshape(self.B * self.H, self.T, x.shape[-1]).astype(self.dtype)
    return self._pad(x, self.n * self.C, width)

  def gates(self, x: jax.Array, pad: float = 0.0) -> jax.Array:
    """[B, T, H] -> [groups, n, r, C], float32, `pad` where there is no token."""
    x = jnp.moveaxis(x, 2, 1).reshape(self.B * self.H, self.T, 1).astype(jnp.float32)
    x = self._pad(x, self.n * self.C, 1, value=pad).reshape(self.groups, self.r, self.n, self.C)
    return jnp.moveaxis(x, 2, 1)

  def state(self, S: jax.Array) -> jax.Array:
    """[B, H, K, V] -> [groups * r, Kp, Vp]."""
    return self._pad(S.reshape(self.B * self.H, self.K, self.V), self.Kp, self.Vp)

  def unrows(self, x: jax.Array, width: int) -> jax.Array:
    """[groups * r, n * C, Kp or Vp] -> [B, T, H, width]."""
    x = x[: self.B * self.H, : self.T, :width].reshape(self.B, self.H, self.T, width)
    return jnp.moveaxis(x, 1, 2)

  def ungates(self, x: jax.Array) -> jax.Array:
    """[groups, n, r, C] -> [B, T, H]."""
    x = jnp.moveaxis(x, 1, 2).reshape(self.groups * self.r, self.n * self.C)
    return jnp.moveaxis(x[: self.B * self.H, : self.T].reshape(self.B, self.H, self.T), 1, 2)

  def unstate(self, S: jax.Array) -> jax.Array:
    """[groups * r, Kp, Vp] -> [B, H, K, V]."""
    return S[: self.B * self.H, : self.K, : self.V].reshape(self.B, self.H, self.K, self.V)

  def _pad(self, x: jax.Array, *sizes: int, value: float = 0.0) -> jax.Array:
    sizes = (self.groups * self.r, *sizes)
    widths = [(0, size - have) for size, have in zip(sizes, x.shape, strict=True)]
    return jnp.pad(x, widths, constant_values=value)


def make_tiles(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, b: jax.Array, S: jax.Array) -> Tiles:
  """Decides from shapes and dtypes alone.

  Raises:
    NotImplementedError: what these kernels do not take, and what they do.
  """
  (B, T, H, K), V = q.shape, v.shape[-1]
  for name, x in (("q", q), ("k", k), ("v", v)):
    if x.dtype not in (jnp.bfloat16, jnp.float32):
      raise NotImplementedError(f"pallas_tpu: {name} has dtype {x.dtype}, takes bfloat16 and float32")
  for name, x in (("g", g), ("b", b), ("S", S)):
    if x.dtype != jnp.float32:
      raise NotImplementedError(f"pallas_tpu: {name} has dtype {x.dtype}, takes float32")
  for name, x in (("K", K), ("V", V)):
    if x > WIDEST:
      raise NotImplementedError(f"pallas_tpu: {name} is {x}, takes up to {WIDEST}")
  dtype = jnp.bfloat16 if all(x.dtype == jnp.bfloat16 for x in (q, k, v)) else jnp.float32
  return tiles_of(B, T, H, K, V, jnp.dtype(dtype))


def tiles_of(B: int, T: int, H: int, K: int, V: int, dtype: jnp.dtype, tile: int = 16) -> Tiles:
  """The tiles for these sizes; K and V are padded to multiples of `tile`."""
  n = -(-T // CHUNK)
  C = min(CHUNK, max(16, 1 << (T - 1).bit_length()))
  Kp, Vp = -(-K // tile) * tile, -(-V // tile) * tile
  most = max(1, min(HEADS, HEADS * 128 * 256 // (Kp * Vp)))
  rows = B * H
  r = max(m for m in range(1, min(most, rows) + 1) if rows % m == 0)
  if 2 * r <= most and r < rows:  # an awkward number of rows: zeros cost less than empty matrix units
    r = most
  return Tiles(B, T, H, K, V, r, -(-rows // r), n, C, Kp, Vp, dtype)


def dot(x: jax.Array, y: jax.Array, contract: str = "nn") -> jax.Array:
  """x y ("nn"), x y^T ("nt") or x^T y ("tn") in float32; float32 operands are not rounded to bfloat16."""
  sides = {"nn": ((1,), (0,)), "nt": ((1,), (1,)), "tn": ((0,), (0,))}[contract]
  precision = Precision.HIGHEST if x.dtype == jnp.float32 else Precision.DEFAULT
  return lax.dot_general(x, y, (sides, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def grid_of(C: int) -> tuple[jax.Array, jax.Array]:
  """Row and column numbers, [C, C] int32."""
  return lax.broadcasted_iota(jnp.int32, (C, C), 0), lax.broadcasted_iota(jnp.int32, (C, C), 1)


@dataclasses.dataclass(frozen=True)
class Gates:
  """Decays and write strengths of the r heads of a group in one chunk.

  G is the running sum of g in two parts, whole sixteenths and the rest (kernels/README.md, "The decays").
  Fields that end in `_row` are [r, C]; the columns are [C, r], one column a head.
  """

  coarse_row: jax.Array
  fine_row: jax.Array
  decay_out_row: jax.Array  # 0 where b is
  kept_row: jax.Array  # 0 where b is, else 1
  decay_all: jax.Array  # [r, 1] exp(G_C)
  columns: jax.Array  # [C, 6 r]: coarse, fine, b, kept b, decay_in, decay_out
  r: int

  def column(self, name: str, h: int) -> jax.Array:
    """[C, 1] of head h."""
    at = ("coarse", "fine", "b", "kept_b", "decay_in", "decay_out").index(name) * self.r + h
    return self.columns[:, at : at + 1]

  def decay(self, h: int, row: jax.Array, col: jax.Array) -> jax.Array:
    """exp(G_i - G_j) on and below the diagonal, else 0: [C, C]. Masked before the exponential."""
    coarse = self.column("coarse", h) - self.coarse_row[h : h + 1]
    fine = self.column("fine", h) - self.fine_row[h : h + 1]
    return jnp.exp(jnp.where(row >= col, coarse + fine, -jnp.inf))


def gates(g: jax.Array, b: jax.Array) -> Gates:
  """From g, b [r, C]. b of exactly 0 counts as TINY in the system; what it writes is masked (`kept_b`)."""
  r, C = g.shape
  row, col = grid_of(C)
  g = jnp.maximum(g, FORGET)
  coarse = jnp.round(g * STEP) * (1 / STEP)
  G = dot(jnp.concatenate([coarse, g - coarse], 0), (row <= col).astype(jnp.float32))
  coarse, fine = G[:r], G[r:]
  decay_in = jnp.exp(coarse + fine)
  decay_out = jnp.exp((coarse[:, C - 1 :] - coarse) + (fine[:, C - 1 :] - fine))
  kept = jnp.where(b == 0, 0.0, 1.0)
  safe = jnp.where(jnp.abs(b) < TINY, TINY, b)
  columns = jnp.concatenate([coarse, fine, safe, b, decay_in, decay_out], 0).T
  return Gates(coarse, fine, decay_out * kept, kept, decay_in[:, C - 1 :], columns, r)


def in_step(tasks: Sequence[Generator]) -> None:
  """Runs tasks in turn, from `yield` to `yield`: they stop wherever they would wait for a matrix unit.

  The compiler keeps roughly the order in which a kernel is traced: one head after the other would leave
  the matrix units empty while each product waits for the one before it.
  """
  running = list(tasks)
  while running:
    running = [task for task in running if next(task, DONE) is not DONE]


def unit_lower_inverse(A: jax.Array, dtype: jnp.dtype) -> Generator[None, None, jax.Array]:
  """(I + A)^-1 for strictly lower triangular A [C, C] float32, C a power of two from 16 on; float32.

  A ladder: from the inverses of the diagonal blocks of width m to those of width 2 m,
  X <- X - X L X with L the off-diagonal blocks between them. From m = 16 on only the rows that change are
  multiplied. No powers of A: nothing grows that the inverse does not hold. A task for `in_step`.
  """
  C = A.shape[0]
  row, col = grid_of(C)
  X = (yield from _diagonal_inverses(A, dtype)).astype(dtype)
  m = LEAF
  while m < C:
    low = [slice(i + m, i + 2 * m) for i in range(0, C, 2 * m)]
    left = lambda s: (col[s] >= s.start - m) & (col[s] < s.start)  # noqa: E731, B023
    L = jnp.concatenate([jnp.where(left(s), A[s], 0.0) for s in low], 0).astype(dtype)
    LX = (dot(L[:, :m], X[:m]) if 2 * m == C else dot(L, X)).astype(dtype)
    yield
    high = jnp.zeros((m, C), dtype)
    LX = jnp.concatenate([x for i in range(len(low)) for x in (high, LX[i * m : (i + 1) * m])], 0)
    corners = dot(jnp.concatenate([X[s] for s in low], 0), LX)
    yield
    # Where a corner is not zero, X was: nothing is rounded twice.
    X = [(X[s.start - m : s.start], X[s].astype(jnp.float32), i * m) for i, s in enumerate(low)]
    X = jnp.concatenate([x for top, x0, i in X for x in (top, (x0 - corners[i : i + m]).astype(dtype))], 0)
    m *= 2
  return X


def _diagonal_inverses(A: jax.Array, dtype: jnp.dtype) -> Generator[None, None, jax.Array]:
  """The inverses of the diagonal blocks of I + A of width LEAF, and zeros elsewhere: [C, C] float32.

  Row by row, X_i = e_i - sum_j<i A_ij X_j, all blocks side by side in [LEAF, C]. A product with ones spreads
  each A_ij over the lanes of its block.
  """
  C = A.shape[0]
  row, col = grid_of(C)
  own = (row >> 4) == (col >> 4)
  side_by_side = sum(jnp.where(own, A, 0.0)[i : i + LEAF] for i in range(0, C, LEAF))
  at, lane = row[:LEAF], col[:LEAF] & (LEAF - 1)
  half = LEAF // 2
  rows = lambda j: slice(0 if j < half - 1 else half, LEAF)  # of column j that are below row j  # noqa: E731
  alone = [jnp.where(lane == j, side_by_side, 0.0)[rows(j)] for j in range(LEAF - 1)]
  alone.append(jnp.zeros((half, C), jnp.float32))  # to whole tiles of 16 rows
  spread = dot(jnp.concatenate(alone, 0).astype(dtype), own.astype(dtype))
  yield
  X = jnp.where(lane == at, 1.0, 0.0)
  top, bottom, start = X[:half], X[half:], 0
  for j in range(LEAF - 1):
    x = top[j : j + 1] if j < half else bottom[j - half : j - half + 1]
    if j < half - 1:
      top = top - spread[start : start + half] * x
      start += half
    bottom = bottom - spread[start : start + half] * x
    start += half
    yield
  return jnp.where(own, jnp.concatenate([top, bottom] * (C // LEAF), 0), 0.0)
