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
from collections.abc import Mapping
from typing import Any

from sleep_jax import config
from sleep_jax.experiments import cli, config_file
from sleep_jax.runtime import metrics
from sleep_jax.runtime.workdir import Workdir

# What a run starts with, unless the caller's environment says otherwise. The C library reads the second when
# a process begins: large pages, with which a training step on a CPU takes 0.6 of the time (see benchmarks).
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


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


def status(folder: pathlib.Path) -> str:
  """`done at step n`, `stopped at step n` or `new`."""
  run = Workdir(folder)
  if not run.metrics.exists():
    return "new"
  if run.done_step is not None:
    return f"done at step {run.done_step}"
  return f"stopped at step {max((row['step'] for row in metrics.read(run.metrics)), default=0)}"


def run_all(todo: dict[str, list[str]], jobs: int) -> dict[str, int]:
  """Runs commands, `jobs` at a time, their lines prefixed by their names.

  A SIGTERM or Ctrl-C is passed on to the running ones, which save and stop; none is started after it.

  Returns:
    Name -> exit code, of those that were started.
  """
  jobs = min(jobs, len(todo))
  waiting: queue.SimpleQueue = queue.SimpleQueue()
  for item in todo.items():
    waiting.put(item)
  codes: dict[str, int] = {}
  children: list[subprocess.Popen] = []
  stopping = threading.Event()

  def stop(number, frame):
    del frame
    stopping.set()
    for child in children:
      with contextlib.suppress(ProcessLookupError):
        child.send_signal(number)

  previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    workers = [
      threading.Thread(target=_work, args=(waiting, codes, children, stopping, _cores(i, jobs)))
      for i in range(jobs)
    ]
    for worker in workers:
      worker.start()
    for worker in workers:
      worker.join()
  finally:
    for number, old in previous.items():
      signal.signal(number, old)
  return codes


def execute(todo: dict[str, list[str]], states: dict[str, str], jobs: int) -> int:
  """Runs what is not done and says how it ended; the exit code."""
  left = {name: command for name, command in todo.items() if not states[name].startswith("done")}
  print(f"{len(todo)} runs, {len(todo) - len(left)} done already", flush=True)
  codes = run_all(left, jobs)
  for name in left:
    if codes.get(name, cli.STOPPED) != cli.DONE:
      print(f"{name}: {'not started' if name not in codes else f'exit code {codes[name]}'}", file=sys.stderr)
  bad = [code for code in (codes.get(name, cli.STOPPED) for name in left) if code != cli.DONE]
  if not bad:
    return cli.DONE
  return next((code for code in (cli.USER_MISTAKE, cli.STOPPED) if set(bad) == {code}), cli.FAILED)


def _work(waiting, codes, children, stopping, cores) -> None:
  """Takes runs from the queue until it is empty or the sweep is stopped."""
  while not stopping.is_set():
    try:
      name, command = waiting.get_nowait()
    except queue.Empty:
      return
    child = subprocess.Popen(
      command,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      errors="replace",
      start_new_session=True,  # a Ctrl-C reaches it through us, once
      env=ENVIRONMENT | os.environ,
    )
    if cores:
      with contextlib.suppress(OSError):
        os.sched_setaffinity(child.pid, cores)
    children.append(child)
    if stopping.is_set():  # the signal came before this child was on the list
      child.send_signal(signal.SIGTERM)
    for line in child.stdout:
      print(f"{name:12} {line}", end="", flush=True)
    codes[name] = child.wait()
    children.remove(child)


def _cores(job: int, jobs: int) -> set[int]:
  """The cores of one of several jobs; empty where there is nothing to share out."""
  if jobs == 1 or not hasattr(os, "sched_getaffinity"):
    return set()
  return set(sorted(os.sched_getaffinity(0))[job::jobs])
