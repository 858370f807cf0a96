"""`config.json` as data: every field is either understood and checked, or named in an error."""

from collections.abc import Iterable, Mapping
from typing import Any

from sleep_jax.config import ConfigError, RopeScaling


class PretrainedError(ConfigError):
  """Something is wrong with a checkpoint in published format: one line that names what."""


# Fields that say nothing about the numbers that the model computes. `auto_map` names code, never loaded.
HARMLESS = frozenset(
  "architectures auto_map model_type torch_dtype dtype transformers_version use_cache initializer_range"
  " bos_token_id eos_token_id pad_token_id max_window_layers max_position_embeddings _name_or_path"
  " pretraining_tp attention_dropout hidden_dropout layer_types".split()
)


class Fields:
  """Reads the fields of one JSON object, and remembers which were read.

  Args:
    values: the object.
    where: its name in messages.
  """

  def __init__(self, values: Any, where: str):
    if not isinstance(values, Mapping):
      raise PretrainedError(f"{where}: must be an object, got {values!r:.60}")
    self.values, self.where, self._read = values, where, set(HARMLESS)

  def get(self, name: str, kind: type, default: Any = None) -> Any:
    """A field's value of type int, float, bool or str; without a default it must be there.

    Raises:
      PretrainedError: if it is absent or of another type.
    """
    self._read.add(name)
    value = self.values.get(name)
    if value is None:
      if default is None:
        raise PretrainedError(f"{self.where}: {name} is missing")
      return default
    numeric = kind is float and isinstance(value, int) and not isinstance(value, bool)
    if numeric:
      value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
      raise PretrainedError(f"{self.where}: {name} must be of type {kind.__name__}, got {value!r:.60}")
    return value

  def size(self, name: str, default: int | None = None) -> int:
    """A whole number from 1 to 2^24."""
    value = self.get(name, int, default)
    if not 1 <= value <= 1 << 24:
      raise PretrainedError(f"{self.where}: {name} must lie in 1..{1 << 24}, got {value}")
    return value

  def only(self, name: str, allowed: Iterable[Any], why: str) -> None:
    """Refuses a field whose value is not one of `allowed`; None in it stands for an absent one too."""
    self._read.add(name)
    allowed = tuple(allowed)
    if self.values.get(name) not in allowed:
      raise PretrainedError(f"{self.where}: {name} = {self.values[name]!r:.60} is not supported ({why})")

  def group(self, name: str) -> "Fields":
    """A field that is itself an object."""
    self._read.add(name)
    return Fields(self.values.get(name), f"{self.where}: {name}")

  def names(
    self, name: str, length: int, known: Iterable[str], default: str | None = None
  ) -> tuple[str, ...]:
    """A list of `length` names, each one of `known`."""
    self._read.add(name)
    values, known = self.values.get(name), tuple(known)
    if values is None and default is not None:
      return (default,) * length
    if not isinstance(values, list) or len(values) != length:
      raise PretrainedError(f"{self.where}: {name} must be a list of {length} names")
    for i, value in enumerate(values):
      if value not in known:
        raise PretrainedError(
          f"{self.where}: {name}[{i}] = {value!r:.60} is not supported; known: {', '.join(known)}"
        )
    return tuple(values)

  def finish(self, ignore: Iterable[str] = ()) -> None:
    """Refuses what nobody read.

    Raises:
      PretrainedError: listing the unknown fields.
    """
    unknown = sorted(set(self.values) - self._read - set(ignore))
    if unknown:
      raise PretrainedError(
        f"{self.where}: unknown field(s) {', '.join(map(str, unknown))}; a field that changes nothing can be"
        " named in `ignore`"
      )


def rope_theta(fields: Fields) -> float:
  """The base of plain rotary angles; refuses angles that are scaled."""
  theta, scaling = rope(fields)
  if scaling.kind != "none":
    raise PretrainedError(
      f"{fields.where}: rotary angles scaled in the {scaling.kind} way are not supported here"
    )
  return theta


def rope(fields: Fields) -> tuple[float, RopeScaling]:
  """Base and scaling of rotary angles.

  Older files have `rope_theta` and `rope_scaling`, newer ones have both in `rope_parameters`.
  """
  if fields.values.get("rope_parameters") is None:
    fields.only("rope_parameters", (None,), "")
    theta = fields.get("rope_theta", float)
    if fields.values.get("rope_scaling") is None:
      fields.only("rope_scaling", (None,), "")
      return theta, RopeScaling()
    return theta, _scaling(fields.group("rope_scaling"))
  fields.only("rope_scaling", (None,), "rope_parameters says it")
  group = fields.group("rope_parameters")
  theta = group.get("rope_theta", float)
  fields.only("rope_theta", (None, theta), "rope_parameters says otherwise")
  return theta, _scaling(group)


def _scaling(group: Fields) -> RopeScaling:
  """What one of these objects says; `type` is what the oldest files call `rope_type`."""
  name = "type" if group.values.get("rope_type") is None and "type" in group.values else "rope_type"
  kind = group.get(name, str, "default")
  group.only("type", (None, kind), "rope_type says otherwise")
  if kind == "default":
    scaling = RopeScaling()
  elif kind == "linear":
    scaling = RopeScaling("linear", group.get("factor", float))
  else:
    group.only(name, ("llama3",), "known: default, linear, llama3")
    low, high = (group.get(f"{end}_freq_factor", float) for end in ("low", "high"))
    scaling = RopeScaling(
      "llama3", group.get("factor", float), low, high, group.size("original_max_position_embeddings")
    )
  group.finish()
  return scaling
