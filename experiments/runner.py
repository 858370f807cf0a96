"""Runs many command lines: some at a time, each on its own cores, the finished skipped."""

import contextlib
import importlib.machinery
import importlib.util
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from sleep_jax import config
from sleep_jax.experiments import cli, config_file
from sleep_jax.runtime import metrics
from sleep_jax.runtime.workdir import Workdir

# What a run starts with, unless the caller's environment says otherwise. The C library reads the second when
# a process begins: large pages, with which a training step on a CPU takes 0.6 of the time (see benchmarks).
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class Watch(Protocol):
  """Takes what the runs say. Called from one thread a job."""

  def started(self, name: str) -> None:
    """A run begins."""

  def line(self, name: str, text: str) -> None:
    """It wrote a line, its end included, to stdout or stderr."""

  def ended(self, name: str, code: int) -> None:
    """It ended with an exit code."""


class Echo:
  """Prints every line behind its run's name."""

  def started(self, name: str) -> None:
    """Says nothing."""

  def line(self, name: str, text: str) -> None:
    """Prints it."""
    print(f"{name:12} {text}", end="", flush=True)

  def ended(self, name: str, code: int) -> None:
    """Says nothing: `execute` names what did not end well."""


def commands(
  file: str, workdir: str, seeds: int, changes: Mapping[str, Any] | None = None
) -> dict[str, list[str]]:
  """Name -> command line of every run of a preset.

  Args:
    file: FILE.py:PRESET.
    workdir: parent of the runs' folders.
    changes: of the config, by dotted key, for every run; {run} in a text is the run's name.

  Raises:
    ConfigError: if the file has no sweep or no such preset, or a field is changed that the sweep sets.
  """
  module, preset = config_file.load(file)
  for name in ("sweep", "PRESETS", "EXPERIMENT"):
    config.check(hasattr(module, name), "--config", f"{file} says nothing of a sweep: it has no {name}")
  known = ", ".join(module.PRESETS)
  config.check(preset in module.PRESETS, "--config", f"needs a preset, FILE.py:PRESET; known: {known}")
  changes, runs = changes or {}, module.sweep(preset, seeds)
  for name, own in runs.items():
    both = ", ".join(sorted(set(own) & set(changes)))
    config.check(not both, f"--config.{both}", f"is what the runs of this sweep differ in ({name})")
  return {
    name: [
      *(
        sys.executable,
        "-m",
        _module_name(module.EXPERIMENT),
        f"--config={file}",
        f"--workdir={pathlib.Path(workdir, name)}",
      ),
      *(f"--config.{key}={str(value).replace('{run}', name)}" for key, value in (changes | own).items()),
    ]
    for name, own in runs.items()
  }


def _module_name(experiment: str) -> str:
  """By which name `python -m` finds an experiment.

  That of this package are `experiments.rule110` in a clone, `sleep_jax.experiments.rule110` where it is
  installed; one of the user's own has the name that its config file says.
  """
  found, ours = _spec(experiment), _spec(f"sleep_jax.{experiment}")
  same = found is not None and ours is not None and os.path.samefile(found.origin, ours.origin)
  return experiment if ours is None or same else f"sleep_jax.{experiment}"


def _spec(name: str) -> importlib.machinery.ModuleSpec | None:
  try:
    return importlib.util.find_spec(name)
  except ModuleNotFoundError:  # of the package that it would be in
    return None


def status(folder: pathlib.Path, command: Sequence[str] = ()) -> str:
  """`done at step n`, `stopped at step n` or `new`.

  Args:
    folder: of the run.
    command: that would run it. A `train.steps` in it beyond the step at which the run ended makes it longer.
  """
  run = Workdir(folder)
  if not os.path.lexists(run.metrics):
    return "new"
  prefix = "--config.train.steps="
  asked = [word.removeprefix(prefix) for word in command if word.startswith(prefix)]
  wanted = max((int(text) for text in asked if text.isdecimal()), default=0)
  if run.done_step is not None and run.done_step >= wanted:
    return f"done at step {run.done_step}"
  return f"stopped at step {max((row['step'] for row in metrics.read(run.metrics)), default=0)}"


def run_all(
  todo: dict[str, list[str]], jobs: int, watch: Watch | None = None, *, share: bool = False
) -> dict[str, int]:
  """Runs commands in their order, `jobs` at a time.

  SIGTERM, SIGHUP and Ctrl-C are passed on to the running ones, which save and stop; none is started after
  them.

  Args:
    watch: takes their lines; None: they are printed behind their names.
    share: the last runs, too few to go round once more, are started beside those that are running, and the
      system shares the cores out among them: none idles while there is work. For a CPU, and runs that fit
      into memory together.

  Returns:
    Name -> exit code, of those that were started.
  """
  jobs = min(jobs, len(todo))
  pool = _Pool(todo, jobs, watch or Echo(), share)
  numbers = [signal.SIGTERM, signal.SIGINT]
  if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as it is under nohup
    numbers.append(signal.SIGHUP)
  previous = {number: signal.signal(number, pool.stop) for number in numbers}
  try:
    pool.run()
  finally:
    for number, old in previous.items():
      signal.signal(number, old)
  return pool.codes


def execute(
  todo: dict[str, list[str]],
  states: dict[str, str],
  jobs: int,
  watch: Watch | None = None,
  *,
  share: bool = False,
) -> int:
  """Runs what is not done and says how it ended; the exit code. Arguments as in `run_all`."""
  left = {name: command for name, command in todo.items() if not states[name].startswith("done")}
  print(f"{len(todo)} runs, {len(todo) - len(left)} done already", flush=True)
  codes = run_all(left, jobs, watch, share=share)
  for name in left:
    if codes.get(name, cli.STOPPED) != cli.DONE:
      print(f"{name}: {'not started' if name not in codes else f'exit code {codes[name]}'}", file=sys.stderr)
  bad = [code for code in (codes.get(name, cli.STOPPED) for name in left) if code != cli.DONE]
  if not bad:
    return cli.DONE
  return next((code for code in (cli.USER_MISTAKE, cli.STOPPED) if set(bad) == {code}), cli.FAILED)


class _Pool:
  """Runs that wait, those that go on, and the exit codes of those that ended."""

  def __init__(self, todo: Mapping[str, list[str]], jobs: int, watch: Watch, share: bool):
    self._waiting: queue.SimpleQueue = queue.SimpleQueue()
    for item in todo.items():
      self._waiting.put(item)
    self._jobs, self._watch, self._share = jobs, watch, share
    self._children: list[subprocess.Popen] = []
    self._workers: list[threading.Thread] = []
    self._stopping = threading.Event()
    self.codes: dict[str, int] = {}

  def run(self) -> None:
    """Until nothing waits or goes on."""
    for job in range(self._jobs):
      self._add(_cores(job, self._jobs) if not self._share else set())
    for worker in self._workers:  # which may grow meanwhile
      worker.join()

  def stop(self, number: int, frame: Any) -> None:
    """A signal handler: passes the signal on and starts no more."""
    del frame
    self._stopping.set()
    for child in list(self._children):
      with contextlib.suppress(ProcessLookupError):
        child.send_signal(number)

  def _add(self, cores: set[int]) -> None:
    worker = threading.Thread(target=self._work, args=(cores,))
    worker.start()
    self._workers.append(worker)  # `run` joins what is on the list, so that it must have been started

  def _work(self, cores: set[int]) -> None:
    """Takes runs from the queue until it is empty or the pool is stopped."""
    while not self._stopping.is_set():
      try:
        name, command = self._waiting.get_nowait()
      except queue.Empty:
        return
      if self._share and self._waiting.qsize() < self._jobs:  # too few to go round once more
        for _ in range(self._waiting.qsize()):
          self._add(cores)
      self._run(name, command, cores)

  def _run(self, name: str, command: list[str], cores: set[int]) -> None:
    self._watch.started(name)
    child = subprocess.Popen(
      command,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      errors="replace",
      start_new_session=True,  # a Ctrl-C reaches it through us, once
      env=ENVIRONMENT | self._threads() | os.environ,
    )
    if cores:
      with contextlib.suppress(OSError):
        os.sched_setaffinity(child.pid, cores)
    self._children.append(child)
    if self._stopping.is_set():  # the signal came before this child was on the list
      child.send_signal(signal.SIGTERM)
    with child.stdout:
      for line in child.stdout:
        with contextlib.suppress(OSError, ValueError):  # a terminal that was closed stops no run
          self._watch.line(name, line)
    self.codes[name] = child.wait()
    self._children.remove(child)
    self._watch.ended(name, self.codes[name])

  def _threads(self) -> dict[str, str]:
    """What keeps XLA to one job's share of threads where runs are not tied to cores of their own."""
    if not self._share or self._jobs == 1:
      return {}
    return {"NPROC": str(max(1, _available() // self._jobs))}


def _available() -> int:
  """How many cores this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cores(job: int, jobs: int) -> set[int]:
  """The cores of one of several jobs; empty where there is nothing to share out."""
  if jobs == 1 or not hasattr(os, "sched_getaffinity"):
    return set()
  return set(sorted(os.sched_getaffinity(0))[job::jobs])
