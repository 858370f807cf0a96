"""The way of a config from plain data and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sleep_jax.config import fields
from sleep_jax.config.checks import ConfigError, check, nearest, shown
from sleep_jax.config.run import Config


def from_dict(cls: type, values: Mapping[str, Any], path: str | None = None) -> Any:
  """Builds a config dataclass from nested mappings.

  Args:
    cls: a dataclass of this package, or a task's own.
    values: field name -> value; a mapping where the field is itself a config.
    path: what the names of the fields begin with in messages, `pretrained.fast.` say. None: what the class
      says itself, since it has one usual place.

  Returns:
    An instance of `cls`, checked.

  Raises:
    ConfigError: for an unknown or missing field, a value of the wrong type, or one that the
      dataclass refuses; one line.
  """
  usual = fields.home(cls)
  path = usual if path is None else path
  check(
    isinstance(values, Mapping), path.removesuffix("."), f"must be a group of fields, got {shown(values)}"
  )
  hints = fields.annotations(cls)
  built = {}
  for name, value in values.items():
    here = f"{path}{name if isinstance(name, str) else shown(name)}"
    check(name in hints, here, f"no such field; {nearest(name, hints)}")
    built[name] = _convert(hints[name], value, here)
  for field in dataclasses.fields(cls):
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
      check(field.name in built, f"{path}{field.name}", "is required")
  try:
    return cls(**built)
  except ConfigError as e:
    if usual == path or not str(e).startswith(usual):
      raise
    raise ConfigError(f"{path}{str(e).removeprefix(usual)}") from e


def run_from_dict(data: type, values: Mapping[str, Any]) -> Config:
  """Builds the config of a run whose task has a `data` of its own class.

  Args:
    data: the dataclass of `Config.data`.
    values: as in a config file or a run's config.json.

  Raises:
    ConfigError: as `from_dict`, and if there is no `data`.
  """
  check("data" in values, "data", "is required")
  return from_dict(Config, {**values, "data": from_dict(data, values["data"], "data.")})


def to_dict(config: Any) -> dict[str, Any]:
  """The config as nested plain data, for JSON; `from_dict` reads it back."""
  return dataclasses.asdict(config)


def defaults_of(config: Any) -> dict[str, Any]:
  """The fields that have a default, each with it, as nested plain data.

  Args:
    config: whose fields, and those of the configs in it, are meant; their values do not matter.
  """
  found = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      found[field.name] = defaults_of(value)
    elif field.default is not dataclasses.MISSING:
      found[field.name] = field.default
  return found


def replace(config: Any, **changes: Any) -> Any:
  """A copy with nested fields changed: `replace(c, sleep={"num_passes": 2}, seed=1)`.

  Raises:
    ConfigError: for a field that there is not, or a value that does not fit.
  """
  flat = {}
  for name, value in changes.items():
    hints = fields.annotations(type(config))
    check(name in hints, f"{fields.home(type(config))}{name}", f"no such field; {nearest(name, hints)}")
    old = getattr(config, name)
    nested = dataclasses.is_dataclass(old) and isinstance(value, Mapping)
    flat[name] = replace(old, **value) if nested else value
  return dataclasses.replace(config, **flat)


def _convert(hint: Any, value: Any, path: str) -> Any:
  """`value` as a field of type `hint` holds it; a mapping becomes the config that it describes."""
  if isinstance(hint, type) and dataclasses.is_dataclass(hint) and not isinstance(value, hint):
    return from_dict(hint, value, f"{path}.")
  return fields.conform(hint, value, path)
