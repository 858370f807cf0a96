"""Convolution, gates and the gated delta rule in one Mosaic kernel a direction. See kernels/README.md."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sleep_jax.kernels.conv_gated_delta import pallas_tpu_fused_backward
from sleep_jax.kernels.conv_gated_delta import pallas_tpu_fused_parts as conv
from sleep_jax.kernels.conv_gated_delta.pallas_tpu_fused_parts import BEFORE, LANES, ConvRefs, Tiles
from sleep_jax.kernels.gated_delta import pallas_tpu
from sleep_jax.kernels.gated_delta import pallas_tpu_parts as parts


def conv_gated_delta(
  x: jax.Array,
  taps: jax.Array,
  context: jax.Array,
  a: jax.Array,
  b: jax.Array,
  A_log: jax.Array,
  dt_bias: jax.Array,
  S: jax.Array,
  *,
  interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
  """Computes what `reference.conv_gated_delta` does, up to rounding, and its gradients.

  Convolution, SiLU, norms and gates are float32. Operands of the products are in x's dtype, bfloat16 or
  float32 at full precision; sums, decays and S are float32. Only reverse mode, once. The names under
  `jax.checkpoint` are those of `kernels.gated_delta.pallas_tpu`.

  Args:
    x, taps, context, a, b, A_log, dt_bias, S: as in `api.conv_gated_delta`, up to 8 taps.
    interpret: run on a CPU, for tests.

  Returns:
    o [B, T, H, V] in x's dtype, S after the last token.

  Raises:
    NotImplementedError: a dtype or width that the kernels do not take.
  """
  tiles = conv.make_tiles(x, taps, S)
  return _rule(x, taps, context, a, b, A_log, dt_bias, S, tiles, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def _rule(x, taps, context, a, b, A_log, dt_bias, S, tiles: Tiles, interpret):
  return _forward(x, taps, context, a, b, A_log, dt_bias, S, tiles=tiles, interpret=interpret, keep=False)[:2]


def _rule_fwd(x, taps, context, a, b, A_log, dt_bias, S, tiles: Tiles, interpret):
  inputs = (x, taps, context, a, b, A_log, dt_bias)
  o, S_after, inverse, chunk_S = _forward(*inputs, S, tiles=tiles, interpret=interpret, keep=True)
  inverse = checkpoint_name(inverse, "fast_weight_inverse")
  chunk_S = checkpoint_name(chunk_S, "fast_weight_chunk_S")
  o, S_after = checkpoint_name(o, "fast_weight_o"), checkpoint_name(S_after, "fast_weight_S")
  return (o, S_after), (*inputs, S_after, inverse, chunk_S)


def _rule_bwd(tiles: Tiles, interpret, kept, cotangents):
  return pallas_tpu_fused_backward.backward(*kept, *cotangents, tiles=tiles, interpret=interpret)


_rule.defvjp(_rule_fwd, _rule_bwd)


@functools.partial(jax.jit, static_argnames=("tiles", "interpret", "keep"))
def _forward(x, taps, context, a, b, A_log, dt_bias, S, *, tiles: Tiles, interpret, keep: bool):
  """o and S after; with `keep` also the inverses [R, T', C] and the S before each chunk [R, n, K', V']."""
  rule = tiles.rule
  r, n, C, K, V, X = rule.r, rule.n, rule.C, rule.Kp, rule.Vp, tiles.X
  R = rule.groups * r
  tokens = lambda width: pl.BlockSpec((r, C, width), lambda i, j: (i, j, 0))  # noqa: E731
  few = pl.BlockSpec((r, BEFORE, X), lambda i, j: (i, 0, 0))
  gate = pl.BlockSpec((1, 1, r, C), lambda i, j: (i, j, 0, 0))
  heads = pl.BlockSpec((1, 2, r, C), lambda i, j: (i, 0, 0, 0))
  state = pl.BlockSpec((r, K, V), lambda i, j: (i, 0, 0))
  out_specs = [tokens(V), state]
  out_shape = [
    jax.ShapeDtypeStruct((R, n * C, V), rule.dtype),
    jax.ShapeDtypeStruct((R, K, V), jnp.float32),
  ]
  if keep:
    out_specs += [tokens(C), pl.BlockSpec((r, 1, K, V), lambda i, j: (i, j, 0, 0))]
    out_shape += [
      jax.ShapeDtypeStruct((R, n * C, C), rule.dtype),
      jax.ShapeDtypeStruct((R, n, K, V), rule.dtype),
    ]
  outputs = pl.pallas_call(
    functools.partial(_forward_kernel, tiles=tiles),
    grid=(rule.groups, n),
    in_specs=[tokens(X), few, few, gate, gate, heads, state],
    out_specs=out_specs,
    out_shape=out_shape,
    scratch_shapes=[
      pltpu.VMEM((r, X // LANES, BEFORE + C, LANES), jnp.float32),
      pltpu.VMEM((r, C, K), rule.dtype),
      pltpu.VMEM((r, C, K), rule.dtype),
      pltpu.VMEM((r, C, V), rule.dtype),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=parts.VMEM_BYTES
    ),
    interpret=interpret,
    name="conv_gated_delta_forward",
  )(
    tiles.x(x),
    tiles.taps(taps),
    tiles.context(context),
    tiles.closed(a),
    tiles.closed(b),
    tiles.heads(-jnp.exp(A_log), dt_bias),
    rule.state(S),
  )
  return (rule.unrows(outputs[0], rule.V), rule.unstate(outputs[1]), *outputs[2:])


def _forward_kernel(
  x_ref, taps_ref, context_ref, a_ref, b_ref, heads_ref, S_in_ref, o_ref, S_ref, *others, tiles
):
  """One chunk of r heads. S, and the rows of x that the next convolution needs, stay in VMEM."""
  *kept, window_ref, q_ref, k_ref, v_ref = others
  r, C, _ = x_ref.shape
  blocks = range(tiles.X // LANES)

  @pl.when(pl.program_id(1) == 0)
  def _():
    S_ref[...] = S_in_ref[...]
    for block in blocks:
      window_ref[:, block, :BEFORE] = context_ref[:, :, conv.lanes(block)]

  row, col = parts.grid_of(C)
  g, b, _soft, _slope = conv.open_gates(a_ref[0, 0], b_ref[0, 0], heads_ref[0, 0], heads_ref[0, 1])
  gates = parts.gates(g, b)
  before = ConvRefs(x_ref, taps_ref, window_ref, q_ref, k_ref, v_ref, None)
  refs = pallas_tpu.Chunk(q_ref, k_ref, v_ref, S_ref, o_ref, tuple(kept))

  def head(h):
    for name in ("k", "q", "v"):
      conv.forward(h, name, before, tiles)
    for block in blocks:
      window_ref[h, block, :BEFORE] = window_ref[h, block, C:]
    yield from pallas_tpu.head(h, refs, gates, row, col)

  parts.in_step([head(h) for h in range(r)])
