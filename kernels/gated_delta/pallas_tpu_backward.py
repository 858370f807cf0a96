"""The way back of the gated delta rule on TPUs: one kernel that walks the chunks in reverse."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sleep_jax.kernels.gated_delta import pallas_tpu_parts as parts
from sleep_jax.kernels.gated_delta.pallas_tpu_parts import Cut, dot

Ref = Any  # a reference to an array in VMEM


@functools.partial(jax.jit, static_argnames=("cut", "interpret"))
def backward(q, k, v, g, b, S_after, inverse, met, do, dS_after, *, cut: Cut, interpret):
  """Gradients of q, k, v, g, b and of the S on entry.

  Args:
    q, k, v, g, b: as given to the rule. S_after: what it returned.
    inverse: [R, T', C] and met: [R, n, K', V'], as the forward kernel kept them.
    do: [B, T, H, V]. dS_after: [B, H, K, V]. Cotangents.
  """
  r, n, C, K, V = cut.r, cut.n, cut.C, cut.Kp, cut.Vp
  R = cut.groups * r
  tokens = lambda width: pl.BlockSpec((r, C, width), lambda i, j: (i, n - 1 - j, 0))  # noqa: E731
  gate = pl.BlockSpec((1, 1, r, C), lambda i, j: (i, n - 1 - j, 0, 0))
  state = pl.BlockSpec((r, K, V), lambda i, j: (i, 0, 0))
  chunk_S = pl.BlockSpec((r, 1, K, V), lambda i, j: (i, n - 1 - j, 0, 0))
  shape = jax.ShapeDtypeStruct
  dq, dk, dv, dg, db, dS = pl.pallas_call(
    _backward_kernel,
    grid=(cut.groups, n),
    in_specs=[tokens(K), tokens(K), tokens(V), gate, gate, tokens(C), chunk_S, tokens(V), state, state],
    out_specs=[tokens(K), tokens(K), tokens(V), gate, gate, state],
    out_shape=[
      shape((R, n * C, K), q.dtype),
      shape((R, n * C, K), k.dtype),
      shape((R, n * C, V), v.dtype),
      shape((cut.groups, n, r, C), jnp.float32),
      shape((cut.groups, n, r, C), jnp.float32),
      shape((R, K, V), jnp.float32),
    ],
    scratch_shapes=[pltpu.VMEM((r, C), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=parts.VMEM_BYTES
    ),
    interpret=interpret,
    name="gated_delta_backward",
  )(
    cut.rows(q, K),
    cut.rows(k, K),
    cut.rows(v, V),
    cut.gates(g),
    cut.gates(b),
    inverse,
    met,
    cut.rows(do, V),
    cut.state(S_after),
    cut.state(dS_after),
  )
  return (
    cut.unrows(dq, cut.K),
    cut.unrows(dk, cut.K),
    cut.unrows(dv, cut.V),
    cut.ungates(dg),
    cut.ungates(db),
    cut.unstate(dS),
  )


def _backward_kernel(
  q_ref, k_ref, v_ref, g_ref, b_ref, inverse_ref, met_ref, do_ref, S_after_ref, dS_after_ref,
  dq_ref, dk_ref, dv_ref, dg_ref, db_ref, dS_ref, end_ref,
):  # fmt: skip
  """One chunk of r heads, the last chunk first. dS stays in VMEM; end = <S, dS> where the chunk ends."""
  refs = Chunk(q_ref, k_ref, v_ref, inverse_ref, met_ref, do_ref, dS_ref, end_ref)
  start(refs, S_after_ref, dS_after_ref)
  row, col = parts.grid_of(q_ref.shape[1])
  gates = parts.gates(g_ref[0, 0], b_ref[0, 0])
  outputs = {"q": dq_ref, "k": dk_ref, "v": dv_ref}

  def give(name, h, gradient):
    outputs[name][h] = gradient.astype(outputs[name].dtype)

  dg_ref[0, 0], db_ref[0, 0] = retreat(refs, gates, row, col, give)


class Chunk(NamedTuple):
  """Where one chunk of r heads lies in VMEM. dS and end are read and overwritten."""

  q: Ref  # [r, C, K], as k
  k: Ref
  v: Ref  # [r, C, V], as do
  inverse: Ref  # [r, C, C]
  met: Ref  # [r, 1, K, V]
  do: Ref
  dS: Ref  # [r, K, V] float32
  end: Ref  # [r, C] <S, dS> where the chunk ends, the same in every lane


def start(refs: Chunk, S_after_ref: Ref, dS_after_ref: Ref) -> None:
  """In the first step, that is the last chunk: dS is that of the S which the rule returned."""

  @pl.when(pl.program_id(1) == 0)
  def _():
    refs.dS[...] = dS_after_ref[...]
    for h in range(refs.dS.shape[0]):
      refs.end[h : h + 1] = _inner(S_after_ref[h], dS_after_ref[h], refs.end.shape[1])


def _inner(x: jax.Array, y: jax.Array, C: int) -> jax.Array:
  """<x, y> in [1, C]."""
  return jnp.broadcast_to(jnp.sum(jnp.sum(x * y, 0, keepdims=True), 1, keepdims=True), (1, C))


def retreat(
  refs: Chunk, gates: parts.Gates, row: jax.Array, col: jax.Array, give: Callable
) -> tuple[jax.Array, jax.Array]:
  """One chunk of all heads, in turns.

  Args:
    give: takes ("q", "k" or "v", head, gradient in float32) as soon as each is there.

  Returns:
    dg and db, [r, C].
  """
  dtype, (r, C, _) = refs.q.dtype, refs.q.shape
  dG, db, ends = [None] * r, [None] * r, [None] * r  # columns; ends are rows

  def head(h):
    b, kept_b, since, until = (gates.column(name, h) for name in ("b", "kept_b", "since", "until"))
    S, do = refs.met[h, 0], refs.do[h]
    seen = dot(refs.k[h], S)
    scores = dot(refs.q[h], refs.k[h], "nt")
    yield
    R = (b * (refs.v[h].astype(jnp.float32) - since * seen)).astype(dtype)
    decay = gates.decay(h, row, col)
    U = dot(refs.inverse[h], R)
    dU = dot((decay * scores).astype(dtype), do, "tn")
    dU = dU + until * dot(refs.k[h], refs.dS[h].astype(dtype))
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
    since_twice = jnp.concatenate([since, since], 0)
    dreads = since_twice * dot(Y, S, "nt")
    yield
    dreads = dreads + dot(M, refs.k[h])
    yield
    dq = dreads[:C]
    give("q", h, dq)
    dG[h] = jnp.sum(refs.q[h].astype(jnp.float32) * dq, 1, keepdims=True) - v_dv
    reads = jnp.concatenate([refs.q[h], refs.k[h]], 0)
    dk = dreads[C:] + dot(M, reads, "tn")
    dk = dk + until * dot(wrote, refs.dS[h].astype(dtype), "nt")
    give("k", h, dk)
    yield
    reads = (since_twice * reads.astype(jnp.float32)).astype(dtype)
    dS = gates.whole[h : h + 1] * refs.dS[h] + dot(reads, Y, "tn")
    refs.dS[h] = dS
    ends[h] = refs.end[h : h + 1]
    refs.end[h : h + 1] = _inner(refs.met[h, 0].astype(jnp.float32), dS, C)

  parts.in_step([head(h) for h in range(r)])
  rows = jnp.concatenate(dG + db, 1).T
  dg = jnp.concatenate(ends, 0) + dot(rows[:r], (row >= col).astype(jnp.float32))
  return dg, rows[r:]
