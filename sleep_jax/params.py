"""Slow weights: each declared once, with all that anybody needs to know about it.

A model's parameters are a nested dict of arrays, made from a nested dict of `Weight`s of the same
structure. Initialisation, sharding, the optimizer's partition and weight decay all read the
declaration; nothing guesses from a name or a rank.
"""

import collections
import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sleep_jax import sharding

Init = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
GROUPS = ("muon", "adam", "frozen")


@dataclasses.dataclass(frozen=True)
class Weight:
  """A slow weight, declared once.

  Attributes:
    shape: of the array.
    axes: logical name of each dimension, looked up in `sharding.RULES`; None for never split.
    init: (key, shape, dtype) -> array.
    group: `muon` (a matrix of the body) or `adam` (embedding, head, norm, gate, convolution, bias); `frozen`
      where a run leaves it as it is (`optim.freeze`).
    num_in: a matrix maps its first `num_in` dimensions to the others; Muon and the fan-in read this.
    decay: whether weight decay applies.
  """

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  init: Init
  group: str = "adam"
  num_in: int = 1
  decay: bool = True

  def __post_init__(self):
    if len(self.shape) != len(self.axes):
      raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")
    if self.group not in GROUPS:
      raise ValueError(f"unknown optimizer group {self.group!r}; known: {', '.join(GROUPS)}")
    if self.group == "muon" and not 0 < self.num_in < len(self.shape):
      raise ValueError(
        f"a muon weight needs input and output axes, got shape {self.shape}, num_in {self.num_in}"
      )


def matrix(*shape: int, axes: tuple[str | None, ...], num_in: int = 1) -> Weight:
  """A matrix of the body: Muon's, drawn from N(0, 1 / fan_in) as `x @ W` needs it."""
  fan_in = math.prod(shape[:num_in])
  return Weight(shape, axes, normal(fan_in**-0.5), group="muon", num_in=num_in)


def scale(*shape: int, axes: tuple[str | None, ...] = (None,), zero: bool = False) -> Weight:
  """The weight of a norm: ones (zeros, if the norm adds 1 to it), no decay."""
  draw = jax.nn.initializers.zeros if zero else jax.nn.initializers.ones
  return Weight(shape, axes, draw, decay=False)


def bias(*shape: int, axes: tuple[str | None, ...]) -> Weight:
  """A bias: zeros, no decay."""
  return Weight(shape, axes, jax.nn.initializers.zeros, decay=False)


@functools.cache
def normal(std: float) -> Init:
  """N(0, std^2)."""
  return jax.nn.initializers.normal(std)


def init(declared: Any, key: jax.Array) -> Any:
  """Draws every declared weight, float32, each from its own key: adding one changes no other.

  Args:
    declared: nested dict of `Weight`.
    key: typed PRNG key.

  Returns:
    Nested dict of arrays, sharded by the RULES table where a mesh is set.
  """
  paths, treedef = jax.tree_util.tree_flatten_with_path(declared, is_leaf=is_weight)
  alike = collections.defaultdict(list)  # one program for all weights of a kind: compiling many takes long
  for i, (_, weight) in enumerate(paths):
    alike[(weight.init, weight.shape)].append(i)
  values: list[Any] = [None] * len(paths)
  traced = isinstance(jnp.zeros(()), Tracer)  # options of a program are for the outermost one
  drawn = _drawn if traced else _drawn_at_once
  for (draw, shape), members in alike.items():
    names = np.array([zlib.crc32(name_of(paths[i][0]).encode()) for i in members], np.uint32)
    for i, value in zip(members, drawn(key, names, draw, shape), strict=True):
      values[i] = sharding.constrain(value, paths[i][1].axes)
  return jax.tree.unflatten(treedef, values)


def _drawn(key: jax.Array, names: np.ndarray, draw: Init, shape: tuple[int, ...]) -> list[jax.Array]:
  """Weights of one kind, each from the key of its name."""
  keys = jax.vmap(functools.partial(jax.random.fold_in, key))(names)
  return list(jax.vmap(lambda key: draw(key, shape, jnp.float32))(keys))


# It runs once: on a CPU it compiles in a third of the time.
_drawn_at_once = jax.jit(
  _drawn, static_argnames=("draw", "shape"), compiler_options={"xla_backend_optimization_level": 0}
)


def is_weight(x: Any) -> bool:
  """Whether `x` is a declaration (for `jax.tree.map(..., is_leaf=is_weight)`)."""
  return isinstance(x, Weight)


def name_of(path: tuple[Any, ...]) -> str:
  """A tree path as text: `blocks/0/mixer/q`."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def count(declared: Any) -> int:
  """Number of parameters."""
  return sum(math.prod(w.shape) for w in jax.tree.leaves(declared, is_leaf=is_weight))
