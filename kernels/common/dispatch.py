"""What every op's public function does around the arithmetic: checks, mask, implementation, mesh."""

import difflib
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.core import Tracer
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sleep_jax.kernels.common import pads, target
from sleep_jax.kernels.common.op import Function, Op

# Implementations that can be named, by platform. kernels/README.md has what was measured.
ORDER = {
  "cpu": ("xla", "reference"),
  "gpu": ("xla", "reference", "pallas_gpu"),
  "tpu": ("xla", "reference", "pallas_tpu", "pallas_tpu_fused"),
}
# What is tried, in turn, when none is named. A Pallas kernel moves in here, in front, with a measured table.
DEFAULT = {"cpu": ("xla", "reference"), "gpu": ("xla", "reference"), "tpu": ("xla", "reference")}
# A Pallas call's results have no type that says over which axes of a mesh they vary, for shard_map to check.
UNTYPED = frozenset({"pallas_gpu", "pallas_tpu", "pallas_tpu_fused"})


def call(
  op: Op,
  *arrays: jax.Array,
  mask: jax.Array | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Checks the arrays, then runs an op on them: what the public functions share.

  Args:
    op: the op's declaration.
    *arrays: its operands in their order, then S.
    mask: [B, T] bool, False for pads. None: no pads.
    implementation: run this one or raise. None: those of `DEFAULT` in turn, until one can run; each that
      cannot (NotImplementedError, ImportError) is reported in one warning.

  Returns:
    o [B, T, H, V], 0 at pads, and S [B, H, K, V] after the last token.

  Raises:
    ValueError: a shape, a sharding, a positive log decay or the name of the implementation.
    TypeError: a dtype; forward-mode differentiation.
    NotImplementedError: the named implementation does not take these arrays, or the op does not have it.
  """
  named = dict(zip((*op.operands, "S"), map(jnp.asarray, arrays), strict=True))
  if mask is not None:
    named["mask"] = jnp.asarray(mask)
  check(op, named)
  if implementation is not None:
    return _run(op, implementation, named)
  for name in DEFAULT.get(target.platform(*named.values()), DEFAULT["cpu"]):
    try:
      return _run(op, name, named)
    except (NotImplementedError, ImportError) as reason:
      _warn_once(op.name, name, str(reason))
  raise NotImplementedError(
    f"{op.name}: no implementation takes { ({n: x.shape for n, x in named.items()}) }"
  )


def step(op: Op, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Checks the arrays, then runs an op on one token.

  Args:
    op: the op's declaration.
    *arrays: its operands in their order, without the axis T, then S, which is donated.

  Returns:
    o [B, H, V] and S [B, H, K, V].

  Raises:
    ValueError, TypeError: as `call`.
    NotImplementedError: the op has no form for one token.
  """
  if op.step is None:
    raise NotImplementedError(f"{op.name}: has no form for one token")
  named = dict(zip((*op.operands, "S"), map(jnp.asarray, arrays), strict=True))
  check(op, named, one_token=True)
  S = named.pop("S")
  return update(op, named, S)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def update(op: Op, token: dict[str, jax.Array], S: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`op.step` on each device's own rows and heads, without the checks.

  Called outside `jax.jit`, the S that is passed is gone afterwards. Inside, the donation is the outer
  program's to make: `jax.jit(..., donate_argnames="S")`.
  """
  assert op.step is not None
  named = {name: token[name] for name in op.operands} | {"S": S}  # `jax.jit` gives a dictionary back sorted
  return on_mesh(op, op.step, named, one_token=True)


def known(*arrays: jax.Array) -> tuple[str, ...]:
  """The implementations that can be named for the platform that the program is for (`target.platform`)."""
  return ORDER.get(target.platform(*arrays), ORDER["cpu"])


def load(op: Op, implementation: str, *arrays: jax.Array) -> Function:
  """The function of an implementation; imported by name, so that a CPU never loads what it cannot run.

  Args:
    op: the op's declaration.
    implementation: its name.
    *arrays: that the function will be called with; their types may say which devices that is for.

  Raises:
    ValueError: no platform has an implementation of this name.
    NotImplementedError: it belongs to another platform, or this op does not have it.
  """
  here, names_here = target.platform(*arrays), known(*arrays)
  if implementation not in names_here:
    if elsewhere := [platform for platform, names in ORDER.items() if implementation in names]:
      where = f"runs on {', '.join(elsewhere)}, not on {here}"
      listed = ", ".join(names_here)
      raise NotImplementedError(f"{op.name}: {implementation!r} {where}; known here: {listed}")
    near = difflib.get_close_matches(str(implementation), names_here, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(names_here)
    raise ValueError(f"{op.name}: no implementation {implementation!r} here, known: {listed}{hint}")
  if implementation not in op.implementations:
    use = next(name for name in (*names_here, *op.implementations) if name in op.implementations)
    raise NotImplementedError(f"{op.name}: has no implementation {implementation!r}, use {use!r}")
  return op.load(implementation)


def _run(op: Op, implementation: str, named: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
  run = load(op, implementation, *named.values())
  if "mask" in named:
    run = _without_pads(op, run)
  try:
    return on_mesh(op, run, named, typed=implementation not in UNTYPED)
  except TypeError as error:
    if "forward-mode" not in str(error):
      raise
    raise TypeError(
      f"{op.name}: {implementation!r} has no forward-mode derivative (jax.jvp); "
      "use reverse mode (jax.vjp, jax.grad) or implementation='reference'"
    ) from error


def _without_pads(op: Op, run: Function) -> Function:
  """The function (*operands, S, mask) -> (o, S) on which nothing at a pad has an effect, NaN included.

  Operands count as `op.at_pads` there, so S stays exactly as it was, and no gradient reaches them. o is 0
  there, so no gradient comes from there either: what the caller makes of a pad may be NaN, and NaN times 0
  would be NaN. What came before stands next to the first token.
  """

  def masked(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    *operands, S, mask = arrays
    kept = {
      name: _where(mask, x, op.at_pads.get(name, 0)) if "T" in op.axes(name) else x
      for name, x in zip(op.operands, operands, strict=True)
    }
    for name, before in op.before.items():
      kept[before], kept[name] = pads.next_to(kept[before], kept[name], mask)
    o, S = run(*kept.values(), S)
    return _where(mask, o, 0), S

  return masked


def _where(mask: jax.Array, x: jax.Array, other: float) -> jax.Array:
  """x [B, T, ...] where the mask [B, T] is True, else `other`."""
  return jnp.where(jnp.expand_dims(mask, tuple(range(2, x.ndim))), x, other)


@functools.cache
def _warn_once(op: str, name: str, reason: str) -> None:
  logging.warning("%s: skipped %s: %s", op, name, reason)


def _axes(op: Op, name: str, one_token: bool) -> Sequence[str]:
  return [axis for axis in op.axes(name) if axis != "T" or not one_token]


def check(op: Op, named: dict[str, jax.Array], *, one_token: bool = False) -> None:
  """Raises one line that names the argument, what it is and what is needed.

  Args:
    op: the op's declaration.
    named: its operands and S, in their order; the mask, if there is one, last.
    one_token: the arrays have no axis T.

  Raises:
    ValueError: a shape; a positive log decay, where its values are at hand.
    TypeError: a dtype.
  """
  _check_shapes(op, named, one_token)
  _check_dtypes(op, named)
  if op.log_decay is not None:
    _check_decay(op.name, op.log_decay, named[op.log_decay], named.get("mask"))


def _check_shapes(op: Op, named: dict[str, jax.Array], one_token: bool) -> None:
  sizes: dict[str, int] = {}
  for name, x in named.items():
    axes = _axes(op, name, one_token)
    if x.ndim != len(axes):
      raise ValueError(f"{op.name}: {name} has shape {x.shape}, needs [{', '.join(axes)}]")
    need = tuple(sizes.setdefault(axis, size) for axis, size in zip(axes, x.shape, strict=True))
    if x.shape != need:
      raise ValueError(f"{op.name}: {name} has shape {x.shape}, needs [{', '.join(axes)}] = {need}")
  for axis, size in sizes.items():
    if size < 1:
      first, x = next(iter(named.items()))
      raise ValueError(f"{op.name}: {axis} is {size} in {first} {x.shape}, needs at least 1")
  for axis, derived in op.derived.items():
    if sizes[axis] != (size := derived.size(sizes)):
      name = next(name for name in named if axis in op.axes(name))
      shape = named[name].shape
      raise ValueError(f"{op.name}: {name} has shape {shape}, needs {derived.text} = {size} as its {axis}")


def _check_dtypes(op: Op, named: dict[str, jax.Array]) -> None:
  dtypes = {name: x.dtype for name, x in named.items()}
  for name in op.operands:
    free = name not in op.float32 and name not in op.same_dtype
    if free and not jnp.issubdtype(dtypes[name], jnp.floating):
      raise TypeError(f"{op.name}: {name} has dtype {dtypes[name]}, needs a floating point dtype")
  for name, like in op.same_dtype.items():
    if dtypes[name] != dtypes[like]:
      raise TypeError(f"{op.name}: {name} has dtype {dtypes[name]}, needs {like}'s, {dtypes[like]}")
  for name in op.float32:
    if dtypes[name] not in (jnp.float32, jnp.float64):
      raise TypeError(f"{op.name}: {name} has dtype {dtypes[name]}, needs float32 (or float64)")
  double = any(dtypes[name] == jnp.float64 for name in op.operands)
  need = "float64" if double else "float32"
  if dtypes["S"] != need:
    why = "as one of the others is" if double else "always, unless one of the others is float64"
    raise TypeError(f"{op.name}: S has dtype {dtypes['S']}, needs {need} ({why})")
  if "mask" in dtypes and dtypes["mask"] != jnp.bool_:
    raise TypeError(f"{op.name}: mask has dtype {dtypes['mask']}, needs bool (False = pad)")


def _check_decay(op: str, name: str, g: jax.Array, mask: jax.Array | None) -> None:
  """Refuses a positive g at a token, if the values of g (and of the mask) are at hand."""
  needed = [g] if mask is None else [g, mask]
  if any(isinstance(x, Tracer) or not x.is_fully_addressable for x in needed):
    return
  values = np.asarray(g)
  if mask is not None:
    values = np.where(np.expand_dims(np.asarray(mask), tuple(range(2, g.ndim))), values, 0)
  if (largest := float(np.max(values))) > 0:
    raise ValueError(f"{op}: {name} reaches {largest:.3g}, needs <= 0: it is the log of the decay")


def on_mesh(
  op: Op,
  run: Callable[..., tuple[jax.Array, jax.Array]],
  named: dict[str, jax.Array],
  *,
  typed: bool = True,
  one_token: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Runs on each device's own rows and heads if an explicit mesh says who holds which.

  Rows and heads never meet in an op, so nothing is communicated. What is split over batch or heads is read
  from the types of the operands; an operand that is whole along an axis where others are split is split too.

  Args:
    op: the op's declaration.
    run: (*named) -> (o, S), on the rows and heads of one device.
    named: operands and S, perhaps the mask.
    typed: shard_map checks over which axes the results vary (its `check_vma`).
    one_token: the arrays have no axis T.

  Raises:
    ValueError: an axis other than B and H is split, or two operands split one of these in two ways.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    mesh = jax.typeof(next(iter(named.values()))).sharding.mesh
  if not any(kind == AxisType.Explicit for kind in mesh.axis_types):
    return run(*named.values())

  placed: dict[str, str | tuple[str, ...] | None] = {"B": None, "H": None}
  for name, x in named.items():
    for axis, where in zip(_axes(op, name, one_token), jax.typeof(x).sharding.spec, strict=True):
      if where is None:
        continue
      if axis not in placed:
        raise ValueError(f"{op.name}: {name} is split along {axis} over {where!r}; only B and H may be split")
      if placed[axis] not in (None, where):
        raise ValueError(
          f"{op.name}: {name} is split along {axis} over {where!r}, others over {placed[axis]!r}"
        )
      placed[axis] = where

  specs = {name: P(*map(placed.get, _axes(op, name, one_token))) for name in named}
  arrays = [jax.reshard(x, jax.NamedSharding(mesh, specs[name])) for name, x in named.items()]
  of_o = P(*map(placed.get, "BHV" if one_token else "BTHV"))
  sharded = jax.shard_map(
    run, mesh=mesh, in_specs=tuple(specs.values()), out_specs=(of_o, specs["S"]), check_vma=typed
  )
  return sharded(*arrays)
