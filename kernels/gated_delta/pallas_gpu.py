"""The gated delta rule on Hopper GPUs (Pallas Mosaic GPU: TMA and wgmma). Derivation: kernels/README.md.

Two kernels, chunks of 64 tokens. `_prepare` does in parallel what needs no S: the scores P of the queries and
the inverse T = (I + A b)^-1. `_walk` goes along the chunks with S in registers, on transposed tiles [V, C]
and [V, K]: S^T and what is made of it are then left operands of wgmma, which come from registers, so nothing
that depends on S passes through shared memory. The columns of V do not meet; each block takes 64 of them.
T gives the errors themselves, E = T (V - e^G K S), and U = b E.

Backward, `_walk` goes once more and keeps E and the S that each chunk met; `_retreat` walks the chunks in
reverse with the gradient of S in registers, on the same tiles. The rest is `pallas_gpu_gradients`, on XLA.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sleep_jax.kernels.gated_delta import pallas_gpu_gradients, xla

C = 64  # tokens of a chunk
WIDTHS = (64, 128)  # of q and k in the kernels; others are padded
FORGET, STEP = -1000.0, 16.0  # floor of g, and steps a unit of the coarse part of g (kernels/README.md)
TILE = 64  # columns of V in a block of the grid: the rows of one wgmma
COARSE, FINE, DECAY_IN, DECAY_OUT, WRITE, ROWS = 0, 1, 2, 3, 4, 8  # rows of the gates' array, padded to 8
F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16
ROW, COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def gated_delta(
  q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, b: jax.Array, S: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Computes what `reference.gated_delta` does, with products in bfloat16 and sums in float32.

  The gradient likewise; second derivatives are those of `xla`, in float32. The inverse is built in float16
  with float32 sums: keys are taken to have a length of about 1.

  Args:
    q, k: [B, T, H, K] bfloat16, K up to 128 (the kernels work on 64 or 128, others are padded).
    v: [B, T, H, V] bfloat16, V a multiple of 64.
    g, b: [B, T, H] float32. S: [B, H, K, V] float32.

  Returns:
    o [B, T, H, V] bfloat16 and S after the last token, float32.

  Raises:
    NotImplementedError: a shape or a dtype that the kernels have no tiles for.
  """
  K, V = S.shape[-2:]
  if jax.__version_info__ < (0, 12):  # plgpu.load had another signature
    raise NotImplementedError(f"gated_delta: pallas_gpu needs jax 0.12 or newer, this is {jax.__version__}")
  if K > WIDTHS[-1]:
    raise NotImplementedError(
      f"gated_delta: pallas_gpu needs K of at most {WIDTHS[-1]}, q has shape {q.shape}"
    )
  if V % TILE:
    raise NotImplementedError(
      f"gated_delta: pallas_gpu needs V in multiples of {TILE}, v has shape {v.shape}"
    )
  for name, x, dtype in (("q", q, BF16), ("k", k, BF16), ("v", v, BF16), ("S", S, F32)):
    if x.dtype != dtype:
      raise NotImplementedError(f"gated_delta: pallas_gpu needs {name} in {dtype.__name__}, it is {x.dtype}")
  return _rule(q, k, v, g, b, S)


@jax.custom_vjp
def _rule(q, k, v, g, b, S):
  return _forward(q, k, v, g, b, S)


def _rule_fwd(*inputs):
  return _rule(*inputs), inputs


def _rule_bwd(inputs, cotangents):
  return _pull(inputs, cotangents)


@jax.custom_jvp
def _pull(inputs, cotangents):
  return _backward(*inputs, *cotangents)


@_pull.defjvp
def _pull_jvp(primals, tangents):
  """Second derivatives, which no kernel has: those of XLA's backward pass."""

  def pull(inputs, cotangents):
    return jax.vjp(xla.gated_delta, *inputs)[1](cotangents)

  return _pull(*primals), jax.jvp(pull, primals, tangents)[1]


_rule.defvjp(_rule_fwd, _rule_bwd)


def _forward(q, k, v, g, b, S):
  K, n = q.shape[3], _chunks(q)
  q, k, S = _widened(q, k, S)
  q, k, gates = _rows(q), _rows(k), _gates(g, b)
  S_after, o = _walk(q, k, _columns(_rows(v), n), *_prepare(q, k, gates), gates, _flat(S).mT)
  return _unrows(_columns(o, n), v), S_after.mT.reshape(S.shape)[:, :, :K]


def _backward(q, k, v, g, b, S, do, dS):
  K, n, given = q.shape[3], _chunks(q), (q, k, v, g, b)
  q, k, S = _widened(q, k, S)
  dS = _padded(dS, 2, S.shape[2])
  q, k, gates = _rows(q), _rows(k), _gates(g, b)
  v, do = (_columns(_rows(x.astype(BF16)), n) for x in (v, do))
  P, inverse = _prepare(q, k, gates)
  S_after, E, chunk_S = _walk(q, k, v, P, inverse, gates, _flat(S).mT, keep=True)
  dv, dS_before, dS_after = _retreat(q, k, do, P, inverse, gates, _flat(dS).mT)

  chunked = lambda x: x.reshape(x.shape[0], n, -1, x.shape[-1])  # noqa: E731
  chunk_S, dS_chunks = chunked(chunk_S), chunked(dS_after)
  left = jnp.concatenate([chunk_S[:, 1:].astype(F32), S_after[:, None]], 1)
  end = jnp.sum(left * dS_chunks.astype(F32), (-2, -1))
  rows = chunked(gates)
  between = rows[..., (COARSE, FINE), :, None] - rows[..., (COARSE, FINE), None, :]
  decay = jnp.exp(jnp.where(jnp.tri(C, dtype=bool), between.sum(-3), -jnp.inf))
  factors = pallas_gpu_gradients.Gates(decay, *(rows[..., row, :] for row in (DECAY_IN, DECAY_OUT, WRITE)))
  dq, dk, dg, db = pallas_gpu_gradients.gradients(
    chunked(q), chunked(k), factors, chunked(do), chunked(dv), chunked(E), chunk_S, dS_chunks, end
  )
  found = [x.reshape(x.shape[0], n * C, -1) for x in (dq[..., :K], dk[..., :K])]
  found += [_columns(dv, n), *(x.reshape(x.shape[0], n * C, 1) for x in (dg, db))]
  found = [_unrows(x, y) for x, y in zip(found, given, strict=True)]
  return *found, dS_before.mT.reshape(S.shape)[:, :, :K]


def _widened(q: jax.Array, k: jax.Array, S: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """K padded to one of WIDTHS. A key with zeros there reads and writes nothing in the rows of S added."""
  width = min(width for width in WIDTHS if width >= S.shape[2])
  return _padded(q, 3, width), _padded(k, 3, width), _padded(S, 2, width)


def _padded(x: jax.Array, axis: int, size: int) -> jax.Array:
  return jnp.pad(x, [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])


def _chunks(x: jax.Array) -> int:
  return -(-x.shape[1] // C)


def _flat(x):
  return x.reshape(-1, *x.shape[2:])


def _rows(x: jax.Array) -> jax.Array:
  """[B, T, H, X] -> [B H, n C, X], padded with zeros: no write, no decay."""
  x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % C), (0, 0), (0, 0)])
  return _flat(jnp.moveaxis(x, 2, 1))


def _unrows(x: jax.Array, like: jax.Array) -> jax.Array:
  """[B H, n C, X] -> [B, T, H, X] or [B, T, H], in the dtype of the array it belongs to."""
  x = jnp.moveaxis(x.reshape(like.shape[0], -1, *x.shape[1:]), 1, 2)[:, : like.shape[1]]
  return x.reshape(like.shape).astype(like.dtype)


def _columns(x: jax.Array, n: int) -> jax.Array:
  """Turns each chunk: [B H, n C, V] -> [B H, n V, C], or back."""
  return x.reshape(x.shape[0], n, -1, x.shape[-1]).mT.reshape(x.shape[0], -1, x.shape[1] // n)


def _gates(g: jax.Array, b: jax.Array) -> jax.Array:
  """The rows COARSE..WRITE of each chunk, [B H, n ROWS, C]: summed log decays, what is left of S, b."""
  g, b = (_rows(x[..., None])[..., 0] for x in (g, b))
  g, b = (x.astype(F32).reshape(x.shape[0], -1, C) for x in (g, b))
  g = jnp.maximum(g, FORGET)
  coarse = jnp.round(g * STEP) / STEP  # whole sixteenths: their sums are exact (kernels/README.md)
  coarse, fine = jnp.cumsum(coarse, -1), jnp.cumsum(g - coarse, -1)
  decay_out = jnp.exp((coarse[..., -1:] - coarse) + (fine[..., -1:] - fine))
  rows = jnp.stack([coarse, fine, jnp.exp(coarse + fine), decay_out, b], -2)
  rows = jnp.pad(rows, [(0, 0), (0, 0), (0, ROWS - rows.shape[-2]), (0, 0)])
  return rows.reshape(rows.shape[0], -1, C)


# The kernels. Register tiles have wgmma's layout; tiles that wgmma reads from shared memory are swizzled.
LANE = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def _smem(shape, dtype):
  return plgpu.SMEM(shape, dtype, transforms=SWIZZLED)


def _multiply(acc, a, b):
  """One wgmma; of its own so that a test can send `a` by shared memory, the interpreter's only way."""
  plgpu.wgmma(acc, a, b)


def _product(*pairs):
  """The sum of the products a @ b; b lies in shared memory, a there or in registers."""

  def run(acc):
    for a, b in pairs:
      _multiply(acc, a, b)
    return acc[...]

  (a, b), *_ = pairs
  return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1]), F32))  # pyright: ignore[reportPrivateImportUsage]


def _gate(gates, row: int, layout):
  return plgpu.load(gates.at[row], layout=layout)  # pyright: ignore[reportCallIssue]  # jax 0.12's


def _spread(x, shape, dim: int):
  return jax.lax.broadcast_in_dim(x, shape, (dim,))


def _prepare(q: jax.Array, k: jax.Array, gates: jax.Array) -> tuple[jax.Array, jax.Array]:
  """P = D (Q K^T) and (I + A b)^-1 of each chunk, both [B H, n C, C] bfloat16; one block of the grid each."""
  R, T, K = q.shape

  def prepare(q_ref, k_ref, gates_ref, P_ref, inverse_ref, q, k, gates, A, X, P, inverse, arrived):
    r, c = jax.lax.axis_index("row"), jax.lax.axis_index("chunk")
    rows = pl.ds(c * C, C)
    plgpu.copy_gmem_to_smem(q_ref.at[r, rows], q, arrived)
    plgpu.copy_gmem_to_smem(k_ref.at[r, rows], k, arrived)
    plgpu.copy_gmem_to_smem(gates_ref.at[r, pl.ds(c * ROWS, ROWS)], gates, arrived)
    plgpu.barrier_wait(arrived)
    square = (C, C)
    i, j = (plgpu.broadcasted_iota(jnp.int32, square, d, layout=plgpu.Layout.WGMMA) for d in (0, 1))
    coarse, fine = (
      _spread(_gate(gates, row, ROW), square, 0) - _spread(_gate(gates, row, COLUMN), square, 1)
      for row in (COARSE, FINE)
    )
    decay = jnp.exp(jnp.where(i >= j, coarse + fine, -jnp.inf))
    P[...] = (decay * _product((q, k.T))).astype(BF16)
    below = decay * _product((k, k.T)) * _spread(_gate(gates, WRITE, COLUMN), square, 1)
    below = jnp.where(i > j, below, 0.0)
    A[...] = below.astype(F16)
    inverse[...] = _ladder(below, i, j, A, X).astype(BF16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(P, P_ref.at[r, rows])
    plgpu.copy_smem_to_gmem(inverse, inverse_ref.at[r, rows])
    plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
    prepare,
    out_type=[jax.ShapeDtypeStruct((R, T, C), BF16)] * 2,
    grid=(T // C, R),
    grid_names=("chunk", "row"),
    compiler_params=LANE,
    scratch_types=[
      _smem((C, K), BF16),
      _smem((C, K), BF16),
      plgpu.SMEM((ROWS, C), F32),
      _smem((C, C), F16),
      _smem((C, C), F16),
      _smem((C, C), BF16),
      _smem((C, C), BF16),
      plgpu.Barrier(num_arrivals=3),
    ],
  )(q, k, gates)


def _ladder(below, i, j, A, X_smem):
  """(I + below)^-1 from diagonal blocks of 1, 2, 4, ... 32: X <- X - X L X, L the blocks that a level adds.

  `A` holds `below` already; X_smem is scratch. As X has blocks on the diagonal only, X L is the part of X A
  that lies where L does: L itself is never made.
  """

  def adds(m):  # the lower left m x m block of each diagonal block of 2 m
    return (i // (2 * m) == j // (2 * m)) & (i // m > j // m)

  X = jnp.where(i == j, 1.0, jnp.where(adds(1), -below, 0.0))
  m = 2
  while m < C:
    half = X.astype(F16)
    X_smem[...] = half
    plgpu.commit_smem()
    XL = jnp.where(adds(m), _product((half, A)), 0.0)
    X = X - _product((XL.astype(F16), X_smem))
    m *= 2
  return X


def _walk(q, k, v, P, inverse, gates, S, *, keep: bool = False):
  """Along the chunks. v [B H, n V, C] and S [B H, V, K] are turned, and so are the results.

  Returns:
    S [B H, V, K] float32 after the last chunk, and o [B H, n V, C] bfloat16; with `keep` in place of o the
    errors E [B H, n V, C] and the S that each chunk met [B H, n V, K], bfloat16.
  """

  def step(v, k, inverse, *more):
    *asked, gates, S, leave = more
    decay_in, decay_out, b = (_gate(gates, row, COLUMN) for row in (DECAY_IN, DECAY_OUT, WRITE))
    S16 = S.astype(BF16)
    X = v[...].astype(F32) - _spread(decay_in, (TILE, C), 1) * _product((S16, k.T))
    E = _product((X.astype(BF16), inverse.T))
    U = E * _spread(b, (TILE, C), 1)
    if keep:
      leave(E, S16)
    else:
      q, P = asked
      seen = _product((S16, q.T)) * _spread(decay_in, (TILE, C), 1)
      leave(seen + _product((U.astype(BF16), P.T)))
    kept = (U * _spread(decay_out, (TILE, C), 1)).astype(BF16)
    return S * gates[DECAY_IN, C - 1] + _product((kept, k))

  if keep:
    return _along("walk_keep", step, v, (k, inverse), gates, S, (C, q.shape[2]))
  return _along("walk", step, v, (k, inverse, q, P), gates, S, (C,))


def _retreat(q, k, do, P, inverse, gates, dS):
  """Back along the chunks. do [B H, n V, C] and dS [B H, V, K], of S after the last chunk, are turned.

  Returns:
    dv [B H, n V, C] bfloat16, dS [B H, V, K] float32 before the first chunk, and the gradients of the S that
    each chunk left [B H, n V, K] bfloat16.
  """

  def step(do, q, k, P, inverse, gates, dS, leave):
    decay_in, decay_out, b = (_gate(gates, row, COLUMN) for row in (DECAY_IN, DECAY_OUT, WRITE))
    dS16 = dS.astype(BF16)
    dU = _product((do, P)) + _spread(decay_out, (TILE, C), 1) * _product((dS16, k.T))
    dv = _product(((dU * _spread(b, (TILE, C), 1)).astype(BF16), inverse))
    leave(dv, dS16)
    read = do[...].astype(F32) * _spread(decay_in, (TILE, C), 1)
    missed = -dv * _spread(decay_in, (TILE, C), 1)
    return dS * gates[DECAY_IN, C - 1] + _product((read.astype(BF16), q), (missed.astype(BF16), k))

  widths = (C, q.shape[2])
  whole = (q, k, P, inverse)
  dS_before, dv, dS_after = _along("retreat", step, do, whole, gates, dS, widths, reverse=True)
  return dv, dS_before, dS_after


def _along(name, step, turned, whole, gates, S, widths, *, reverse: bool = False):
  """One block of the grid for 64 columns of V: their S stays in registers from chunk to chunk.

  Args:
    name: of the kernel, in dumps and profiles.
    step: (turned, *whole, gates, S, leave) -> S after a chunk, from references to its tiles; it calls
      `leave` once, with tiles [TILE, width].
    turned: [R, n V, C], each block reads its rows. whole: arrays [R, n C, width], which all blocks read.
    S: [R, V, K] float32. widths: of what `step` leaves.

  Returns:
    S after the last chunk, and what was left, [R, n V, width] bfloat16 each.
  """
  R, V, _ = S.shape
  n, tiles = whole[0].shape[1] // C, V // TILE
  inputs = (turned, *whole, gates)

  def kernel(*refs):
    input_refs, (S_ref, S_after_ref), refs = _cut(refs, len(inputs), 2)
    left_refs, left, _ = _cut(refs, len(widths), len(widths))
    r, tile = jax.lax.axis_index("row"), jax.lax.axis_index("tile")
    columns = pl.ds(tile * TILE, TILE)

    def whole_at(i):
      return (n - 1 - i if reverse else i), 0

    def turned_at(i):
      return whole_at(i)[0] * tiles + tile, 0

    def body(indices, *tiles_and_S):
      def leave(*values):
        values = [x.astype(BF16) for x in values]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the copies of the chunk before
        for x, here in zip(values, left, strict=True):
          here[...] = x
        plgpu.commit_smem()
        for here, there in zip(left, left_refs, strict=True):
          plgpu.copy_smem_to_gmem(here, there.at[r, pl.ds(turned_at(indices[0])[0] * TILE, TILE)])

      return step(*tiles_and_S, leave)

    pipeline = plgpu.emit_pipeline(
      body,
      grid=(n,),
      in_specs=[
        plgpu.BlockSpec((TILE, C), turned_at, transforms=SWIZZLED),
        *(plgpu.BlockSpec((C, x.shape[2]), whole_at, transforms=SWIZZLED) for x in whole),
        plgpu.BlockSpec((ROWS, C), whole_at),
      ],
      max_concurrent_steps=min(2, n),
      init_carry=plgpu.load(  # pyright: ignore[reportCallIssue]  # jax 0.12's
        S_ref.at[r, columns], layout=plgpu.Layout.WGMMA, optimized=False
      ),
    )
    S_after_ref[r, columns] = pipeline(*(x.at[r] for x in input_refs))
    plgpu.wait_smem_to_gmem(0)

  kernel.__name__ = name
  return plgpu.kernel(
    kernel,
    out_type=[
      jax.ShapeDtypeStruct(S.shape, F32),
      *(jax.ShapeDtypeStruct((R, n * V, width), BF16) for width in widths),
    ],
    grid=(tiles, R),
    scratch_types=[_smem((TILE, width), BF16) for width in widths],
    grid_names=("tile", "row"),
    compiler_params=LANE,
  )(*inputs, S)


def _cut(items, *sizes):
  """The items in pieces of the given sizes, and the rest."""
  pieces = []
  for size in sizes:
    pieces.append(items[:size])
    items = items[size:]
  return *pieces, items
