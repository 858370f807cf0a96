"""What the fused TPU kernels share: the operands of convolution and gates, and their arithmetic on one head.

`Operands` runs around the kernels, the rest inside. A head's channels lie in blocks of 128 lanes, each in a
buffer of its own, [8 + C, 128]: rows that start anywhere in it are then one load a register, and the
convolution needs no shuffles.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sleep_jax.kernels.conv_gated_delta.conv_and_gates import NORM_EPS
from sleep_jax.kernels.conv_gated_delta.spec import CLOSED
from sleep_jax.kernels.gated_delta import pallas_tpu_parts as parts

Ref = Any  # a reference to an array in VMEM
LANES = 128
BEFORE = 8  # rows before a chunk that are at hand, and rows for the taps: a tile


@dataclasses.dataclass(frozen=True)
class Tiles:
  """How x and its convolution are tiled: as in `parts.Tiles`, q, k and v side by side, X' = 2 K' + V' lanes.

  Attributes:
    rule: the tiles of the rest; K' and V' are multiples of 128.
    c: taps.
  """

  rule: parts.Tiles
  c: int

  @property
  def X(self) -> int:
    return 2 * self.rule.Kp + self.rule.Vp

  def x(self, x: jax.Array) -> jax.Array:
    """[B, T, H, X] -> [R, T', X']."""
    return self.rule.rows(self.spread(x), self.X)

  def context(self, context: jax.Array) -> jax.Array:
    """[B, c-1, H, X] -> [R, BEFORE, X'], at the end."""
    return self._few(jnp.moveaxis(self.spread(context), 2, 1), BEFORE - self.c + 1).astype(jnp.float32)

  def taps(self, taps: jax.Array) -> jax.Array:
    """Half of taps [c, H, X] -> [R, BEFORE, X'], at the start, one copy a batch row."""
    taps = jnp.moveaxis(self.spread(0.5 * taps), 1, 0)
    return self._few(jnp.broadcast_to(taps, (self.rule.B, *taps.shape)), 0)

  def heads(self, *values: jax.Array) -> jax.Array:
    """Some [H] -> [groups, how many, r, C]: the same in every lane."""
    tiles = self.rule
    x = jnp.tile(jnp.stack(values), tiles.B)
    x = jnp.pad(x, [(0, 0), (0, tiles.groups * tiles.r - tiles.B * tiles.H)]).reshape(
      len(values), tiles.groups, tiles.r
    )
    return jnp.broadcast_to(jnp.moveaxis(x, 0, 1)[..., None], (tiles.groups, len(values), tiles.r, tiles.C))

  def closed(self, x: jax.Array) -> jax.Array:
    """[B, T, H] -> [groups, n, r, C], closed where there is no token."""
    return self.rule.gates(x, CLOSED)

  def spread(self, x: jax.Array) -> jax.Array:
    """[..., X] -> [..., X']: q, k and v each padded to whole blocks of lanes."""
    K, V, Kp, Vp = self.rule.K, self.rule.V, self.rule.Kp, self.rule.Vp
    if (K, V) == (Kp, Vp):
      return x
    padded = []
    for part, width in zip(jnp.split(x, [K, 2 * K], -1), (Kp, Kp, Vp), strict=True):
      padded.append(jnp.pad(part, [(0, 0)] * (x.ndim - 1) + [(0, width - part.shape[-1])]))
    return jnp.concatenate(padded, -1)

  def gather(self, x: jax.Array) -> jax.Array:
    """[..., X'] -> [..., X]."""
    K, V, Kp = self.rule.K, self.rule.V, self.rule.Kp
    if self.X == 2 * K + V:
      return x
    return jnp.concatenate([x[..., :K], x[..., Kp : Kp + K], x[..., 2 * Kp : 2 * Kp + V]], -1)

  def _few(self, x: jax.Array, first: int) -> jax.Array:
    """[B, H, few, X'] -> [R, BEFORE, X'], from row `first` on."""
    tiles = self.rule
    x = x.reshape(tiles.B * tiles.H, *x.shape[2:])
    end = BEFORE - first - x.shape[1]
    return jnp.pad(x, [(0, tiles.groups * tiles.r - x.shape[0]), (first, end), (0, 0)])


def make_tiles(x: jax.Array, taps: jax.Array, S: jax.Array) -> Tiles:
  """Decides from shapes and dtypes alone.

  Raises:
    NotImplementedError: what these kernels do not take, and what they do.
  """
  B, T, H, _ = x.shape
  K, V = S.shape[2:]
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(f"pallas_tpu_fused: x has dtype {x.dtype}, takes bfloat16 and float32")
  if S.dtype != jnp.float32:
    raise NotImplementedError(f"pallas_tpu_fused: S has dtype {S.dtype}, takes float32")
  for name, width in (("K", K), ("V", V)):
    if width > parts.WIDEST:
      raise NotImplementedError(f"pallas_tpu_fused: {name} is {width}, takes up to {parts.WIDEST}")
  if taps.shape[0] > BEFORE:
    raise NotImplementedError(f"pallas_tpu_fused: taps has {taps.shape[0]} taps, takes up to {BEFORE}")
  return Tiles(parts.tiles_of(B, T, H, K, V, jnp.dtype(x.dtype), LANES), taps.shape[0])


def open_gates(a: jax.Array, b: jax.Array, rate: jax.Array, dt_bias: jax.Array) -> tuple[jax.Array, ...]:
  """g = rate softplus(a + dt_bias), sigmoid(b), and for their gradients the softplus and its slope."""
  u = a + dt_bias
  soft = jnp.maximum(u, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(u)))
  return rate * soft, sigmoid(b), soft, sigmoid(u)


def sigmoid(x: jax.Array) -> jax.Array:
  return 1 / (1 + jnp.exp(-x))


def one_and_tanh(half: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """1 + tanh(z / 2) = 2 sigmoid(z), from z / 2. For what is rounded to bfloat16 the unit's tanh is enough."""
  return 1 + jnp.tanh(half) if dtype == jnp.bfloat16 else 2 / (1 + jnp.exp(-2 * half))


class ConvRefs(NamedTuple):
  """Where x, taps, q, k, v of one chunk of r heads lie in VMEM. `slope` is None unless gradients follow."""

  x: Ref  # [r, C, X']
  taps: Ref  # [r, BEFORE, X']
  window: Ref  # [r, X' / 128, BEFORE + C, 128] float32: x, and the rows before it on entry
  q: Ref  # [r, C, K'], as k
  k: Ref
  v: Ref  # [r, C, V']
  slope: Ref | None  # [r, X' / 128, C, 128] float32: of q, k, v after z / 2, the length of q and k held


def blocks_of(name: str, K: int, V: int) -> range:
  """Which blocks of lanes are q's, k's or v's."""
  start = {"q": 0, "k": K, "v": 2 * K}[name] // LANES
  return range(start, start + (V if name == "v" else K) // LANES)


def lanes(block: int) -> slice:
  return slice(block * LANES, (block + 1) * LANES)


def forward(h: int, name: str, refs: ConvRefs, tiles: Tiles) -> None:
  """q, k or v of head h: convolution, SiLU, norm.

  The taps are halved, so that all comes from z / 2: silu(z) = z / 2 (1 + tanh(z / 2)).
  """
  C, c, out = refs.x.shape[1], tiles.c, getattr(refs, name)
  blocks = blocks_of(name, tiles.rule.Kp, tiles.rule.Vp)
  y, slopes = [], []
  for block in blocks:
    at = lanes(block)
    x = refs.x[h, :, at].astype(jnp.float32)
    refs.window[h, block, BEFORE:] = x
    half = refs.taps[h, c - 1 : c, at] * x
    for i in range(c - 1):
      start = BEFORE - c + 1 + i
      half += refs.taps[h, i : i + 1, at] * refs.window[h, block, start : start + C]
    up = one_and_tanh(half, out.dtype)
    y.append(half * up)
    if refs.slope is not None:
      slopes.append(up * (1 + half * (2 - up)))
  scale = None
  if name != "v":
    square = sum(jnp.sum(x * x, 1, keepdims=True) for x in y)
    scale = jax.lax.rsqrt(square + NORM_EPS) * (tiles.rule.K**-0.5 if name == "q" else 1.0)
  for i, block in enumerate(blocks):
    at = lanes(block - blocks.start)
    out[h, :, at] = (y[i] if scale is None else y[i] * scale).astype(out.dtype)
    if refs.slope is not None:
      refs.slope[h, block] = slopes[i] if scale is None else slopes[i] * scale
