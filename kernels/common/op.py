"""What an op declares about itself, in its own folder, so that the code all ops share need not know any."""

import dataclasses
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping, Sequence

import jax

Function = Callable[..., tuple[jax.Array, jax.Array]]  # (*operands, S) -> o, S

COMMON = {"S": "BHKV", "mask": "BT"}  # every op has them


@dataclasses.dataclass(frozen=True)
class Derived:
  """The size of an axis that follows from the sizes of others.

  Attributes:
    text: how, for error messages.
    size: the size from those of the other axes.
  """

  text: str
  size: Callable[[Mapping[str, int]], int]


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
  """An update rule as the shared checks, mask, mesh and one-token step see it.

  Axes are named by letters: B batch, T sequence, H heads, K key width, V value width; an op may add names of
  its own. Every op also takes fast weights S [B, H, K, V] and returns o [B, T, H, V] and S. Only B and H can
  be split over a mesh.

      SPEC = Op("oja", operands={"q": "BTHK", "k": "BTHK", "v": "BTHV", "b": "BTH"}, float32=("b",),
                implementations={"reference": oja})
      o, S = dispatch.call(SPEC, q, k, v, b, S, mask=mask)

  Attributes:
    name: what error messages begin with.
    operands: the arrays without S, in the order of the arguments, each with the names of its axes. An array
      of tokens has B and T as its first two.
    implementations: the functions (*operands, S) -> (o, S) under the names that `dispatch.ORDER` knows; or
      "module:function", which is imported when it is first needed.
    float32: operands that are float32 (float64 where the caller works in it). The others are floating point.
    same_dtype: operand -> the operand whose dtype it shares.
    log_decay: the operand that is the log of a decay, at most 0. None: the op has none.
    at_pads: operand -> what it counts as at a pad. 0 where nothing is said.
    before: operand of tokens -> the operand that holds the last tokens before it, whose axes but the second
      are the same. Pads in front do not part the two.
    derived: the axes whose size follows from others'.
    step: the function for one token: the operands without the axis T, and S. None: the op has none.

  Raises:
    ValueError: a field that names no operand, or tokens whose first axes are not B and T.
  """

  name: str
  operands: Mapping[str, Sequence[str]]
  implementations: Mapping[str, Function | str]
  float32: tuple[str, ...] = ()
  same_dtype: Mapping[str, str] = dataclasses.field(default_factory=dict)
  log_decay: str | None = None
  at_pads: Mapping[str, float] = dataclasses.field(default_factory=dict)
  before: Mapping[str, str] = dataclasses.field(default_factory=dict)
  derived: Mapping[str, Derived] = dataclasses.field(default_factory=dict)
  step: Function | None = None

  def __post_init__(self):
    if reserved := COMMON.keys() & self.operands.keys():
      raise ValueError(f"{self.name}: {min(reserved)!r} belongs to every op, operands needs another name")
    for name, axes in self.operands.items():
      if "T" in axes and tuple(axes[:2]) != ("B", "T"):
        raise ValueError(f"{self.name}: {name} has axes [{', '.join(axes)}], needs B, T as the first two")
    log_decay = () if self.log_decay is None else (self.log_decay,)
    same_dtype = (*self.same_dtype, *self.same_dtype.values())
    before = (*self.before, *self.before.values())
    for field, names in (
      ("float32", self.float32),
      ("same_dtype", same_dtype),
      ("log_decay", log_decay),
      ("at_pads", self.at_pads),
      ("before", before),
    ):
      for name in names:
        if name not in self.operands:
          raise ValueError(
            f"{self.name}: {field} names {name!r}, the operands are {', '.join(self.operands)}"
          )

  def axes(self, name: str) -> Sequence[str]:
    """The names of the axes of an operand, of S or of the mask."""
    return COMMON[name] if name in COMMON else self.operands[name]

  def shape(self, name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of an operand or of S.

    Args:
      name: of the array.
      sizes: of all axes that are not derived.
    """
    size = lambda axis: self.derived[axis].size(sizes) if axis in self.derived else sizes[axis]  # noqa: E731
    return tuple(map(size, self.axes(name)))

  def load(self, implementation: str) -> Function:
    """The function of an implementation; KeyError if the op has none of this name."""
    function = self.implementations[implementation]
    if not isinstance(function, str):
      return function
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)


def declared() -> dict[str, Op]:
  """The ops that have a folder in this package, by name."""
  package = importlib.import_module(__name__.rsplit(".", 2)[0])
  specs = {}
  for folder in pkgutil.iter_modules(package.__path__):
    if folder.ispkg and importlib.util.find_spec(f"{package.__name__}.{folder.name}.spec"):
      specs[folder.name] = importlib.import_module(f"{package.__name__}.{folder.name}.spec").SPEC
  return specs
