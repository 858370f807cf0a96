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
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Self

from absl import logging

from sleep_jax.runtime.files import (
  Folder,
  WriteError,
  create,
  is_mistake,
  is_open_at,
  open_file,
  put_in_place,
  shown,
  why,
)
from sleep_jax.runtime.rows import MetricsError, check_fields, read_rows, restored

__all__ = ["MetricsError", "Silent", "Writer", "dumps", "read"]

_NAME = "metrics.jsonl"


def dumps(value: Any) -> str:
  """Valid JSON in one line; takes scalars of NumPy and JAX, tuples, and floats that are not finite."""
  return json.dumps(_plain(value), allow_nan=False)


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
  """All rows of a metrics.jsonl, in the order written, without a half-written last line.

  Raises:
    MetricsError: if any other line is no JSON object with a `kind` and a `step`, if a field has a wrong type,
      or if the file is none or cannot be read.
    FileNotFoundError: if there is no such file.
  """
  return [row for row, _ in read_rows(pathlib.Path(path))]


class Writer:
  """Appends rows to metrics.jsonl and their numbers to TensorBoard. A context manager.

  Every row is in the file before `write` returns, whole or not at all. TensorBoard and figures are best
  effort: the first failure of each is reported, and none stops the run.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    tensorboard: bool = True,
    report: Callable[[str], None] = logging.warning,
  ):
    """Opens workdir/metrics.jsonl for appending, after dropping a half-written last line.

    Args:
      workdir: the folder, which exists.
      tensorboard: whether to write for TensorBoard, too.
      report: takes one line about what failed and does not matter.

    Raises:
      MetricsError: if the file is damaged elsewhere, no file, or may not be written.
      WriteError: if the disk is full or does not work.
      OSError: if there is no such folder.
    """
    self._folder, self._report = Folder(workdir), report
    self._path, self._name = self._folder.base / _NAME, shown(self._folder.path / _NAME)
    self._tensorboard: Any = None
    self._want_tensorboard, self._purge_from = tensorboard, None
    self._warned: set[str] = set()
    self._last: dict[str, dict[str, Any]] = {}
    self._file: Any = None  # descriptor; None once closed
    self._rewrite(lambda row: True)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    if self._file is not None:
      os.close(self._file)
      self._file = None
    if self._tensorboard is not None:
      self._best_effort("TensorBoard", self._tensorboard.close)
      self._tensorboard, self._want_tensorboard = None, False

  def write(self, row: Mapping[str, Any]) -> None:
    """Appends one row.

    Args:
      row: has `kind` and `step`; values are numbers, strings, booleans, None, or nested lists and mappings.

    Raises:
      MetricsError: if the row lacks `kind` or `step`, or a value is none of these.
      WriteError: if it cannot be written; the file is as it was before.
    """
    if not isinstance(row.get("kind"), str) or not isinstance(row.get("step"), numbers.Integral):
      raise MetricsError(f"a row needs a kind and a step, got {dict(row)!r:.200}")
    try:
      line = dumps(row)
      written = restored(json.loads(line))
      check_fields(written)
    except (TypeError, ValueError) as e:
      raise MetricsError(f"the {row['kind']} row of step {row['step']} cannot be written: {e}") from e
    self._append(line.encode() + b"\n")
    self._last[row["kind"]] = written
    if self._want_tensorboard:
      self._best_effort("TensorBoard", lambda: self._to_tensorboard(row))

  def truncate_after(self, step: int, *, with_done: Collection[str] = ()) -> int:
    """Drops the rows of steps above `step`: a run that resumes from `step` will write them again.

    The file is replaced in one rename. TensorBoard is told to forget the same steps.

    Args:
      with_done: kinds of rows that a run writes at its end, before its `done` row. Where it was killed
        between the two it will write them again, so those of `step` are dropped as well.

    Returns:
      How many rows were dropped.
    """
    self._purge_from = step + 1
    try:
      ends = {row["step"] for row, _ in read_rows(self._path, self._name) if row["kind"] == "done"}
    except OSError as e:
      raise self._cannot_write(e) from e
    again = () if step in ends else with_done
    return self._rewrite(lambda row: row["step"] <= step - (row["kind"] in again))

  def last(self, kind: str | None = None) -> dict[str, Any] | None:
    """The newest row of a kind, or of any kind with a `wall_s`; None if there is none."""
    if kind is not None:
      return self._last.get(kind)
    timed = [row for row in self._last.values() if "wall_s" in row]
    return max(timed, key=lambda row: row["wall_s"], default=None)

  def lost(self) -> str | None:
    """What became of the file or of its folder, in one clause; None while both are where they were."""
    fate = self._folder.lost()
    if fate is not None:
      return f"the workdir {shown(self._folder.path)} {fate} while its run was going on"
    if not is_open_at(self._file, self._path):
      return f"{self._name} was deleted or replaced while its run was going on"
    return None

  def figure(self, name: str, draw: Callable[[pathlib.Path], object]) -> bool:
    """Calls `draw` with the path figures/`name`; whether it succeeded. It may fail, the run goes on."""
    path = self._folder.path / "figures" / name

    def make():
      path.parent.mkdir(parents=True, exist_ok=True)
      draw(path)

    return self._best_effort(f"figure {name}", make)

  def _append(self, data: bytes) -> None:
    before = os.fstat(self._file).st_size
    try:
      left = memoryview(data)
      while left:
        left = left[os.write(self._file, left) :]
    except OSError as e:
      with contextlib.suppress(OSError):
        os.ftruncate(self._file, before)
      raise self._cannot_write(e) from e

  def _rewrite(self, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Reopens the file with the rows that `keep` takes, untouched if that is all there is in it.

    A file that has another name elsewhere is replaced by one of its own, so that the other stays as it is.
    """
    if self._file is not None:
      os.close(self._file)
      self._file = None
    try:
      dropped = self._drop(keep) if os.path.lexists(self._path) else 0
      self._file = open_file(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    except OSError as e:
      raise self._cannot_write(e) from e
    return dropped

  def _drop(self, keep: Callable[[dict[str, Any]], bool]) -> int:
    last, dropped, good = {}, 0, 0
    for row, line in read_rows(self._path, self._name):
      if keep(row):
        last[row["kind"]], good = row, good + len(line) * (line == _whole(line))
      else:
        dropped += 1
    self._last = last
    there = os.stat(self._path)
    if there.st_size != good or there.st_nlink != 1:
      temporary = self._path.with_name(f".{_NAME}.tmp")
      with open(create(temporary), "wb") as f:
        f.writelines(_whole(line) for row, line in read_rows(self._path, self._name) if keep(row))
        f.flush()
        os.fsync(f.fileno())
      put_in_place(temporary, self._path)
    return dropped

  def _cannot_write(self, error: OSError) -> Exception:
    kind = MetricsError if is_mistake(error) else WriteError
    return kind(f"{self._name} cannot be written: {why(error)}")

  def _to_tensorboard(self, row: Mapping[str, Any]) -> None:
    from tensorboardX.summary import scalar  # a second to import, and a run without it is a run

    if self._tensorboard is None:
      self._tensorboard = self._open_tensorboard()
    for name, value in _plain(row).items():
      if name not in ("kind", "step") and isinstance(value, int | float):
        summary = scalar(f"{row['kind']}/{name}", value)
        event = _protos().Event(step=int(row["step"]), wall_time=time.time(), summary=summary)
        self._tensorboard.write_event(event)
    self._tensorboard.flush()

  def _open_tensorboard(self) -> Any:
    """A file of events; not SummaryWriter, whose thread and exit hook may keep a process from ending."""
    from tensorboardX.event_file_writer import EventsWriter

    folder = self._folder.base / "tb"
    if folder.is_symlink():
      raise OSError("tb is a symbolic link")
    folder.mkdir(exist_ok=True)
    suffix = f".{secrets.token_hex(4)}"  # a name that nobody can know before, and put a link there
    events = EventsWriter(str(folder / "events"), filename_suffix=suffix)
    if self._purge_from is not None:
      protos = _protos()
      start = protos.SessionLog(status=protos.SessionLog.START)
      events.write_event(protos.Event(step=self._purge_from, wall_time=time.time(), session_log=start))
    return events

  def _best_effort(self, what: str, do: Callable[[], object]) -> bool:
    try:
      do()
      return True
    except Exception as e:
      if what not in self._warned:
        self._warned.add(what)
        told = why(e) if isinstance(e, OSError) else e
        self._report(f"{what} failed, the run goes on without it: {type(e).__name__}: {told}")
      return False


class Silent(contextlib.nullcontext):
  """Takes what `Writer` takes and writes nothing: for all processes of a run but the first."""

  def __init__(self):
    super().__init__(self)

  def write(self, row: Mapping[str, Any]) -> None:
    """Drops the row."""
    del row

  def truncate_after(self, step: int, *, with_done: Collection[str] = ()) -> int:
    """Has no rows to drop."""
    del step, with_done
    return 0

  def last(self, kind: str | None = None) -> dict[str, Any] | None:
    """There is none."""
    del kind
    return None

  def lost(self) -> str | None:
    """There is nothing to lose."""
    return None


def _whole(line: bytes) -> bytes:
  return line.rstrip(b"\r\n") + b"\n"


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


def _protos() -> Any:
  """TensorBoard's messages, which are made when the module is imported, out of sight of a type checker."""
  from tensorboardX.proto import event_pb2

  return event_pb2
