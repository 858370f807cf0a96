"""What all configs share: their one kind of error, their checks, and the way from plain data and back."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any


class ConfigError(ValueError):
  """A mistake in a config: one line that names the field, what was wrong and what would be right."""


def check(condition: bool, field: str, problem: str) -> None:
  """Raises `ConfigError("field: problem")` unless `condition` holds."""
  if not condition:
    raise ConfigError(f"{field}: {problem}")


def nearest(name: str, known: Iterable[str]) -> str:
  """A clause that offers the nearest known name: `did you mean "x"?` or `known: a, b`."""
  known = list(known)
  close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
  return f'did you mean "{close[0]}"?' if close else f"known: {', '.join(known)}"


def one_of(value: str, known: Iterable[str], field: str) -> None:
  """Raises `ConfigError` unless `value` is one of `known`."""
  known = tuple(known)
  check(value in known, field, f"unknown value {value!r}; {nearest(str(value), known)}")


def at_least(value: float, least: float, field: str) -> None:
  """Raises `ConfigError` unless `value >= least`."""
  check(value >= least, field, f"must be at least {least}, got {value}")


def above(value: float, bound: float, field: str) -> None:
  """Raises `ConfigError` unless `value > bound`."""
  check(value > bound, field, f"must be above {bound}, got {value}")


def from_dict(cls: type, values: Mapping[str, Any], path: str = "") -> Any:
  """Builds a config dataclass from nested mappings.

  Args:
    cls: a dataclass of this module, or a task's own.
    values: field name -> value; a mapping where the field is itself a config.
    path: dotted name of `values` in the whole, for messages.

  Returns:
    An instance of `cls`, checked.

  Raises:
    ConfigError: for an unknown or missing field, a value of the wrong type, or one that the
      dataclass refuses; one line.
  """
  hints = typing.get_type_hints(cls)
  fields = {f.name: f for f in dataclasses.fields(cls)}
  built = {}
  for name, value in values.items():
    here = f"{path}{name}"
    check(name in fields, here, f"no such field; {nearest(name, fields)}")
    built[name] = _convert(hints[name], value, here)
  for name, field in fields.items():
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
      check(name in built, f"{path}{name}", "is required")
  return cls(**built)


def to_dict(config: Any) -> dict[str, Any]:
  """The config as nested plain data, for JSON; `from_dict` reads it back."""
  return dataclasses.asdict(config)


def defaults_of(config: Any) -> dict[str, Any]:
  """Of all fields of the config, and of the configs in it, those that have a default, with it; nested."""
  found = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      found[field.name] = defaults_of(value)
    elif field.default is not dataclasses.MISSING:
      found[field.name] = field.default
  return found


def replace(config: Any, **changes: Any) -> Any:
  """A copy with nested fields changed: `replace(c, sleep={"num_passes": 2}, seed=1)`."""
  flat = {}
  for name, value in changes.items():
    old = getattr(config, name)
    nested = dataclasses.is_dataclass(old) and isinstance(value, Mapping)
    flat[name] = replace(old, **value) if nested else value
  return dataclasses.replace(config, **flat)


def _convert(hint: Any, value: Any, path: str) -> Any:
  """`value` as the type `hint`; lists become tuples, whole numbers floats; nothing else is changed."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (types.UnionType, typing.Union):
    if value is None and type(None) in args:
      return None
    return _convert(next(a for a in args if a is not type(None)), value, path)
  if dataclasses.is_dataclass(hint):
    if isinstance(value, hint):
      return value
    check(isinstance(value, Mapping), path, f"must be a group of fields, got {value!r}")
    return from_dict(hint, value, f"{path}.")
  if origin is tuple:
    check(isinstance(value, (tuple, list)), path, f"must be a list, got {value!r}")
    if len(args) == 2 and args[1] is Ellipsis:
      return tuple(_convert(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    check(len(value) == len(args), path, f"must have {len(args)} values, got {len(value)}")
    return tuple(_convert(a, v, f"{path}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
  if hint is float:
    check(
      isinstance(value, (int, float)) and not isinstance(value, bool),
      path,
      f"must be a number, got {value!r}",
    )
    return float(value)
  if hint is int:
    check(
      isinstance(value, int) and not isinstance(value, bool), path, f"must be a whole number, got {value!r}"
    )
    return value
  if hint in (str, bool):
    check(
      isinstance(value, hint), path, f"must be {'text' if hint is str else 'true or false'}, got {value!r}"
    )
    return value
  return value
