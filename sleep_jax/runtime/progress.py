"""What a run says while it goes on, and the clocks behind it: progress with ETA, time over all its starts."""

import contextlib
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO


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
    speed, each = self.tokens_per_s, self.seconds_per_step
    if speed is not None and each is not None:
      parts.append(f"{_short(speed)} tokens/s")
      parts.append(f"eta {duration((self._total - step) * each)}")
    if mfu is not None:
      share = f" (sleep {100 * sleep:.0f} % of FLOPs)" if sleep is not None else ""
      parts.append(f"mfu {100 * mfu:.0f} %{share}")
    return self.say("  ".join(parts))

  def say(self, text: str) -> str:
    """Writes any line to the same stream."""
    return say(text, self._stream)


def say(text: str, stream: TextIO | None = None) -> str:
  """Writes a line to a stream, the standard output by default; one that is closed or full stops no run."""
  try:
    print(
      f"{text}\n", end="", file=stream or sys.stdout, flush=True
    )  # at once: other threads have lines, too
  except (OSError, ValueError):
    pass
  return text


def duration(seconds: float) -> str:
  """Two figures of a time are enough to plan by.

  >>> [duration(x) for x in (4, 720, 11_100, 183_600)]
  ['4 s', '12 min', '3 h 05 min', '2 d 3 h']
  """
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
