"""Parts of a long measurement, each a process in a time box of its own, its result written as soon as it
ends.

A second start skips the parts that are done and goes on with the others.
"""

import contextlib
import dataclasses
import datetime
import os
import pathlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from sleep_jax.benchmarks.command import Journal, say
from sleep_jax.experiments import cli

KEYS = ("part", "state", "code", "seconds", "box_s", "rows", "tail", "ended", "asked")
DONE, STOPPED, FAILED = "done", "stopped", "failed"
LEAST_S = 5.0  # a shorter box is not begun: a process takes as long to start
TAIL = 2000  # characters of a part's output that are kept beside its rows


@dataclasses.dataclass(frozen=True)
class Part:
  """One process of the series.

  Attributes:
    name: in the results.
    command: its command line. Exit code 0: done; 3: stopped and saved; any other: failed.
    weight: its share of the time, relative to the parts that are still to come.
    rows: reads what it has measured, finished or not.
    environment: variables beside the caller's.
  """

  name: str
  command: Sequence[str]
  weight: float
  rows: Callable[[], list[dict[str, Any]]]
  environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Ended:
  """How a process ended.

  Attributes:
    code: its exit code, negative for a signal.
    seconds: it took.
    late: whether it was asked to end, since its time was up or the series was stopped.
  """

  code: int
  seconds: float
  late: bool

  @property
  def state(self) -> str:
    """`done`, `stopped` (a later start goes on with it) or `failed`."""
    if self.code == cli.DONE:
      return DONE
    return STOPPED if self.late or self.code == cli.STOPPED else FAILED


def run_child(part: Part, log: pathlib.Path, *, box_s: float, grace_s: float, stop: threading.Event) -> Ended:
  """Runs a part's process for at most `box_s` seconds; then it is asked to end, and after `grace_s` it must.

  Args:
    log: what it prints is appended here.
    stop: when it is set, the process is asked to end at once.
  """
  begun, late = time.monotonic(), False
  with open(log, "ab") as out:
    child = subprocess.Popen(
      part.command,
      stdin=subprocess.DEVNULL,
      stdout=out,
      stderr=subprocess.STDOUT,
      env=os.environ | part.environment,
      start_new_session=True,  # a Ctrl-C reaches it through us; its own children end with it
    )
    try:
      while child.poll() is None and not late:
        late = stop.wait(0.05) or time.monotonic() - begun >= box_s
      if late:
        _send(child, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
          child.wait(grace_s)
    finally:
      _send(child, signal.SIGKILL)  # whatever is left of its session
      child.wait()
  return Ended(child.returncode, time.monotonic() - begun, late)


def _send(child: subprocess.Popen, number: int) -> None:
  with contextlib.suppress(ProcessLookupError, PermissionError):
    os.killpg(child.pid, number)


def run_all(
  parts: Sequence[Part],
  journal: Journal,
  logs: pathlib.Path,
  *,
  seconds: float,
  grace_s: float,
  asked: Mapping[str, Any],
  stop: threading.Event,
) -> None:
  """Runs the parts that are not done, one after the other, within `seconds` in all.

  The time that is left is shared out among the parts that are left, by their weights: what one does not use
  goes to those behind it.

  Args:
    journal: of lines with `KEYS`; a line is added when a part ends.
    logs: folder of what the parts print.
    grace_s: within the box, that a process has to end in when its time is up.
    asked: goes into each line.
    stop: when it is set, the part that runs is asked to end, and no other begins.
  """
  end = time.monotonic() + seconds
  waiting = [part for part in parts if part.name not in done(journal.rows)]
  for i, part in enumerate(waiting):
    left = end - time.monotonic()
    box_s = left * part.weight / sum(other.weight for other in waiting[i:])
    if stop.is_set() or box_s < LEAST_S:
      say(f"{part.name}: not begun")
      continue
    say(f"{part.name}: at most {box_s:.0f} s")
    soft_s = max(box_s - grace_s, box_s / 2)
    log = logs / f"{part.name}.log"
    ended = run_child(part, log, box_s=soft_s, grace_s=box_s - soft_s, stop=stop)
    rows, tail = _read(part), _tail(log)
    journal.add(
      {
        "part": part.name,
        "state": ended.state,
        "code": ended.code,
        "seconds": round(ended.seconds, 1),
        "box_s": round(box_s, 1),
        "rows": rows,
        "tail": tail,
        "ended": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "asked": dict(asked),
      }
    )
    say(f"{part.name}: {ended.state} after {ended.seconds:.0f} s, exit code {ended.code}")


def done(rows: Sequence[Mapping[str, Any]]) -> Collection[str]:
  """The names of the parts that are done."""
  return {row["part"] for row in rows if row["state"] == DONE}


def latest(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
  """Name -> the last line about each part."""
  return {row["part"]: row for row in rows}


def _read(part: Part) -> list[dict[str, Any]]:
  """The part's rows; where they cannot be read, a row that says so."""
  try:
    return part.rows()
  except (OSError, ValueError) as e:
    return [{"note": f"its results cannot be read: {e}"}]


def _tail(log: pathlib.Path) -> str:
  with open(log, "rb") as file:
    file.seek(max(0, log.stat().st_size - 4 * TAIL))
    return file.read().decode(errors="replace")[-TAIL:]


@contextlib.contextmanager
def until_signal() -> Iterator[threading.Event]:
  """An event that SIGTERM, SIGINT and SIGHUP set while the context lasts."""
  stop = threading.Event()
  numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
  before = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
  try:
    yield stop
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
