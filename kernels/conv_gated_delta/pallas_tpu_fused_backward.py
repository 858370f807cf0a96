"""The way back of the fused TPU kernel: chunks in reverse; convolution and gates are computed again."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sleep_jax.kernels.conv_gated_delta import pallas_tpu_fused_parts as conv
from sleep_jax.kernels.conv_gated_delta.pallas_tpu_fused_parts import BEFORE, LANES, ConvRefs, Tiles
from sleep_jax.kernels.gated_delta import pallas_tpu_backward
from sleep_jax.kernels.gated_delta import pallas_tpu_parts as parts

PREVIOUS = 16  # rows of x before a chunk that are fetched: a tile of bfloat16


@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def backward(
  x,
  taps,
  context,
  a,
  b,
  A_log,
  dt_bias,
  S_after,
  inverse,
  chunk_S,
  do,
  dS_after,
  *,
  tiles: Tiles,
  interpret,
):
  """Gradients of x, taps, context, a, b, A_log, dt_bias and of the S on entry.

  Args:
    x, taps, context, a, b, A_log, dt_bias: as given to the rule. S_after: what it returned.
    inverse: [R, T', C] and chunk_S: [R, n, K', V'], as the forward kernel kept them.
    do: [B, T, H, V]. dS_after: [B, H, K, V]. Cotangents.
  """
  rule, c = tiles.rule, tiles.c
  r, n, C, K, V, X = rule.r, rule.n, rule.C, rule.Kp, rule.Vp, tiles.X
  R, steps = rule.groups * r, C // PREVIOUS
  tokens = lambda width: pl.BlockSpec((r, C, width), lambda i, j: (i, n - 1 - j, 0))  # noqa: E731
  previous = pl.BlockSpec((r, PREVIOUS, X), lambda i, j: (i, jnp.maximum((n - 1 - j) * steps - 1, 0), 0))
  few = pl.BlockSpec((r, BEFORE, X), lambda i, j: (i, 0, 0))
  gate = pl.BlockSpec((1, 1, r, C), lambda i, j: (i, n - 1 - j, 0, 0))
  heads = pl.BlockSpec((1, 2, r, C), lambda i, j: (i, 0, 0, 0))
  rates = pl.BlockSpec((1, r, C), lambda i, j: (i, 0, 0))
  state = pl.BlockSpec((r, K, V), lambda i, j: (i, 0, 0))
  states = pl.BlockSpec((r, 1, K, V), lambda i, j: (i, n - 1 - j, 0, 0))
  shape = jax.ShapeDtypeStruct
  channels = lambda rows: pltpu.VMEM((r, X // LANES, rows, LANES), jnp.float32)  # noqa: E731
  rows = tiles.x(x)
  dx, dz, dtaps, da, db, dA, dS = pl.pallas_call(
    functools.partial(_backward_kernel, tiles=tiles),
    grid=(rule.groups, n),
    in_specs=[tokens(X), previous, few, few, gate, gate, heads, tokens(C), states, tokens(V), state, state],
    out_specs=[tokens(X), few, few, gate, gate, rates, state],
    out_shape=[
      shape((R, n * C, X), x.dtype),
      shape((R, BEFORE, X), jnp.float32),
      shape((R, BEFORE, X), jnp.float32),
      shape((rule.groups, n, r, C), jnp.float32),
      shape((rule.groups, n, r, C), jnp.float32),
      shape((rule.groups, r, C), jnp.float32),
      shape((R, K, V), jnp.float32),
    ],
    scratch_shapes=[
      pltpu.VMEM((r, C), jnp.float32),
      channels(BEFORE + C),
      channels(C),
      channels(C + BEFORE),
      pltpu.VMEM((r, C, K), rule.dtype),
      pltpu.VMEM((r, C, K), rule.dtype),
      pltpu.VMEM((r, C, V), rule.dtype),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=parts.VMEM_BYTES
    ),
    interpret=interpret,
    name="conv_gated_delta_backward",
  )(
    rows,
    rows,
    tiles.taps(taps),
    tiles.context(context),
    tiles.closed(a),
    tiles.closed(b),
    tiles.heads(-jnp.exp(A_log), dt_bias),
    inverse,
    chunk_S,
    rule.rows(do, V),
    rule.state(S_after),
    rule.state(dS_after),
  )
  ungrouped = lambda y: tiles.gather(y)[: rule.B * rule.H].reshape(rule.B, rule.H, *y.shape[1:-1], -1)  # noqa: E731
  dz, dtaps = ungrouped(dz), ungrouped(dtaps)  # [B, H, BEFORE, X]; of z / 2 at the first tokens, of taps / 2
  # Entry j of the context meets tap i at token j - i.
  dcontext = [sum(0.5 * taps[i] * dz[:, :, j - i] for i in range(j + 1)) for j in range(c - 1)]
  da, db = rule.ungates(da), rule.ungates(db)
  dA = jnp.sum(dA, 2).reshape(-1)[: rule.B * rule.H].reshape(rule.B, rule.H)
  return (
    jnp.moveaxis(tiles.gather(dx)[: rule.B * rule.H, : rule.T].reshape(rule.B, rule.H, rule.T, -1), 1, 2),
    jnp.moveaxis(0.5 * jnp.sum(dtaps, 0)[:, :c], 0, 1),
    jnp.stack(dcontext, 1).astype(context.dtype),
    da,
    db,
    jnp.sum(dA, 0),
    jnp.sum(da, (0, 1)),
    rule.unstate(dS),
  )


def _backward_kernel(
  x_ref, previous_ref, taps_ref, context_ref, a_ref, b_ref, heads_ref, inverse_ref, chunk_S_ref, do_ref,
  S_after_ref, dS_after_ref, dx_ref, first_ref, dtaps_ref, da_ref, db_ref, dA_ref, dS_ref,
  inner_ref, window_ref, slope_ref, dz_ref, q_ref, k_ref, v_ref, *, tiles,
):  # fmt: skip
  """One chunk of r heads, the last chunk first. dS and the first rows of dz stay in VMEM."""
  (r, C, _), c, K, V = x_ref.shape, tiles.c, tiles.rule.Kp, tiles.rule.Vp
  blocks = range(tiles.X // LANES)
  refs = pallas_tpu_backward.Chunk(q_ref, k_ref, v_ref, inverse_ref, chunk_S_ref, do_ref, dS_ref, inner_ref)
  pallas_tpu_backward.start(refs, S_after_ref, dS_after_ref)

  @pl.when(pl.program_id(1) == 0)
  def _():
    dz_ref[:, :, C:] = jnp.zeros((r, len(blocks), BEFORE, LANES), jnp.float32)
    dtaps_ref[...] = jnp.zeros(dtaps_ref.shape, jnp.float32)
    dA_ref[...] = jnp.zeros(dA_ref.shape, jnp.float32)

  row, col = parts.grid_of(C)
  rate = heads_ref[0, 0]
  g, b, soft, soft_slope = conv.open_gates(a_ref[0, 0], b_ref[0, 0], rate, heads_ref[0, 1])
  gates = parts.gates(g, b)
  before = ConvRefs(x_ref, taps_ref, window_ref, q_ref, k_ref, v_ref, slope_ref)
  is_first = pl.program_id(1) == pl.num_programs(1) - 1
  for h in range(r):
    for block in blocks:
      at = conv.lanes(block)
      previous = previous_ref[h, PREVIOUS - BEFORE :, at].astype(jnp.float32)
      window_ref[h, block, :BEFORE] = jnp.where(is_first, context_ref[h, :, at], previous)
    for name in ("k", "q", "v"):
      conv.forward(h, name, before, tiles)

  def give(name, h, gradient):
    own = conv.blocks_of(name, K, V)
    if name != "v":  # what is along q or k does not pass the norm
      unit = getattr(refs, name)[h].astype(jnp.float32)
      along = jnp.sum(unit * gradient, 1, keepdims=True) * (tiles.rule.K if name == "q" else 1)
      gradient = gradient - along * unit
    for block in own:
      at = conv.lanes(block)
      dz = slope_ref[h, block] * gradient[:, conv.lanes(block - own.start)]
      dz_ref[h, block, :C] = dz
      products = (taps_ref[h, i : i + 1, at] * dz_ref[h, block, c - 1 - i : c - 1 - i + C] for i in range(c))
      dx = functools.reduce(jnp.add, products)
      dx_ref[h, :, at] = dx.astype(dx_ref.dtype)
      for i in range(c):
        start = BEFORE - c + 1 + i
        dtap = jnp.sum(dz * window_ref[h, block, start : start + C], 0, keepdims=True)
        dtaps_ref[h, i : i + 1, at] += dtap
      dz_ref[h, block, C:] = dz_ref[h, block, :BEFORE]
      first_ref[h, :, at] = dz_ref[h, block, :BEFORE]

  dg, db = pallas_tpu_backward.backward_chunk(refs, gates, row, col, give)
  da_ref[0, 0] = dg * rate * soft_slope
  db_ref[0, 0] = db * b * (1 - b)
  dA_ref[0] += dg * rate * soft
