"""The way back of the gated delta rule on TPUs: one kernel that walks the chunks in reverse."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.gated_delta import pallas_tpu_parts as parts
from kernels.gated_delta.pallas_tpu_parts import Cut, dot


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
  r, C, _ = q_ref.shape

  def inner(x, y):
    return jnp.broadcast_to(jnp.sum(jnp.sum(x * y, 0, keepdims=True), 1, keepdims=True), (1, C))

  @pl.when(pl.program_id(1) == 0)
  def _():
    dS_ref[...] = dS_after_ref[...]
    for h in range(r):
      end_ref[h : h + 1] = inner(S_after_ref[h], dS_after_ref[h])

  dtype = q_ref.dtype
  row, col = parts.grid_of(C)
  gates = parts.gates(g_ref[0, 0], b_ref[0, 0])
  dG, db = [None] * r, [None] * r  # columns

  def head(h):
    b, kept_b, since, until = (gates.column(name, h) for name in ("b", "kept_b", "since", "until"))
    S, do = met_ref[h, 0], do_ref[h]
    seen = dot(k_ref[h], S)
    scores = dot(q_ref[h], k_ref[h], "nt")
    yield
    R = (b * (v_ref[h].astype(jnp.float32) - since * seen)).astype(dtype)
    decay = gates.decay(h, row, col)
    U = dot(inverse_ref[h], R)
    dU = dot((decay * scores).astype(dtype), do, "tn")
    dU = dU + until * dot(k_ref[h], dS_ref[h].astype(dtype))
    yield
    wrote = jnp.where(kept_b == 0, 0.0, U).astype(dtype)
    dU = dot(inverse_ref[h], dU.astype(dtype), "tn")
    yield
    dv = kept_b * dU
    dv_ref[h] = dv.astype(dv_ref.dtype)
    v_dv = jnp.sum(v_ref[h].astype(jnp.float32) * dv, 1, keepdims=True)
    db[h] = jnp.sum(dU * U, 1, keepdims=True) / b
    Y = jnp.concatenate([do, (-dv).astype(dtype)], 0)
    products = dot(Y, wrote, "nt")
    yield
    M = [decay * products[:C], jnp.where(row > col, decay * products[C:], 0.0)]
    M = jnp.concatenate(M, 0).astype(dtype)
    since_twice = jnp.concatenate([since, since], 0)
    dreads = since_twice * dot(Y, S, "nt")
    yield
    dreads = dreads + dot(M, k_ref[h])
    yield
    dq = dreads[:C]
    dq_ref[h] = dq.astype(dq_ref.dtype)
    dG[h] = jnp.sum(q_ref[h].astype(jnp.float32) * dq, 1, keepdims=True) - v_dv
    reads = jnp.concatenate([q_ref[h], k_ref[h]], 0)
    dk = dreads[C:] + dot(M, reads, "tn")
    dk = dk + until * dot(wrote, dS_ref[h].astype(dtype), "nt")
    dk_ref[h] = dk.astype(dk_ref.dtype)
    yield
    reads = (since_twice * reads.astype(jnp.float32)).astype(dtype)
    dS = gates.whole[h : h + 1] * dS_ref[h] + dot(reads, Y, "tn")
    dS_ref[h] = dS
    dg_ref[0, 0, h : h + 1] = end_ref[h : h + 1]
    end_ref[h : h + 1] = inner(met_ref[h, 0].astype(jnp.float32), dS)

  parts.in_step([head(h) for h in range(r)])
  rows = jnp.concatenate(dG + db, 1).T
  dg_ref[0, 0] += dot(rows[:r], (row >= col).astype(jnp.float32))
  db_ref[0, 0] = rows[r:]
