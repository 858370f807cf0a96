"""The gated delta rule as Mosaic kernels for TPUs: `gated_delta`. kernels/README.md says how they work."""

import functools
from collections.abc import Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sleep_jax.kernels.gated_delta import pallas_tpu_backward
from sleep_jax.kernels.gated_delta import pallas_tpu_parts as parts
from sleep_jax.kernels.gated_delta.pallas_tpu_parts import Tiles, dot

Ref = Any  # a reference to an array in VMEM


def gated_delta(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g: jax.Array,
  b: jax.Array,
  S: jax.Array,
  *,
  interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
  """Computes what `reference.gated_delta` does, up to rounding, and its gradients.

  Operands of the products are bfloat16 if q, k and v all are, else float32 at full precision; sums, decays
  and S are float32. Only reverse mode, once. Under `jax.checkpoint` the residuals are named
  "fast_weight_inverse" (C numbers a token and head) and "fast_weight_chunk_S" (K V numbers a chunk and head),
  the outputs "fast_weight_o" and "fast_weight_S".

  Args:
    q, k: [B, T, H, K], bfloat16 or float32. v: [B, T, H, V], likewise. g, b: [B, T, H], float32.
    S: [B, H, K, V], float32.
    interpret: run on a CPU, for tests.

  Returns:
    o [B, T, H, V] in v's dtype, S after the last token.

  Raises:
    NotImplementedError: a dtype or width that the kernels do not take.
  """
  return _rule(q, k, v, g, b, S, parts.make_tiles(q, k, v, g, b, S), interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _rule(q, k, v, g, b, S, tiles: Tiles, interpret):
  return _forward(q, k, v, g, b, S, tiles=tiles, interpret=interpret, keep=False)[:2]


def _rule_fwd(q, k, v, g, b, S, tiles: Tiles, interpret):
  o, S_after, inverse, chunk_S = _forward(q, k, v, g, b, S, tiles=tiles, interpret=interpret, keep=True)
  inverse = checkpoint_name(inverse, "fast_weight_inverse")
  chunk_S = checkpoint_name(chunk_S, "fast_weight_chunk_S")
  o, S_after = checkpoint_name(o, "fast_weight_o"), checkpoint_name(S_after, "fast_weight_S")
  return (o, S_after), (q, k, v, g, b, S_after, inverse, chunk_S)


def _rule_bwd(tiles: Tiles, interpret, kept, cotangents):
  return pallas_tpu_backward.backward(*kept, *cotangents, tiles=tiles, interpret=interpret)


_rule.defvjp(_rule_fwd, _rule_bwd)


@functools.partial(jax.jit, static_argnames=("tiles", "interpret", "keep"))
def _forward(q, k, v, g, b, S, *, tiles: Tiles, interpret, keep: bool):
  """o and S after; with `keep` also the inverses [R, T', C] and the S before each chunk [R, n, K', V']."""
  r, n, C, K, V = tiles.r, tiles.n, tiles.C, tiles.Kp, tiles.Vp
  R = tiles.groups * r
  tokens = lambda width: pl.BlockSpec((r, C, width), lambda i, j: (i, j, 0))  # noqa: E731
  gate = pl.BlockSpec((1, 1, r, C), lambda i, j: (i, j, 0, 0))
  state = pl.BlockSpec((r, K, V), lambda i, j: (i, 0, 0))
  out_specs = [tokens(V), state]
  out_shape = [
    jax.ShapeDtypeStruct((R, n * C, V), v.dtype),
    jax.ShapeDtypeStruct((R, K, V), jnp.float32),
  ]
  if keep:
    out_specs += [tokens(C), pl.BlockSpec((r, 1, K, V), lambda i, j: (i, j, 0, 0))]
    out_shape += [
      jax.ShapeDtypeStruct((R, n * C, C), tiles.dtype),
      jax.ShapeDtypeStruct((R, n, K, V), tiles.dtype),
    ]
  outputs = pl.pallas_call(
    _forward_kernel,
    grid=(tiles.groups, n),
    in_specs=[tokens(K), tokens(K), tokens(V), gate, gate, state],
    out_specs=out_specs,
    out_shape=out_shape,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=parts.VMEM_BYTES
    ),
    interpret=interpret,
    name="gated_delta_forward",
  )(tiles.rows(q, K), tiles.rows(k, K), tiles.rows(v, V), tiles.gates(g), tiles.gates(b), tiles.state(S))
  return (tiles.unrows(outputs[0], tiles.V), tiles.unstate(outputs[1]), *outputs[2:])


def _forward_kernel(q_ref, k_ref, v_ref, g_ref, b_ref, S_in_ref, o_ref, S_ref, *kept_refs):
  """One chunk of r heads. S stays in VMEM from chunk to chunk: its output block does not move with them."""

  @pl.when(pl.program_id(1) == 0)
  def _():
    S_ref[...] = S_in_ref[...]

  row, col = parts.grid_of(q_ref.shape[1])
  gates = parts.gates(g_ref[0, 0], b_ref[0, 0])
  refs = Chunk(q_ref, k_ref, v_ref, S_ref, o_ref, kept_refs)
  parts.in_step([head(h, refs, gates, row, col) for h in range(q_ref.shape[0])])


class Chunk(NamedTuple):
  """Where one chunk of r heads lies in VMEM. S is read and overwritten, o and what is kept are written."""

  q: Ref  # [r, C, K], as k
  k: Ref
  v: Ref  # [r, C, V], as o
  S: Ref  # [r, K, V]
  o: Ref
  kept: tuple[Ref, ...]  # the inverse [r, C, C] and the S before it [r, 1, K, V], or nothing


def head(h: int, refs: Chunk, gates: parts.Gates, row: jax.Array, col: jax.Array) -> Generator:
  """The chunk of head h: a task for `parts.in_step`."""
  dtype, C = refs.q.dtype, refs.q.shape[1]
  reads, S = jnp.concatenate([refs.q[h], refs.k[h]], 0), refs.S[h]
  b, decay_in = gates.column("b", h), gates.column("decay_in", h)
  kT = refs.k[h].T
  scores = dot(reads, kT)
  yield
  decay = gates.decay(h, row, col)
  A = jnp.where(row > col, b * decay * scores[C:], 0.0)
  writes = (kT.astype(jnp.float32) * gates.decay_out_row[h : h + 1]).astype(dtype)
  uses = jnp.concatenate(
    [(decay * scores[:C] * gates.kept_row[h : h + 1]).astype(dtype), writes], 0
  )  # of U: for o and for S
  inverse = yield from parts.unit_lower_inverse(A, dtype)
  answers = dot(reads, S.astype(dtype))
  yield
  U = dot(inverse, (b * (refs.v[h].astype(jnp.float32) - decay_in * answers[C:])).astype(dtype))
  yield
  if refs.kept:
    inverse_ref, chunk_S_ref = refs.kept
    inverse_ref[h] = inverse
    chunk_S_ref[h, 0] = S.astype(dtype)
  used = dot(uses, U.astype(dtype))
  yield
  refs.o[h] = (decay_in * answers[:C] + used[:C]).astype(refs.o.dtype)
  refs.S[h] = gates.decay_all[h : h + 1] * S + used[C:]
