"""What the measuring tools read from compilers and write as tables."""

import csv
import dataclasses
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def temp_bytes(compiled: Any) -> int:
  """Bytes that a compiled program (`jax.stages.Compiled`) needs beside its arguments and results.

  Raises:
    RuntimeError: the compiler does not say.
  """
  analysis = compiled.memory_analysis()
  if analysis is None:
    raise RuntimeError("the compiler gives no analysis of the program's memory")
  return analysis.temp_size_in_bytes


def find(pattern: str, text: str, flags: re.RegexFlag = re.NOFLAG) -> str:
  """The first group of the first match.

  Raises:
    ValueError: there is no match.
  """
  found = re.search(pattern, text, flags)
  if found is None:
    raise ValueError(f"{pattern!r} is not in {text[:200]!r}")
  return found[1]


def write_csv(path: Path, rows: Sequence[Any]) -> None:
  """Dataclasses of one kind (at least one of them), a line each, under the names of their fields."""
  table = io.StringIO()
  names = [field.name for field in dataclasses.fields(rows[0])]
  writer = csv.DictWriter(table, names, lineterminator="\n")
  writer.writeheader()
  writer.writerows([dataclasses.asdict(row) for row in rows])
  path.write_text(table.getvalue(), encoding="utf-8")
