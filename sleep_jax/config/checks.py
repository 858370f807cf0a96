"""The one kind of error of all configs, and the checks that raise it."""

import difflib
import math
from collections.abc import Iterable
from typing import Any

LONGEST = 80  # characters of a value in a message


class ConfigError(ValueError):
  """A mistake in a config: one line that names the field, what was wrong and what would be right."""


def check(condition: bool, field: str, problem: str) -> None:
  """Raises `ConfigError("field: problem")` unless `condition` holds."""
  if not condition:
    raise ConfigError(f"{field}: {problem}")


def shown(value: Any) -> str:
  """A value as a message shows it: on one line, and not endless."""
  if isinstance(value, int) and abs(value) >= 10**20:
    return f"a number of {math.ceil(abs(value).bit_length() * math.log10(2))} digits"
  try:
    text = " ".join(repr(value).split())
  except ValueError:  # of numbers in a list: Python writes no whole number of more than 4,300 digits
    text = f"a {type(value).__name__}"
  return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def nearest(name: str, known: Iterable[str]) -> str:
  """A clause that offers the nearest known name: `did you mean "x"?` or `known: a, b`."""
  known = list(known)
  close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
  return f'did you mean "{close[0]}"?' if close else f"known: {', '.join(known)}"


def one_of(value: str, known: Iterable[str], field: str) -> None:
  """Raises `ConfigError` unless `value` is one of `known`."""
  known = tuple(known)
  check(value in known, field, f"unknown value {shown(value)}; {nearest(str(value), known)}")


def at_least(value: float, least: float, field: str) -> None:
  """Raises `ConfigError` unless `value >= least`."""
  check(value >= least, field, f"must be at least {least}, got {shown(value)}")


def above(value: float, bound: float, field: str) -> None:
  """Raises `ConfigError` unless `value > bound`."""
  check(value > bound, field, f"must be above {bound}, got {shown(value)}")
