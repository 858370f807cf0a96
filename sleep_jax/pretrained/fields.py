"""`config.json` as data: every field is either understood and checked, or named in an error."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from sleep_jax.config import ConfigError, RopeScaling
from sleep_jax.config.model import MOST_BLOCKS, MOST_PASSES_AWAKE
from sleep_jax.pretrained import published

# What no model has more of. A file that claims more is refused before anything is made.
LARGEST = 1 << 24  # of a size
LAYERS, PASSES = MOST_BLOCKS, MOST_PASSES_AWAKE
LONGEST_WINDOW = 1 << 20  # tokens


class PretrainedError(ConfigError):
  """Something is wrong with a checkpoint in published format: one line that names what."""


class Fields:
  """Reads the fields of one JSON object, and remembers which were read.

  A field that is absent or null has the published default, if there is one.

  Args:
    values: the object.
    where: the file's name, for messages.
    defaults: field -> published default. None: there is one, but it is derived from other fields.
    prefix: what the names of these fields begin with, for messages and `ignore`: `rope_parameters.`.
    ignore: dotted names of unknown fields that change nothing.

  Attributes:
    assumed: dotted name -> published default, of the sizes and flags that the object lacks.
  """

  def __init__(
    self,
    values: Any,
    where: str,
    *,
    defaults: Mapping[str, Any] | None = None,
    prefix: str = "",
    ignore: Iterable[str] = (),
  ):
    self.where, self.prefix = where, prefix
    if not isinstance(values, Mapping):
      raise PretrainedError(f"{where}: {prefix.rstrip('.') or 'it'} must be an object, got {shown(values)}")
    self.values, self.assumed = values, {}
    self._defaults, self._ignore = dict(defaults or {}), frozenset(ignore)
    self._read: set[str] = set() if prefix else set(published.FREE)

  def get(self, name: str, kind: type, derived: Any = None) -> Any:
    """A field's value.

    Args:
      name: of the field.
      kind: int, float, bool or str. A whole number counts as a float; no float is infinite or NaN.
      derived: the value where the field is null, or absent without another published default.

    Raises:
      PretrainedError: if the value is of another type, or absent without a default.
    """
    self._read.add(name)
    value = self.values.get(name)
    if value is None:
      return self._default(name, kind, derived)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
      value = float(value) if abs(value) < 1e300 else math.inf
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
      raise self.error(name, f"must be of type {kind.__name__}, got {shown(self.values[name])}")
    if kind is float and not math.isfinite(value):
      raise self.error(name, f"must be a finite number, got {shown(self.values[name])}")
    return value

  def size(self, name: str, derived: int | None = None, *, most: int = LARGEST) -> int:
    """A whole number from 1 to `most`, as `get`."""
    value = self.get(name, int, derived)
    if not 1 <= value <= most:
      raise self.error(name, f"must lie in 1..{most}, got {shown(value)}")
    return value

  def positive(self, name: str) -> float:
    """A float above 0, as `get`."""
    value = self.get(name, float)
    if value <= 0:
      raise self.error(name, f"must be above 0, got {value}")
    return value

  def only(self, name: str, allowed: Iterable[Any], why: str) -> None:
    """Refuses a field that is neither null nor one of `allowed`. Its default must be one of them too."""
    self._read.add(name)
    value = self.values.get(name)
    if value is not None and not any(type(value) is type(x) and value == x for x in allowed):
      raise self.error(name, f"= {shown(value)} is not supported ({why})")

  def skip(self, *names: str) -> None:
    """Notes that these fields are known and change nothing."""
    self._read.update(names)

  def given(self, name: str) -> bool:
    """Whether the field is there and not null."""
    return self.values.get(name) is not None

  def group(self, name: str, defaults: Mapping[str, Any] | None = None, *, config: bool = False) -> "Fields":
    """A field that is itself an object.

    Args:
      config: that is a whole config, with all that any of them may have.
    """
    self._read.add(name)
    inner = Fields(
      self.values.get(name),
      self.where,
      defaults=defaults,
      prefix=f"{self.prefix}{name}.",
      ignore=self._ignore,
    )
    if config:
      inner.skip(*published.FREE)
    return inner

  def settle(self, reads: Iterable[str] = ()) -> None:
    """Refuses values of `published.SETTLED` that would change something; the caller reads the fields
    `reads`.
    """
    for name, (allowed, why) in published.SETTLED.items():
      if name not in reads:
        self.only(name, allowed, why)

  def names(
    self, name: str, length: int, known: Iterable[str], default: str | None = None
  ) -> tuple[str, ...]:
    """A list of `length` names, each one of `known`; `default`, repeated, where the field is null."""
    self._read.add(name)
    values, known = self.values.get(name), tuple(known)
    if values is None and default is not None:
      return (default,) * length
    if not isinstance(values, list) or len(values) != length:
      raise self.error(name, f"must be a list of {length} names")
    for i, value in enumerate(values):
      if not isinstance(value, str) or value not in known:
        raise self.error(f"{name}[{i}]", f"= {shown(value)} is not supported; known: {', '.join(known)}")
    return tuple(values)

  def error(self, name: str, problem: str) -> PretrainedError:
    """An error about a field, in one line."""
    return PretrainedError(f"{self.where}: {self.prefix}{name} {problem}")

  def finish(self) -> None:
    """Refuses what nobody read.

    Raises:
      PretrainedError: listing the unknown fields by their dotted names.
    """
    unknown = [self.prefix + name for name in set(self.values) - self._read]
    unknown = sorted(name for name in unknown if name not in self._ignore)
    if unknown:
      raise PretrainedError(
        f"{self.where}: unknown field(s) {listing(unknown)}; a field that changes nothing can be named in"
        " `ignore`"
      )

  def _default(self, name: str, kind: type, derived: Any) -> Any:
    """What holds where a field is absent or null."""
    default = self._defaults.get(name)
    if default is None or (derived is not None and name in self.values):
      default = derived
    if default is None:
      raise self.error(name, "is missing")
    if kind in (int, bool):
      self.assumed[self.prefix + name] = default
    return default


def rope_theta(fields: Fields) -> float:
  """The base of plain rotary angles; refuses angles that are scaled."""
  theta, scaling = rope(fields)
  if scaling.kind != "none":
    raise PretrainedError(
      f"{fields.where}: rotary angles scaled in the {scaling.kind} way are not supported here"
    )
  return theta


# Fields that each kind of scaling may have and does not use (transformers 5.23.0,
# modeling_rope_utils.py).
_UNUSED = {
  "linear": ("original_max_position_embeddings", "attention_factor"),
  "llama3": ("attention_factor",),
}
_UNUSED["default"] = (
  *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
  *("short_factor", "long_factor", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim"),
  "truncate",
)


def rope(fields: Fields, reads: tuple[str, ...] = ()) -> tuple[float, RopeScaling]:
  """Base and scaling of rotary angles.

  Older files have `rope_theta` and `rope_scaling`, newer ones have both in `rope_parameters`.

  Args:
    reads: fields of these two that the caller reads, or that change nothing.
  """
  names = ("rope_parameters", "rope_scaling")
  groups = [fields.group(name) for name in names if fields.values.get(name)]
  for name in names:
    if not fields.values.get(name):
      fields.only(name, ({},), "it must be an object")
  bases = [(g.prefix, g.positive("rope_theta")) for g in (*groups, fields) if g.given("rope_theta")]
  for prefix, base in bases:
    if base != bases[0][1]:
      raise PretrainedError(
        f"{fields.where}: {prefix}rope_theta is {base}, {bases[0][0]}rope_theta is {bases[0][1]}"
      )
  theta = bases[0][1] if bases else fields.positive("rope_theta")
  fields.skip("rope_theta")
  for group in groups:
    group.skip(*reads)
  scalings = [_scaling(group, fields.values.get("max_position_embeddings"), reads) for group in groups]
  if scalings and scalings[0] != scalings[-1]:
    raise fields.error("rope_scaling", "says otherwise than rope_parameters")
  return theta, scalings[0] if scalings else RopeScaling()


def _scaling(group: Fields, longest: Any, reads: tuple[str, ...]) -> RopeScaling:
  """What one of these objects says; `type` is what the oldest files call `rope_type`.

  Args:
    group: the object.
    longest: `max_position_embeddings`, from which a llama3 scaling starts unless it says otherwise.
    reads: fields that are read elsewhere.
  """
  name = "type" if not group.given("rope_type") and group.given("type") else "rope_type"
  kind = group.get(name, str, "default")
  group.only("type", (kind,), "rope_type says otherwise")
  group.skip("rope_theta", *_UNUSED.get(kind, ()))
  if "partial_rotary_factor" not in reads:
    group.only("partial_rotary_factor", (1, 1.0), "rotary angles turn the whole head")
  if kind == "default":
    scaling = RopeScaling()
  elif kind == "linear":
    scaling = RopeScaling("linear", group.get("factor", float))
  else:
    group.only(name, ("llama3",), "known: default, linear, llama3")
    low, high = (group.get(f"{end}_freq_factor", float) for end in ("low", "high"))
    whole = longest if isinstance(longest, int) and longest else None
    original = group.size("original_max_position_embeddings", whole)
    scaling = RopeScaling("llama3", group.get("factor", float), low, high, original)
  group.finish()
  return scaling


def shown(value: Any, most: int = 60) -> str:
  """A value from a file as text of one line and at most `most` characters."""
  try:
    return f"{value!r:.{most}}"
  except (RecursionError, ValueError):  # nested too deeply, or a number of thousands of digits
    return f"a {type(value).__name__}"


def listing(names: list[str], most: int = 12) -> str:
  """Names as text in one line, the first ones only if there are many."""
  text = [name if name.isprintable() and 0 < len(name) <= 120 else shown(name) for name in names[:most]]
  return ", ".join(text) + (f" and {len(names) - most} more" if len(names) > most else "")
