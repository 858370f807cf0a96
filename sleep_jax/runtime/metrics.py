"""What a run measures: JSON lines (the truth) and TensorBoard (a convenience).

metrics.jsonl holds one JSON object a line. NaN and the infinities, which JSON lacks, are written as the
strings "NaN", "Infinity" and "-Infinity", so that every JSON reader takes the file and a diverged loss still
tells how; `read` turns them back into floats. A line that a killed run left half written is dropped: by
`read` from what it returns, by `Writer` from the file.
"""

import contextlib
import json
import math
import numbers
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self, TextIO

from absl import logging

_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsError(ValueError):
  """metrics.jsonl is damaged, or a row cannot be written to it; the message is one line."""


def dumps(value: Any) -> str:
  """Valid JSON in one line; takes scalars of NumPy and JAX, tuples, and floats that are not finite."""
  return json.dumps(_plain(value), allow_nan=False)


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
  """All rows of a metrics.jsonl, in the order written, without a half-written last line.

  Raises:
    MetricsError: if any other line is no JSON object with a `kind`.
    OSError: if there is no such file.
  """
  return [row for row, _ in _rows(pathlib.Path(path))]


class Writer:
  """Appends rows to metrics.jsonl and their numbers to TensorBoard. A context manager.

  The file is flushed at every row. TensorBoard and figures are best effort: the first failure of each is
  reported, and none stops the run.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    tensorboard: bool = True,
    report: Callable[[str], None] = logging.warning,
  ):
    """Opens workdir/metrics.jsonl for appending, after dropping a half-written last line.

    Raises:
      MetricsError: if the file is damaged elsewhere.
      OSError: if it cannot be written.
    """
    self._workdir, self._report = pathlib.Path(workdir), report
    self._path = self._workdir / "metrics.jsonl"
    self._tensorboard: Any = None
    self._want_tensorboard, self._purge_from = tensorboard, None
    self._warned: set[str] = set()
    self._last: dict[str, dict[str, Any]] = {}
    self._file: TextIO | None = None
    self._rewrite(lambda row: True)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._file = None
    if self._tensorboard is not None:
      self._best_effort("TensorBoard", self._tensorboard.close)
      self._tensorboard, self._want_tensorboard = None, False

  def write(self, row: Mapping[str, Any]) -> None:
    """Appends one row and flushes it.

    Args:
      row: has `kind` and `step`; values are numbers, strings, booleans, None, or nested lists and mappings.

    Raises:
      MetricsError: if the row lacks `kind` or `step`, or a value is none of these.
    """
    if not isinstance(row.get("kind"), str) or not isinstance(row.get("step"), numbers.Integral):
      raise MetricsError(f"a row needs a kind and a step, got {dict(row)!r:.200}")
    try:
      line = dumps(row)
    except TypeError as e:
      raise MetricsError(f"the {row['kind']} row of step {row['step']} cannot be written as JSON: {e}") from e
    self._file.write(line + "\n")
    self._file.flush()
    self._last[row["kind"]] = _restored(json.loads(line))
    if self._want_tensorboard:
      self._best_effort("TensorBoard", lambda: self._to_tensorboard(row))

  def truncate_after(self, step: int) -> int:
    """Drops the rows of steps above `step`: a run that resumes from `step` will write them again.

    The file is replaced in one rename. TensorBoard is told to forget the same steps.

    Returns:
      How many rows were dropped.
    """
    self._purge_from = step + 1
    return self._rewrite(lambda row: row.get("step", 0) <= step)

  def last(self, kind: str | None = None) -> dict[str, Any] | None:
    """The newest row of a kind, or of any kind with a `wall_s`; None if there is none."""
    if kind is not None:
      return self._last.get(kind)
    timed = [row for row in self._last.values() if "wall_s" in row]
    return max(timed, key=lambda row: row["wall_s"], default=None)

  def figure(self, name: str, draw: Callable[[pathlib.Path], object]) -> bool:
    """Calls `draw` with the path figures/`name`; whether it succeeded. It may fail, the run goes on."""
    path = self._workdir / "figures" / name

    def make():
      path.parent.mkdir(parents=True, exist_ok=True)
      draw(path)

    return self._best_effort(f"figure {name}", make)

  def _rewrite(self, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Reopens the file with the rows that `keep` takes, untouched if that is all there is in it."""
    rows = _rows(self._path) if self._path.exists() else []
    kept = [(row, line) for row, line in rows if keep(row)]
    text = b"".join(line for _, line in kept)
    if self._file is not None:
      self._file.close()
    if self._path.exists() and text != self._path.read_bytes():
      temporary = self._path.with_name(f".{self._path.name}.tmp")
      with open(temporary, "wb") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
      os.replace(temporary, self._path)
    self._last = {row["kind"]: row for row, _ in kept}
    self._file = open(self._path, "a", encoding="utf-8")
    return len(rows) - len(kept)

  def _to_tensorboard(self, row: Mapping[str, Any]) -> None:
    if self._tensorboard is None:
      from tensorboardX import SummaryWriter  # a second to import, and a run without it is a run

      self._tensorboard = SummaryWriter(str(self._workdir / "tb"), purge_step=self._purge_from)
    for name, value in _plain(row).items():
      if name not in ("kind", "step") and isinstance(value, int | float):
        self._tensorboard.add_scalar(f"{row['kind']}/{name}", value, int(row["step"]))
    self._tensorboard.flush()

  def _best_effort(self, what: str, do: Callable[[], object]) -> bool:
    try:
      do()
      return True
    except Exception as e:
      if what not in self._warned:
        self._warned.add(what)
        self._report(f"{what} failed, the run goes on without it: {type(e).__name__}: {e}")
      return False


class Silent(contextlib.nullcontext):
  """Takes what `Writer` takes and writes nothing: for all processes of a run but the first."""

  def __init__(self):
    super().__init__(self)

  def write(self, row: Mapping[str, Any]) -> None:
    """Drops the row."""
    del row

  def truncate_after(self, step: int) -> int:
    """Has no rows to drop."""
    del step
    return 0

  def last(self, kind: str | None = None) -> dict[str, Any] | None:
    """There is none."""
    del kind
    return None


def _rows(path: pathlib.Path) -> list[tuple[dict[str, Any], bytes]]:
  """(row, its line) for all lines; the last one only if it is whole."""
  rows = []
  lines = path.read_bytes().splitlines(keepends=True)
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
      if not isinstance(row["kind"], str):
        raise TypeError("kind is no string")
    except (ValueError, KeyError, TypeError) as e:
      if number == len(lines) and not line.endswith(b"\n"):
        break
      raise MetricsError(f"{path} line {number} is damaged: {e}") from e
    rows.append((_restored(row), line.rstrip(b"\r\n") + b"\n"))
  return rows


def _plain(value: Any) -> Any:
  if value is None or isinstance(value, bool | str):
    return value
  if isinstance(value, Mapping):
    return {str(k): _plain(v) for k, v in value.items()}
  if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a scalar of NumPy or JAX
    value = value.item()
    if isinstance(value, bool):
      return value
  if isinstance(value, numbers.Integral):
    return int(value)
  if isinstance(value, numbers.Real):
    value = float(value)
    if math.isfinite(value):
      return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
  if hasattr(value, "tolist"):
    return _plain(value.tolist())
  if isinstance(value, Iterable):
    return [_plain(v) for v in value]
  raise TypeError(f"a {type(value).__name__} is no number, string, list or mapping")


def _restored(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _restored(v) for k, v in value.items()}
  if isinstance(value, list):
    return [_restored(v) for v in value]
  return _SPECIAL.get(value, value) if isinstance(value, str) else value
