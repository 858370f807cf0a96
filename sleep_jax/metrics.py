"""What a run measures: JSON lines (the truth), TensorBoard (a convenience), progress with ETA, clocks.

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
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
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


class Clock:
  """Time spent on a run over all its starts: wall clock and CPU time of this process, in seconds.

  Continues where the last row of metrics.jsonl stopped. Steps that a killed run took after its last
  checkpoint are taken again, and only their second time counts: the sum is what the curve cost.
  """

  def __init__(
    self,
    last_row: Mapping[str, Any] | None = None,
    *,
    wall: Callable[[], float] = time.monotonic,
    cpu: Callable[[], float] = time.process_time,
  ):
    row = last_row or {}
    self._wall, self._cpu = wall, cpu
    self._wall_0, self._cpu_0 = row.get("wall_s", 0.0) - wall(), row.get("cpu_s", 0.0) - cpu()

  @property
  def wall_s(self) -> float:
    return self._wall_0 + self._wall()

  @property
  def cpu_s(self) -> float:
    """User and system time of all threads of this process."""
    return self._cpu_0 + self._cpu()

  def times(self) -> dict[str, float]:
    """`wall_s` and `cpu_s`, as rows carry them."""
    return {"wall_s": self.wall_s, "cpu_s": self.cpu_s}

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Stops both clocks: compiling, evaluating and saving are not what a training step costs."""
    wall, cpu = self._wall(), self._cpu()
    try:
      yield
    finally:
      self._wall_0 -= self._wall() - wall
      self._cpu_0 -= self._cpu() - cpu


class Progress:
  """One line per logged step, plain enough for a log file:

      step  1200/10000  loss 0.4312  83.1k tokens/s  eta 12 min  mfu 41 % (sleep 78 % of FLOPs)

  The rate is the median over the last intervals between two lines, so neither the compilation of the first
  step nor an evaluation in between moves the ETA for long.
  """

  def __init__(
    self,
    total: int,
    *,
    window: int = 20,
    stream: TextIO | None = None,
    now: Callable[[], float] = time.monotonic,
  ):
    """
    Args:
      total: the step at which the run ends.
      window: how many intervals the rate is taken from.
      stream: where lines go; default the standard output of the time of writing.
      now: a clock in seconds.
    """
    self._total, self._stream, self._now = total, stream, now
    self._before: tuple[float, int, int] | None = None  # time, step, tokens
    self._intervals: deque[tuple[float, float]] = deque(maxlen=window)  # seconds a step, tokens a second

  @property
  def seconds_per_step(self) -> float | None:
    """Recent median; None before the second line."""
    return statistics.median(s for s, _ in self._intervals) if self._intervals else None

  @property
  def tokens_per_s(self) -> float | None:
    """Recent median; None before the second line."""
    return statistics.median(t for _, t in self._intervals) if self._intervals else None

  def update(self, step: int, tokens: int) -> None:
    """Books the time since the last call. `line` does it too.

    Args:
      step: steps taken, those of earlier starts included.
      tokens: tokens read, likewise.
    """
    now = self._now()
    if self._before is not None and step > self._before[1] and now > self._before[0]:
      then, old_step, old_tokens = self._before
      self._intervals.append(((now - then) / (step - old_step), (tokens - old_tokens) / (now - then)))
    self._before = (now, step, tokens)

  def line(
    self, step: int, tokens: int, loss: float, *, mfu: float | None = None, sleep: float | None = None
  ) -> str:
    """Writes one line and returns it.

    Args:
      step, tokens: as in `update`.
      loss: of this step.
      mfu: model FLOPs per second over the devices' peak, 0 to 1.
      sleep: the share of these FLOPs that the sleep passes take, 0 to 1.
    """
    self.update(step, tokens)
    width = len(str(self._total))
    parts = [f"step {step:>{width}}/{self._total}", f"loss {loss:.4f}"]
    if self._intervals:
      parts.append(f"{_short(self.tokens_per_s)} tokens/s")
      parts.append(f"eta {duration((self._total - step) * self.seconds_per_step)}")
    if mfu is not None:
      share = f" (sleep {100 * sleep:.0f} % of FLOPs)" if sleep is not None else ""
      parts.append(f"mfu {100 * mfu:.0f} %{share}")
    return self.say("  ".join(parts))

  def say(self, text: str) -> str:
    """Writes any line to the same stream; one that was closed stops no run."""
    try:
      print(text, file=self._stream or sys.stdout, flush=True)
    except (OSError, ValueError):
      pass
    return text


def duration(seconds: float) -> str:
  """`4 s`, `12 min`, `3 h 05 min`, `2 d 3 h`: two figures are enough to plan by."""
  seconds = max(0, round(seconds))
  if seconds < 90:
    return f"{seconds} s"
  minutes = round(seconds / 60)
  if minutes < 90:
    return f"{minutes} min"
  if minutes < 36 * 60:
    return f"{minutes // 60} h {minutes % 60:02} min"
  return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def _short(number: float) -> str:
  for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
    if abs(number) >= size:
      return f"{number / size:.3g}{unit}"
  return f"{number:.3g}"


# Dense bf16 FLOP/s of one device, from the vendors' datasheets (NVIDIA's halved where they count sparsity;
# Google Cloud's TPU system architecture pages). The first entry whose words are all in the name counts.
_PEAK_FLOPS = (
  (("h100", "pcie"), 756e12),
  (("h100", "nvl"), 835e12),
  (("h100",), 989e12),
  (("h200",), 989e12),
  (("a100",), 312e12),
  (("tpu v4",), 275e12),
  (("tpu v5 lite",), 197e12),
  (("tpu v5e",), 197e12),
  (("tpu v5",), 459e12),  # v5p calls itself "TPU v5"
  (("tpu v6",), 918e12),
)


def peak_flops(device: Any) -> float | None:
  """Peak dense bf16 FLOP/s of a device, or of a `device_kind`; None if it is not in the table (any CPU)."""
  kind = (device if isinstance(device, str) else device.device_kind).lower()
  if "tpu v4 lite" in kind or " mig " in kind:  # another chip, v4i; a slice of a chip
    return None
  return next((peak for words, peak in _PEAK_FLOPS if all(word in kind for word in words)), None)


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
