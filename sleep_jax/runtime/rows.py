"""Rows of metrics.jsonl as they are read: one JSON object a line, every known field of its type.

Whoever reads rows (a run that resumes, tables, figures) may rely on these types, so a damaged file is named
by its line here and nowhere else. Fields that no table names may hold anything.
"""

import functools
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sleep_jax.runtime.files import open_file, parse_json, shown, why

SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_LONGEST = 1 << 24  # bytes of a line
_TOP = 2**63  # above every count
_SLACK = 1e-6  # of sums and shares, which are computed in floating point


class MetricsError(ValueError):
  """metrics.jsonl is damaged, or a row cannot be written to it; the message is one line."""


def read_rows(path: pathlib.Path, name: str | None = None) -> Iterator[tuple[dict[str, Any], bytes]]:
  """(row, its line as it is) of all lines, the last one only if it is whole.

  Args:
    path: of the file.
    name: what messages call it; by default `path`.

  Raises:
    MetricsError: if any other line is no JSON object with a `kind` and a `step`, if a field has a wrong type,
      or if the file is none or cannot be read.
    FileNotFoundError: if there is no such file.
  """
  name = name or shown(path)
  try:
    with open(open_file(path), "rb") as f:
      number = 0
      while line := f.readline(_LONGEST):
        number += 1
        try:
          row = _row(line)
        except ValueError as e:
          if not line.endswith(b"\n") and len(line) < _LONGEST:
            return
          raise MetricsError(f"{name} line {number} is damaged: {e}; remove it or restore the file") from e
        yield row, line
  except FileNotFoundError:
    raise
  except OSError as e:
    raise MetricsError(f"{name} cannot be read: {why(e)}") from e


def restored(value: Any) -> Any:
  """A value read from JSON with the numbers that JSON lacks."""
  if isinstance(value, dict):
    return {k: restored(v) for k, v in value.items()}
  if isinstance(value, list):
    return [restored(v) for v in value]
  return SPECIAL.get(value, value) if isinstance(value, str) else value


def _row(line: bytes) -> dict[str, Any]:
  if len(line) == _LONGEST:
    raise ValueError(f"it is longer than {_LONGEST >> 20} MiB")
  row = parse_json(line)
  if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
    raise ValueError("it is no object with a kind")
  if "step" not in row:
    raise ValueError("it has no step")
  row = restored(row)
  check_fields(row)
  return row


def check_fields(row: Mapping[str, Any]) -> None:
  """Raises ValueError, naming the field, unless every known field of a row has its type."""
  for field, value in row.items():
    fault = (_check_of(field) or _any)(value)
    if fault:
      raise ValueError(f"{field} {fault}, got {value!r:.80}")


# What a field must hold: checks that give what is wrong, or None.


def _any(value: Any) -> str | None:
  if isinstance(value, dict | list):
    for inner in value.values() if isinstance(value, dict) else value:
      if fault := _any(inner):
        return fault
  if isinstance(value, int) and not -_TOP <= value < _TOP:
    return "must hold numbers of at most 64 bits"
  return None


def _number(value: Any) -> str | None:
  if isinstance(value, bool) or not isinstance(value, int | float):
    return "must be a number"
  return _any(value)


def _amount(value: Any) -> str | None:
  return _number(value) or (
    None if -_SLACK <= value < _TOP else "must be a number that is finite and at least 0"
  )


def _count(value: Any) -> str | None:
  whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _TOP
  return None if whole else "must be a whole number of at least 0"


def _rate(value: Any) -> str | None:
  fault = _number(value)
  share = fault is None and (math.isnan(value) or -_SLACK <= value <= 1 + _SLACK)
  return fault or (None if share else "must be a share from 0 to 1")


def _numbers(depth: int) -> Callable[[Any], str | None]:
  def check(value: Any, left: int = depth) -> str | None:
    if not left:
      return _number(value)
    if not isinstance(value, list):
      return "must hold lists of numbers"
    return next((fault for x in value if (fault := check(x, left - 1))), None)

  return check


def _mapping(depth: int, inner: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
  def check(value: Any, left: int = depth) -> str | None:
    if not left:
      return inner(value)
    if not isinstance(value, dict):
      return "must hold names and their values"
    return next((fault for x in value.values() if (fault := check(x, left - 1))), None)

  return check


_CHECKS = (
  (r"(.*_)?(step|tokens|windows|passes|asked|state_bytes)", _count),
  (r"wall_s|cpu_s|tokens_per_s|(wake|sleep)_ms_.*|learning_rate|mfu|data_wait", _amount),
  (r"(.*_)?(exact|bit|low|high|majority|shortcut)|padding", _rate),
  (r"(.*_)?(loss|norm)", _number),
  (r"change", _mapping(1, _numbers(2))),
  (r"(.*_)?by_answer", _mapping(2, _numbers(1))),
)


@functools.lru_cache(maxsize=4096)
def _check_of(field: str) -> Callable[[Any], str | None] | None:
  return next((check for pattern, check in _CHECKS if re.fullmatch(pattern, field)), None)
