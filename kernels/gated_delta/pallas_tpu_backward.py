"""The way back of the gated delta rule on TPUs: one kernel that walks the chunks in reverse."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sleep_jax.kernels.gated_delta import pallas_tpu_parts as parts
from sleep_jax.kernels.gated_delta.pallas_tpu_parts import Tiles, dot

Ref = Any  # a reference to an array in VMEM


@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def backward(q, k, v, g, b, S_after, inverse, chunk_S, do, dS_after, *, tiles: Tiles, interpret):
  """Gradients of q, k, v, g, b and of the S on entry.

  Args:
    q, k, v, g, b: as given to the rule. S_after: what it returned.
    inverse: [R, T', C] and chunk_S: [R, n, K', V'], as the forward kernel kept them.
    do: [B, T, H, V]. dS_after: [B, H, K, V]. Cotangents.
  """
  r, n, C, K, V = tiles.r, tiles.n, tiles.C, tiles.Kp, tiles.Vp
  R = tiles.groups * r
  tokens = lambda width: pl.BlockSpec((r, C, width), lambda i, j: (i, n - 1 - j, 0))  # noqa: E731
  gate = pl.BlockSpec((1, 1, r, C), lambda i, j: (i, n - 1 - j, 0, 0))
  state = pl.BlockSpec((r, K, V), lambda i, j: (i, 0, 0))
  states = pl.BlockSpec((r, 1, K, V), lambda i, j: (i, n - 1 - j, 0, 0))
  shape = jax.ShapeDtypeStruct
  dq, dk, dv, dg, db, dS = pl.pallas_call(
    _backward_kernel,
    grid=(tiles.groups, n),
    in_specs=[tokens(K), tokens(K), tokens(V), gate, gate, tokens(C), states, tokens(V), state, state],
    out_specs=[tokens(K), tokens(K), tokens(V), gate, gate, state],
    out_shape=[
      shape((R, n * C, K), q.dtype),
      shape((R, n * C, K), k.dtype),
      shape((R, n * C, V), v.dtype),
      shape((tiles.groups, n, r, C), jnp.float32),
      shape((tiles.groups, n, r, C), jnp.float32),
      shape((R, K, V), jnp.float32),
    ],
    scratch_shapes=[pltpu.VMEM((r, C), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=parts.VMEM_BYTES
    ),
    interpret=interpret,
    name="gated_delta_backward",
  )(
    tiles.rows(q, K),
    tiles.rows(k, K),
    tiles.rows(v, V),
    tiles.gates(g),
    tiles.gates(b),
    inverse,
    chunk_S,
    tiles.rows(do, V),
    tiles.state(S_after),
    tiles.state(dS_after),
  )
  return (
    tiles.unrows(dq, tiles.K),
    tiles.unrows(dk, tiles.K),
    tiles.unrows(dv, tiles.V),
    tiles.ungates(dg),
    tiles.ungates(db),
    tiles.unstate(dS),
  )


def _backward_kernel(
  q_ref, k_ref, v_ref, g_ref, b_ref, inverse_ref, chunk_S_ref, do_ref, S_after_ref, dS_after_ref,
  dq_ref, dk_ref, dv_ref, dg_ref, db_ref, dS_ref, inner_ref,
):  # fmt: skip
  """One chunk of r heads, the last chunk first. dS stays in VMEM; inner = <S, dS> where the chunk ends."""
  refs = Chunk(q_ref, k_ref, v_ref, inverse_ref, chunk_S_ref, do_ref, dS_ref, inner_ref)
  start(refs, S_after_ref, dS_after_ref)
  row, col = parts.grid_of(q_ref.shape[1])
  gates = parts.gates(g_ref[0, 0], b_ref[0, 0])
  outputs = {"q": dq_ref, "k": dk_ref, "v": dv_ref}

  def give(name, h, gradient):
    outputs[name][h] = gradient.astype(outputs[name].dtype)

  dg_ref[0, 0], db_ref[0, 0] = backward_chunk(refs, gates, row, col, give)


class Chunk(NamedTuple):
  """Where one chunk of r heads lies in VMEM. dS and inner are read and overwritten."""

  q: Ref  # [r, C, K], as k
  k: Ref
  v: Ref  # [r, C, V], as do
  inverse: Ref  # [r, C, C]
  chunk_S: Ref  # [r, 1, K, V]
  do: Ref
  dS: Ref  # [r, K, V] float32
  inner: Ref  # [r, C] <S, dS> where the chunk ends, the same in every lane


def start(refs: Chunk, S_after_ref: Ref, dS_after_ref: Ref) -> None:
  """In the first step, that is the last chunk: dS is that of the S which the rule returned."""

  @pl.when(pl.program_id(1) == 0)
  def _():
    refs.dS[...] = dS_after_ref[...]
    for h in range(refs.dS.shape[0]):
      refs.inner[h : h + 1] = _inner(S_after_ref[h], dS_after_ref[h], refs.inner.shape[1])


def _inner(x: jax.Array, y: jax.Array, C: int) -> jax.Array:
  """<x, y> in [1, C]."""
  return jnp.broadcast_to(jnp.sum(jnp.sum(x * y, 0, keepdims=True), 1, keepdims=True), (1, C))


def backward_chunk(
  refs: Chunk, gates: parts.Gates, row: jax.Array, col: jax.Array, give: Callable
) -> tuple[jax.Array, jax.Array]:
  """One chunk of all heads, in turns.

  Args:
    give: takes ("q", "k" or "v", head, gradient in float32) as soon as each is there.

  Returns:
    dg and db, [r, C].
  """
  dtype, (r, C, _) = refs.q.dtype, refs.q.shape
  dG, db, inner_out = [None] * r, [None] * r, [None] * r  # columns; inner_out are rows

  def head(h):
    b, kept_b, decay_in, decay_out = (
      gates.column(name, h) for name in ("b", "kept_b", "decay_in", "decay_out")
    )
    S, do = refs.chunk_S[h, 0], refs.do[h]
    answers = dot(refs.k[h], S)
    scores = dot(refs.q[h], refs.k[h], "nt")
    yield
    R = (b * (refs.v[h].astype(jnp.float32) - decay_in * answers)).astype(dtype)
    decay = gates.decay(h, row, col)
    U = dot(refs.inverse[h], R)
    dU = dot((decay * scores).astype(dtype), do, "tn")
    dU = dU + decay_out * dot(refs.k[h], refs.dS[h].astype(dtype))
    yield
    wrote = jnp.where(kept_b == 0, 0.0, U).astype(dtype)
    dU = dot(refs.inverse[h], dU.astype(dtype), "tn")
    yield
    dv = kept_b * dU
    give("v", h, dv)
    v_dv = jnp.sum(refs.v[h].astype(jnp.float32) * dv, 1, keepdims=True)
    db[h] = jnp.sum(dU * U, 1, keepdims=True) / b
    Y = jnp.concatenate([do, (-dv).astype(dtype)], 0)
    products = dot(Y, wrote, "nt")
    yield
    M = [decay * products[:C], jnp.where(row > col, decay * products[C:], 0.0)]
    M = jnp.concatenate(M, 0).astype(dtype)
    decay_in_twice = jnp.concatenate([decay_in, decay_in], 0)
    dreads = decay_in_twice * dot(Y, S, "nt")
    yield
    dreads = dreads + dot(M, refs.k[h])
    yield
    dq = dreads[:C]
    give("q", h, dq)
    dG[h] = jnp.sum(refs.q[h].astype(jnp.float32) * dq, 1, keepdims=True) - v_dv
    reads = jnp.concatenate([refs.q[h], refs.k[h]], 0)
    dk = dreads[C:] + dot(M, reads, "tn")
    dk = dk + decay_out * dot(wrote, refs.dS[h].astype(dtype), "nt")
    give("k", h, dk)
    yield
    reads = (decay_in_twice * reads.astype(jnp.float32)).astype(dtype)
    dS = gates.decay_all[h : h + 1] * refs.dS[h] + dot(reads, Y, "tn")
    refs.dS[h] = dS
    inner_out[h] = refs.inner[h : h + 1]
    refs.inner[h : h + 1] = _inner(refs.chunk_S[h, 0].astype(jnp.float32), dS, C)

  parts.in_step([head(h) for h in range(r)])
  rows = jnp.concatenate(dG + db, 1).T
  dg = jnp.concatenate(inner_out, 0) + dot(rows[:r], (row >= col).astype(jnp.float32))
  return dg, rows[r:]
