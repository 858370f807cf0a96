"""What every rule's public function does around the arithmetic: checks, mask, implementation, mesh."""

import difflib
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

Rule = Callable[..., tuple[jax.Array, jax.Array]]

# Implementations by platform; the first is the default. kernels/README.md has the table that earned it on a
# CPU; elsewhere there is only one that is fast, and it has not been timed.
ORDER = {"cpu": ("xla", "reference"), "gpu": ("xla", "reference"), "tpu": ("xla", "reference")}

AXES = {"q": "BTHK", "k": "BTHK", "v": "BTHV", "g": "BTH", "b": "BTH", "S": "BHKV", "mask": "BT"}


def call(
  rule: str,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g: jax.Array | None,
  b: jax.Array,
  S: jax.Array,
  *,
  mask: jax.Array | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Checks the arrays, then runs `rule` on them: what the public functions share.

  Args:
    rule: folder and function under `kernels`.
    q, k, v, g, b, S, mask: as in the public functions; g None for a rule without decay.
    implementation: run this one or raise; None for the platform's default.

  Raises:
    ValueError: a shape, a sharding or the name of the implementation.
    TypeError: a dtype.
  """
  named = {"q": q, "k": k, "v": v, "g": g, "b": b, "S": S, "mask": mask}
  named = {name: jnp.asarray(x) for name, x in named.items() if x is not None}
  check(rule, named)
  run = load(rule, implementation)

  def masked(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = dict(zip(named, arrays, strict=True))
    if "mask" in x:
      keep = x.pop("mask")[..., None]
      x |= {name: jnp.where(keep, x[name], 0) for name in ("g", "b") if name in x}
    return run(*x.values())

  return on_mesh(rule, masked, named)


def load(rule: str, implementation: str | None) -> Rule:
  """The function of an implementation; imported by name, so that a CPU never loads what it cannot run."""
  known = ORDER.get(jax.default_backend(), ORDER["cpu"])
  if implementation is None:
    implementation = known[0]
  if implementation not in known:
    near = difflib.get_close_matches(str(implementation), known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{rule}: no implementation {implementation!r} here, known: {', '.join(known)}{hint}")
  return getattr(importlib.import_module(f"kernels.{rule}.{implementation}"), rule)


def check(rule: str, named: dict[str, jax.Array]) -> None:
  """Raises one line that names the argument, what it is and what is needed."""
  sizes: dict[str, int] = {}
  for name, x in named.items():
    axes = AXES[name]
    if x.ndim != len(axes):
      raise ValueError(f"{rule}: {name} has shape {x.shape}, needs [{', '.join(axes)}]")
    need = tuple(sizes.setdefault(axis, size) for axis, size in zip(axes, x.shape, strict=True))
    if x.shape != need:
      raise ValueError(f"{rule}: {name} has shape {x.shape}, needs [{', '.join(axes)}] = {need}")
  for axis, size in sizes.items():
    if size < 1:
      raise ValueError(f"{rule}: {axis} is {size} in q {named['q'].shape}, needs at least 1")

  for name in ("q", "k", "v"):
    if not jnp.issubdtype(named[name].dtype, jnp.floating):
      raise TypeError(f"{rule}: {name} has dtype {named[name].dtype}, needs a floating point dtype")
  for name in ("g", "b"):
    if name in named and named[name].dtype not in (jnp.float32, jnp.float64):
      raise TypeError(f"{rule}: {name} has dtype {named[name].dtype}, needs float32 (or float64)")
  widest = jnp.float64 if any(x.dtype == jnp.float64 for n, x in named.items() if n != "S") else jnp.float32
  if named["S"].dtype != widest:
    why = "as one of the others is" if widest == jnp.float64 else "always, unless q, k, v, g or b is float64"
    raise TypeError(f"{rule}: S has dtype {named['S'].dtype}, needs {widest.dtype} ({why})")
  if "mask" in named and named["mask"].dtype != jnp.bool_:
    raise TypeError(f"{rule}: mask has dtype {named['mask'].dtype}, needs bool (False = pad)")


def on_mesh(rule: str, run: Rule, named: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """Runs on each device's own rows and heads if an explicit mesh says who holds which.

  Rows and heads never meet in a rule, so nothing is communicated. What is split over batch or heads is read
  from the types of the operands; an operand that is whole along an axis where others are split is split too.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    mesh = jax.typeof(named["v"]).sharding.mesh
  if not any(kind == AxisType.Explicit for kind in mesh.axis_types):
    return run(*named.values())

  placed: dict[str, object] = {"B": None, "H": None}
  for name, x in named.items():
    for axis, where in zip(AXES[name], jax.typeof(x).sharding.spec, strict=True):
      if where is None:
        continue
      if axis not in placed:
        raise ValueError(f"{rule}: {name} is split along {axis} over {where!r}; only B and H may be split")
      if placed[axis] not in (None, where):
        raise ValueError(f"{rule}: {name} is split along {axis} over {where!r}, others over {placed[axis]!r}")
      placed[axis] = where

  specs = {name: P(*(placed.get(axis) for axis in AXES[name])) for name in named}
  arrays = [jax.reshard(x, jax.NamedSharding(mesh, specs[name])) for name, x in named.items()]
  sharded = jax.shard_map(run, mesh=mesh, in_specs=tuple(specs.values()), out_specs=(specs["v"], specs["S"]))
  return sharded(*arrays)
