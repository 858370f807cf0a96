"""What every rule's public function does around the arithmetic: checks, mask, implementation, mesh."""

import difflib
import functools
import importlib.util
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sleep_jax.kernels.common import decode

Rule = Callable[..., tuple[jax.Array, jax.Array]]

# Implementations that can be named, by platform. kernels/README.md has what was measured.
ORDER = {
  "cpu": ("xla", "reference"),
  "gpu": ("xla", "reference", "pallas_gpu"),
  "tpu": ("xla", "reference", "pallas_tpu", "pallas_tpu_fused"),
}
# What is tried, in turn, when none is named. A Pallas kernel moves in here, in front, with a measured table.
DEFAULT = {"cpu": ("xla", "reference"), "gpu": ("xla", "reference"), "tpu": ("xla", "reference")}

_SCALAR = {"q": "BTHK", "k": "BTHK", "v": "BTHV", "g": "BTH", "b": "BTH"}
# The arguments of each rule, in order, with their axes; S and mask are everybody's.
OPERANDS = {
  "gated_delta": _SCALAR,
  "gated_hebbian": _SCALAR,
  "delta": {name: axes for name, axes in _SCALAR.items() if name != "g"},
  "kda": _SCALAR | {"g": "BTHK"},
  "gdn2": {"q": "BTHK", "k": "BTHK", "v": "BTHV", "g": "BTHK", "e": "BTHK", "w": "BTHV"},
}
# Likewise of a rule that has its layer's front before it: no rule of its own. X = K + K + V, c taps.
FRONTED = {
  "conv_gated_delta": {
    "x": "BTHX",
    "taps": "cHX",
    "context": ("B", "c-1", "H", "X"),
    "a": "BTH",
    "b": "BTH",
    "A_log": "H",
    "dt_bias": "H",
  }
}
GATES = ("g", "b", "e", "w")  # zero at a pad: no decay, nothing erased, nothing written
FRONT_WEIGHTS = ("taps", "a", "A_log", "dt_bias")
CLOSED = -1e30  # what an input of a gate is at a pad: softplus and sigmoid of it are 0, and flat


def operands(rule: str) -> dict[str, Sequence[str]]:
  """The arguments of a rule, in order, with their axes; without S and mask."""
  return OPERANDS[rule] if rule in OPERANDS else FRONTED[rule]


def axes_of(rule: str, name: str) -> Sequence[str]:
  """The axes of an argument, a letter each."""
  return (operands(rule) | {"S": "BHKV", "mask": "BT"})[name]


def call(
  rule: str,
  *arrays: jax.Array,
  mask: jax.Array | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Checks the arrays, then runs `rule` on them: what the public functions share.

  Args:
    rule: folder and function under `kernels`.
    *arrays: the rule's operands in the order of `OPERANDS` or `FRONTED`, then S.
    mask: [B, T] bool or None, as in the public functions.
    implementation: run this one or raise. None: those of `DEFAULT` in turn, until one can; each that cannot
      (NotImplementedError, ImportError) is reported in one warning.

  Raises:
    ValueError: a shape, a sharding, a positive log decay or the name of the implementation.
    TypeError: a dtype; forward-mode differentiation.
    NotImplementedError: the named implementation does not take these arrays, or has not got this rule.
  """
  named = dict(zip((*operands(rule), "S"), map(jnp.asarray, arrays), strict=True))
  if mask is not None:
    named["mask"] = jnp.asarray(mask)
  check(rule, named, axes_of)
  if implementation is not None:
    return _run(rule, implementation, named)
  for name in DEFAULT.get(jax.default_backend(), DEFAULT["cpu"]):
    try:
      return _run(rule, name, named)
    except (NotImplementedError, ImportError) as reason:
      _warn_once(rule, name, str(reason))
  raise NotImplementedError(f"{rule}: no implementation takes { ({n: x.shape for n, x in named.items()}) }")


def step(rule: str, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
  """One token of a rule: checks, then `kernels.decode.update`, S donated. Arrays as in `call`, without T."""
  named = dict(zip((*OPERANDS[rule], "S"), map(jnp.asarray, arrays), strict=True))
  check(rule, named, axes_of_a_token)
  S = named.pop("S")
  return update(rule, named, S)


def axes_of_a_token(rule: str, name: str) -> Sequence[str]:
  """The axes of an argument of `step`."""
  return [axis for axis in axes_of(rule, name) if axis != "T"]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def update(rule: str, token: dict[str, jax.Array], S: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`kernels.decode.update`, on each device's own rows and heads; the S that is passed is gone afterwards."""

  def run(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    *values, S = arrays
    return decode.update(rule, dict(zip(token, values, strict=True)), S)

  return on_mesh(rule, run, token | {"S": S}, axes_of=axes_of_a_token)


def load(rule: str, implementation: str) -> Rule:
  """The function of an implementation; imported by name, so that a CPU never loads what it cannot run.

  Raises:
    ValueError: no platform has an implementation of this name.
    NotImplementedError: it belongs to another platform, or this rule has not got it.
  """
  here = jax.default_backend()
  known = ORDER.get(here, ORDER["cpu"])
  if implementation not in known:
    if elsewhere := [platform for platform, names in ORDER.items() if implementation in names]:
      where = f"runs on {', '.join(elsewhere)}, not on {here}"
      raise NotImplementedError(f"{rule}: {implementation!r} {where}; known here: {', '.join(known)}")
    near = difflib.get_close_matches(str(implementation), known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{rule}: no implementation {implementation!r} here, known: {', '.join(known)}{hint}")
  module = f"sleep_jax.kernels.{rule}.{implementation}"
  if importlib.util.find_spec(module) is None:
    raise NotImplementedError(f"{rule}: has no implementation {implementation!r}, use 'xla'")
  return getattr(importlib.import_module(module), rule)


def _run(rule: str, implementation: str, named: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
  run = load(rule, implementation)

  def masked(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = dict(zip(named, arrays, strict=True))
    if "mask" in x:
      keep = x.pop("mask")[..., None]
      at_pads = {"x": 0, "a": CLOSED, "b": CLOSED} if rule in FRONTED else dict.fromkeys(GATES, 0)
      for name in x.keys() & at_pads.keys():
        x[name] = jnp.where(keep[..., None] if x[name].ndim == 4 else keep, x[name], at_pads[name])
    return run(*x.values())

  try:
    # What a Pallas call writes has no type that says over which axes it varies.
    return on_mesh(rule, masked, named, typed=not implementation.startswith("pallas"))
  except TypeError as error:
    if "forward-mode" not in str(error):
      raise
    raise TypeError(
      f"{rule}: {implementation!r} has no forward-mode derivative (jax.jvp); "
      "use reverse mode (jax.vjp, jax.grad) or implementation='reference'"
    ) from error


@functools.cache
def _warn_once(rule: str, name: str, reason: str) -> None:
  logging.warning("%s: skipped %s: %s", rule, name, reason)


def check(rule: str, named: dict[str, jax.Array], axes_of: Callable[[str, str], Sequence[str]]) -> None:
  """Raises one line that names the argument, what it is and what is needed."""
  sizes: dict[str, int] = {}
  for name, x in named.items():
    axes = axes_of(rule, name)
    if x.ndim != len(axes):
      raise ValueError(f"{rule}: {name} has shape {x.shape}, needs [{', '.join(axes)}]")
    need = tuple(sizes.setdefault(axis, size) for axis, size in zip(axes, x.shape, strict=True))
    if x.shape != need:
      raise ValueError(f"{rule}: {name} has shape {x.shape}, needs [{', '.join(axes)}] = {need}")
  for axis, size in sizes.items():
    if size < 1:
      first, x = next(iter(named.items()))
      raise ValueError(f"{rule}: {axis} is {size} in {first} {x.shape}, needs at least 1")
  for name, axis, need in (("x", "X", "K + K + V"), ("context", "c-1", "taps - 1")):
    if axis not in sizes:
      continue
    size = 2 * sizes["K"] + sizes["V"] if axis == "X" else sizes["c"] - 1
    if sizes[axis] != size:
      raise ValueError(f"{rule}: {name} has shape {named[name].shape}, needs {need} = {size} as its {axis}")

  for name in ("q", "k", "v", "x"):
    if name in named and not jnp.issubdtype(named[name].dtype, jnp.floating):
      raise TypeError(f"{rule}: {name} has dtype {named[name].dtype}, needs a floating point dtype")
  if "context" in named and named["context"].dtype != named["x"].dtype:
    raise TypeError(f"{rule}: context has dtype {named['context'].dtype}, needs x's, {named['x'].dtype}")
  for name in (*GATES, *FRONT_WEIGHTS):
    if name in named and named[name].dtype not in (jnp.float32, jnp.float64):
      raise TypeError(f"{rule}: {name} has dtype {named[name].dtype}, needs float32 (or float64)")
  widest = jnp.float64 if any(x.dtype == jnp.float64 for n, x in named.items() if n != "S") else jnp.float32
  if named["S"].dtype != widest:
    why = (
      "as one of the others is" if widest == jnp.float64 else "always, unless one of the others is float64"
    )
    raise TypeError(f"{rule}: S has dtype {named['S'].dtype}, needs {widest.dtype} ({why})")
  if "mask" in named and named["mask"].dtype != jnp.bool_:
    raise TypeError(f"{rule}: mask has dtype {named['mask'].dtype}, needs bool (False = pad)")

  g = named.get("g")
  if g is not None and not isinstance(g, jax.core.Tracer) and g.is_fully_addressable:
    if (largest := float(np.max(np.asarray(g)))) > 0:
      raise ValueError(f"{rule}: g reaches {largest:.3g}, needs <= 0: it is the log of the decay")


def on_mesh(
  rule: str,
  run: Rule,
  named: dict[str, jax.Array],
  *,
  typed: bool = True,
  axes_of: Callable[[str, str], Sequence[str]] = axes_of,
) -> tuple[jax.Array, jax.Array]:
  """Runs on each device's own rows and heads if an explicit mesh says who holds which.

  Rows and heads never meet in a rule, so nothing is communicated. What is split over batch or heads is read
  from the types of the operands; an operand that is whole along an axis where others are split is split too.
  `typed` is shard_map's check_vma; `axes_of` those of the operands.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    mesh = jax.typeof(next(iter(named.values()))).sharding.mesh
  if not any(kind == AxisType.Explicit for kind in mesh.axis_types):
    return run(*named.values())

  placed: dict[str, object] = {"B": None, "H": None}
  for name, x in named.items():
    for axis, where in zip(axes_of(rule, name), jax.typeof(x).sharding.spec, strict=True):
      if where is None:
        continue
      if axis not in placed:
        raise ValueError(f"{rule}: {name} is split along {axis} over {where!r}; only B and H may be split")
      if placed[axis] not in (None, where):
        raise ValueError(f"{rule}: {name} is split along {axis} over {where!r}, others over {placed[axis]!r}")
      placed[axis] = where

  specs = {name: P(*(placed.get(axis) for axis in axes_of(rule, name))) for name in named}
  arrays = [jax.reshard(x, jax.NamedSharding(mesh, specs[name])) for name, x in named.items()]
  of_o = "BTHV" if any("T" in axes_of(rule, name) for name in named) else "BHV"  # one token has no T
  out = P(*(placed.get(axis) for axis in of_o)), specs["S"]
  sharded = jax.shard_map(run, mesh=mesh, in_specs=tuple(specs.values()), out_specs=out, check_vma=typed)
  return sharded(*arrays)
