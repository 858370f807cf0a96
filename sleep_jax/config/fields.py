"""What a field of a config may hold: said once, by its annotation, and checked from there.

    window: Count = 24                                   # a whole number, at least 1
    eviction: Literal["hard", "sliding"] = "hard"        # one of these
    head_dim: Annotated[int, Bounds(least=2)] | None     # or left out

Numbers are such as a device can hold: whole ones int32, others float32. What a field means is said once
too, under `Attributes:` in the docstring of its dataclass; `documentation` reads it.
"""

import dataclasses
import functools
import inspect
import math
import re
import types
import typing
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from sleep_jax.config.checks import check, one_of, shown

MOST_WHOLE = 2**31 - 1  # int32
LEAST_FLOAT, MOST_FLOAT = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # float32, subnormal numbers aside
MOST_VALUES = 10_000  # of a list
MOST_TEXT = 4096  # characters of a name: no path is longer


@dataclasses.dataclass(frozen=True)
class Bounds:
  """Where a number must lie.

  Attributes:
    least: the lowest that is allowed.
    most: the highest that is allowed.
    above: lower than all that is allowed.
    below: higher than all that is allowed.
  """

  least: float | None = None
  most: float | None = None
  above: float | None = None
  below: float | None = None

  def check(self, value: float, field: str) -> None:
    """Raises `ConfigError` unless `value` lies inside; NaN lies nowhere."""
    inside = (
      (self.least is None or value >= self.least)
      and (self.most is None or value <= self.most)
      and (self.above is None or value > self.above)
      and (self.below is None or value < self.below)
    )
    check(inside, field, f"must {self}, got {shown(value)}")

  def __str__(self) -> str:
    low = self.least if self.above is None else self.above
    high = self.most if self.below is None else self.below
    if low is None:
      return f"be at most {high}" if self.below is None else f"be below {high}"
    if high is None:
      return f"be at least {low}" if self.above is None else f"be above {low}"
    if isinstance(low, int) and self.above is None and self.below is None:
      return f"lie in {low}..{high}"
    return f"lie in {'[' if self.above is None else '('}{low}, {high}{']' if self.below is None else ')'}"


@dataclasses.dataclass(frozen=True)
class AnyCharacters:
  """Marks a text that is data and no name: it may hold line ends, and `None` is a word."""


FreeText = Annotated[str, AnyCharacters()]
Count = Annotated[int, Bounds(least=1)]
Natural = Annotated[int, Bounds(least=0)]
Positive = Annotated[float, Bounds(above=0)]
NotNegative = Annotated[float, Bounds(least=0)]
# A key of JAX's generator is made of 32 bits: a larger seed would repeat the stream of a smaller one.
Seed = Annotated[int, Bounds(least=0), Bounds(most=2**32 - 1)]


def check_fields(config: Any) -> None:
  """Checks every field against its annotation: what the `__post_init__` of a config begins with.

  Lists become tuples and whole numbers floats, where the annotation asks for it. Messages name a field by its
  place in the whole config, of which the class says its own: `PATH: ClassVar[str] = "model.fast"`.

  Raises:
    ConfigError: for a value of the wrong type or outside its bounds.
  """
  path = home(type(config))
  for name, hint in annotations(type(config)).items():
    value = getattr(config, name)
    fitted = conform(hint, value, f"{path}{name}")
    if fitted is not value:
      object.__setattr__(config, name, fitted)


def check_seed(seed: Any, field: str) -> None:
  """Raises `ConfigError` unless `seed` is a whole number in 0..2^32 - 1; each of them has its own streams."""
  conform(Seed, seed, field)


def home(cls: type) -> str:
  """What the names of the fields begin with: `model.fast.`, or nothing."""
  path = getattr(cls, "PATH", "")
  return f"{path}." if path else ""


@functools.cache
def annotations(cls: type) -> dict[str, Any]:
  """Field -> annotation, bounds included, of a dataclass."""
  hints = typing.get_type_hints(cls, include_extras=True)
  return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def conform(hint: Any, value: Any, path: str) -> Any:
  """The value as a field of type `hint` holds it.

  Args:
    hint: the annotation. `Any` takes everything, a dataclass its instances alone.
    value: a list may stand for a tuple, a whole number for a float and, where a text may be left out, `None`
      or `none` for None.
    path: dotted name of the field, for messages.

  Raises:
    ConfigError: if the value is of the wrong type or outside its bounds.
  """
  bounds: Sequence[Any] = ()
  if typing.get_origin(hint) is Annotated:
    hint, *bounds = typing.get_args(hint)
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (types.UnionType, typing.Union):
    (kind,) = (a for a in args if a is not type(None))
    left_out = value is None or (kind is str and value in ("None", "none"))
    return None if left_out else conform(kind, value, path)
  if origin is Literal:
    check(isinstance(value, str), path, f"must be text, got {shown(value)}")
    one_of(value, args, path)
    return value
  if origin is tuple:
    return _tuple(args, value, path)
  if hint in (int, float):
    return _number(hint, value, bounds, path)
  if hint is str:
    return _text(value, path, free=AnyCharacters() in bounds)
  if hint is bool:
    check(isinstance(value, bool), path, f"must be true or false, got {shown(value)}")
  elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
    check(isinstance(value, hint), path, f"must be a group of fields, got {shown(value)}")
  return value


def _number(kind: type, value: Any, bounds: Iterable[Bounds], path: str) -> int | float:
  number = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
  check(number, path, f"must be a {'number' if kind is float else 'whole number'}, got {shown(value)}")
  for bound in bounds:
    bound.check(value, path)
  if kind is int:
    if all(b.most is None for b in bounds):
      check(value <= MOST_WHOLE, path, f"must be at most {MOST_WHOLE}, got {shown(value)}")
    check(value >= -MOST_WHOLE, path, f"must be at least {-MOST_WHOLE}, got {shown(value)}")
    return value
  fits = value == 0 or LEAST_FLOAT <= abs(value) <= MOST_FLOAT
  check(fits and not math.isnan(value), path, f"must be finite and of float32's range, got {shown(value)}")
  return float(value)


def _text(value: Any, path: str, *, free: bool) -> str:
  check(isinstance(value, str), path, f"must be text, got {shown(value)}")
  plain = free or not any(unicodedata.category(c) in ("Cc", "Cs") for c in value)
  check(plain, path, f"must be text without control characters, got {shown(value)}")
  check(free or len(value) <= MOST_TEXT, path, f"must have at most {MOST_TEXT} characters, got {len(value)}")
  return value


def _tuple(args: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
  check(isinstance(value, (tuple, list)), path, f"must be a list, got {shown(value)}")
  check(len(value) <= MOST_VALUES, path, f"must have at most {MOST_VALUES} values, got {len(value)}")
  if len(args) == 2 and args[1] is Ellipsis:
    args = (args[0],) * len(value)
  check(len(value) == len(args), path, f"must have {len(args)} values, got {len(value)}")
  return tuple(conform(a, v, f"{path}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))


@functools.cache
def documentation(cls: type) -> dict[str, str]:
  """Field -> what the docstring of a dataclass, or of one that it extends, says of it, on one line."""
  found: dict[str, str] = {}
  for base in reversed(cls.__mro__):
    text = inspect.cleandoc(base.__dict__.get("__doc__") or "")
    _, _, section = text.partition("\nAttributes:\n")
    section, *_ = re.split(r"\n(?=\S)", section, maxsplit=1)  # up to the next line that is not indented
    for entry in re.split(r"\n(?=  \w)", f"\n{section}"):
      names, colon, said = entry.partition(": ")
      if colon:
        found |= dict.fromkeys(names.strip().split(", "), " ".join(said.split()))
  return {field.name: found[field.name] for field in dataclasses.fields(cls) if field.name in found}
