"""What a sweep that is watched says: few lines, one estimate of the time left, a log for each run."""

import collections
import contextlib
import os
import pathlib
import re
import threading
import time
from collections.abc import Callable, Mapping

from sleep_jax.experiments import config_file, eta
from sleep_jax.runtime import files, progress

STEP, EVALUATION = re.compile(r"step +(\d+)/\d+"), re.compile(r"eval step \d+: (.*)")
DONE = 0


def planned(file: str, seeds: int) -> dict[str, eta.Ledger]:
  """The runs of a preset's sweep, longest first: what remains at the end is short, and no core waits for it.

  Args:
    file: FILE.py:PRESET, whose sweep sets N and perhaps `train.steps`.
  """
  module, preset = config_file.load(file)
  steps = module.get_config(preset).train.steps
  ledgers = {}
  for name, changes in module.sweep(preset, seeds).items():
    own = changes.get("train.steps", steps)
    ledgers[name] = eta.Ledger(work=own * changes["sleep.num_passes"], steps=own)
  return dict(sorted(ledgers.items(), key=lambda item: -item[1].work))


class Board:
  """Says how far all runs are together, in few lines; what each of them says goes to a file."""

  def __init__(
    self,
    ledgers: Mapping[str, eta.Ledger],
    logs: pathlib.Path,
    jobs: int,
    *,
    every_s: float = 15.0,
    now: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = lambda text: print(text, flush=True),
  ):
    """
    Args:
      ledgers: by name; those of runs that are done already have ended.
      logs: folder of NAME.txt.
      jobs: runs at a time.
      every_s: seconds between two lines about all runs.
    """
    self._ledgers, self._logs, self._jobs, self._every_s = ledgers, logs, jobs, every_s
    self._now, self._say = now, say
    self._ticked = self._said = now()
    self._evaluations: dict[str, str] = {}
    self._lock = threading.Lock()

  def started(self, name: str) -> None:
    """Notes that a run begins, with a log of its own."""
    with self._lock:
      self._tick()
      self._ledgers[name].running = True
      with contextlib.suppress(OSError):  # a log that cannot be written stops no run
        self._logs.mkdir(parents=True, exist_ok=True)
      self._say(f"{name} starts: {self._ledgers[name].steps} steps, log in {self._logs / name}.txt")

  def line(self, name: str, text: str) -> None:
    """Logs a line and reads from it how far the run is."""
    with self._lock:
      self._tick()
      with open(self._opened(name, os.O_WRONLY), "a", encoding="utf-8", errors="replace") as log:
        log.write(text)
      if step := STEP.match(text):
        self._ledgers[name].reach(int(step[1]))
      if evaluation := EVALUATION.match(text):
        self._evaluations[name] = evaluation[1]
      if self._ticked - self._said >= self._every_s:
        self._said = self._ticked
        self._say(self._summary())

  def ended(self, name: str, code: int) -> None:
    """Says how a run ended; of one that did not end well, its last lines."""
    with self._lock:
      self._tick()
      ledger = self._ledgers[name]
      ledger.running, ledger.ended = False, code == DONE
      done = sum(one.ended for one in self._ledgers.values())
      if ledger.ended:
        self._say(
          f"{name} done, {done} of {len(self._ledgers)}: {self._evaluations.get(name, 'no evaluation')}"
        )
        return
      last: list[str] = []
      with contextlib.suppress(OSError):
        with open(self._opened(name, os.O_RDONLY), encoding="utf-8", errors="replace") as log:
          last = list(collections.deque((line.rstrip("\n") for line in log), maxlen=5))
      self._say("\n".join([f"{name} ended with exit code {code}", *(f"    {line}" for line in last)]))

  def _opened(self, name: str, flags: int) -> int:
    """The log of a run, opened; it is a file, or an OSError."""
    return files.open_file(self._logs / f"{name}.txt", flags | os.O_APPEND | os.O_CREAT)

  def _tick(self) -> None:
    """Books the time since the last event: with more runs than cores each has but a share of one."""
    now = self._now()
    running = [ledger for ledger in self._ledgers.values() if ledger.running]
    for ledger in running:
      ledger.spend((now - self._ticked) * min(1.0, self._jobs / len(running)))
    self._ticked = now

  def _summary(self) -> str:
    runs = list(self._ledgers.values())
    left = eta.remaining_s(runs, self._jobs)
    when = "time left not known yet" if left is None else f"about {progress.duration(left)} left"
    going = "  ".join(f"{n} {r.step}/{r.steps}" for n, r in self._ledgers.items() if r.running)
    return f"{100 * eta.done_share(runs):3.0f} % of all, {when}    {going}"
