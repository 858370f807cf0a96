"""The gated delta rule on Hopper GPUs (Pallas Mosaic GPU: TMA and wgmma). Derivation: kernels/README.md.

Two kernels, chunks of 64 tokens. `_prepare` does in parallel what needs no S: the scores P of the queries and
the inverse T = (I + A b)^-1. `_walk` goes along the chunks with S in registers, on transposed tiles [V, C]
and [V, K]: S^T and what is made of it are then left operands of wgmma, which come from registers, so nothing
that depends on S passes through shared memory. The columns of V do not meet; each block takes 64 of them.
T gives the errors themselves, E = T (V - e^G K S), and U = b E.

The gradient is that of `xla`: it recomputes from the inputs, in float32.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.gated_delta import xla

C = 64  # tokens of a chunk
WIDTHS = (64, 128)  # of q and k in the kernels; others are padded
FORGET, STEP = -1000.0, 16.0  # floor of g, and steps a unit of the coarse part of g (kernels/README.md)
TILE = 64  # columns of V in a block of the grid: the rows of one wgmma
COARSE, FINE, SINCE, UNTIL, WRITE, ROWS = 0, 1, 2, 3, 4, 8  # rows of the gates' array, padded to 8
F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16
ROW, COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def gated_delta(
  q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, b: jax.Array, S: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """What `reference.gated_delta` gives, with products in bfloat16 and sums in float32.

  The gradient runs on XLA. The inverse is built in float16 with float32 sums: keys are taken to have a length
  of about 1.

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
  _, pull = jax.vjp(xla.gated_delta, *inputs)  # its residuals are the inputs: the outputs are dead code
  return pull(cotangents)


_rule.defvjp(_rule_fwd, _rule_bwd)


def _forward(q, k, v, g, b, S):
  T, K = q.shape[1], q.shape[3]
  n = -(-T // C)
  q, k, S = _widened(q, k, S)
  q, k, gates = _rows(q), _rows(k), _gates(g, b)
  P, inverse = _prepare(q, k, gates)
  o, S_after = _walk(q, k, _columns(_rows(v), n), P, inverse, gates, _flat(S).mT)
  B, H = S.shape[:2]
  o = _unrows(_columns(o, n), B, T)
  return o, S_after.mT.reshape(S.shape)[:, :, :K]


def _widened(q: jax.Array, k: jax.Array, S: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """K padded to one of WIDTHS. A key with zeros there reads and writes nothing in the rows of S added."""
  more = min(width for width in WIDTHS if width >= S.shape[2]) - S.shape[2]
  q, k = (jnp.pad(x, [(0, 0)] * 3 + [(0, more)]) for x in (q, k))
  return q, k, jnp.pad(S, [(0, 0), (0, 0), (0, more), (0, 0)])


def _flat(x):
  return x.reshape(-1, *x.shape[2:])


def _rows(x: jax.Array) -> jax.Array:
  """[B, T, H, X] -> [B H, n C, X], padded with zeros: no write, no decay."""
  x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % C), (0, 0), (0, 0)])
  return _flat(jnp.moveaxis(x, 2, 1))


def _unrows(x: jax.Array, B: int, T: int) -> jax.Array:
  return jnp.moveaxis(x.reshape(B, -1, *x.shape[1:]), 1, 2)[:, :T]


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
  until = jnp.exp((coarse[..., -1:] - coarse) + (fine[..., -1:] - fine))
  rows = jnp.stack([coarse, fine, jnp.exp(coarse + fine), until, b], -2)
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
  return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1]), F32))


def _gate(gates, row: int, layout):
  return plgpu.load(gates.at[row], layout=layout)


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


def _walk(q, k, v, P, inverse, gates, S):
  """Along the chunks. v [B H, n V, C] and S [B H, V, K] are turned, and so are the results.

  Returns:
    o [B H, n V, C] bfloat16 and S [B H, V, K] float32 after the last chunk.
  """
  R, T, K = q.shape
  n, tiles = T // C, S.shape[1] // TILE

  def walk(q_ref, k_ref, v_ref, P_ref, inverse_ref, gates_ref, S_ref, o_ref, S_after_ref, o):
    r, tile = jax.lax.axis_index("row"), jax.lax.axis_index("tile")
    columns = pl.ds(tile * TILE, TILE)

    def body(indices, q, k, v, P, inverse, gates, S):
      since, until, b = (_gate(gates, row, COLUMN) for row in (SINCE, UNTIL, WRITE))
      S16 = S.astype(BF16)
      X = v[...].astype(F32) - _spread(since, (TILE, C), 1) * _product((S16, k.T))
      E = _product((X.astype(BF16), inverse.T))
      U = E * _spread(b, (TILE, C), 1)
      seen = _product((S16, q.T)) * _spread(since, (TILE, C), 1)
      out = (seen + _product((U.astype(BF16), P.T))).astype(BF16)
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the copy of the chunk before
      o[...] = out
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(o, o_ref.at[r, pl.ds((indices[0] * tiles + tile) * TILE, TILE)])
      kept = (U * _spread(until, (TILE, C), 1)).astype(BF16)
      return S * gates[SINCE, C - 1] + _product((kept, k))

    spec = lambda rows, width, index=lambda i: (i, 0): plgpu.BlockSpec(  # noqa: E731
      (rows, width), index, transforms=SWIZZLED
    )
    turned = lambda i: (i * tiles + tile, 0)  # noqa: E731
    tile_spec = spec(TILE, C, turned)
    pipeline = plgpu.emit_pipeline(
      body,
      grid=(n,),
      in_specs=[
        spec(C, K),
        spec(C, K),
        tile_spec,
        spec(C, C),
        spec(C, C),
        plgpu.BlockSpec((ROWS, C), lambda i: (i, 0)),
      ],
      max_concurrent_steps=min(2, n),
      init_carry=plgpu.load(S_ref.at[r, columns], layout=plgpu.Layout.WGMMA, optimized=False),
    )
    refs = (q_ref, k_ref, v_ref, P_ref, inverse_ref, gates_ref)
    S_after_ref[r, columns] = pipeline(*(x.at[r] for x in refs))
    plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
    walk,
    out_type=[jax.ShapeDtypeStruct(v.shape, BF16), jax.ShapeDtypeStruct(S.shape, F32)],
    grid=(tiles, R),
    scratch_types=[_smem((TILE, C), BF16)],
    grid_names=("tile", "row"),
    compiler_params=LANE,
  )(q, k, v, P, inverse, gates, S)
