"""Many command lines of many experiments for the price of one import: each runs in a fork of its own."""

import atexit
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import IO

from tests import compiling

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Imports what all experiments import, and forks for each folder that it reads a process that imports one of
# them. That one reads {"argv", "cwd", "out"} a line; answers with the child's number, then its exit code.
# Neither starts a backend, so that a fork is as good as a new process. Modes of files bind it, also as root.
_SERVER = """
import importlib, json, os, signal, sys, traceback
from sleep_jax import generate, pretrained, train
from sleep_jax.experiments import cli
from tests import unprivileged

def serve(module, folder):
  signal.signal(signal.SIGCHLD, signal.SIG_DFL)
  asks, answers = open(folder + "/asks"), open(folder + "/answers", "w")
  module = importlib.import_module(module)
  print(file=answers, flush=True)
  for line in asks:
    asked = json.loads(line)
    pid = os.fork()
    if pid == 0:
      run(module, asked)
    print(pid, file=answers, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)

def run(module, asked):
  code = 1
  try:
    unprivileged.drop(forever=True)
    os.chdir(asked["cwd"])
    for number, name in enumerate(("in", "out", "err")):
      flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
      os.dup2(os.open(os.devnull if number == 0 else f"{asked['out']}.{name}", flags), number)
    sys.argv = asked["argv"]
    cli.run(module.main)
  except SystemExit as e:
    code = e.code if isinstance(e.code, int) else 1
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
  if os.fork() == 0:
    try:
      serve(*json.loads(line))
    finally:
      os._exit(0)
"""


@functools.cache
def _server(variables: tuple[tuple[str, str], ...]) -> IO[str]:
  """Where a server with this environment reads; it ends with this process."""
  command = [sys.executable, "-W", "ignore", "-c", _SERVER]
  process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=dict(variables))
  atexit.register(process.wait)
  atexit.register(process.stdin.close)
  return process.stdin


@dataclasses.dataclass(frozen=True)
class Ended:
  """How a command ended."""

  code: int
  out: str
  err: str


class Experiment:
  """A process that has imported an experiment and runs its command lines. A context manager.

  What experiments have in common is imported once for all of them in an environment.

  Args:
    module: the experiment.
    scratch: folder for what is printed.
    changes: of the environment.
  """

  def __init__(self, module: str, scratch: pathlib.Path, **changes: str):
    self._module, self._out = module, scratch / "output"
    changing = ("PYTEST_CURRENT_TEST", "PYTEST_VERSION")
    variables = {name: value for name, value in environment(**changes).items() if name not in changing}
    with tempfile.TemporaryDirectory() as folder:
      for name in ("asks", "answers"):
        os.mkfifo(f"{folder}/{name}")
      server = _server(tuple(sorted(variables.items())))
      server.write(json.dumps([module, folder]) + "\n")
      server.flush()
      self._asks, self._answers = open(f"{folder}/asks", "w"), open(f"{folder}/answers")
      self._answers.readline()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._asks.close()
    self._answers.read()
    self._answers.close()

  def run(self, *arguments: str, cwd: str | os.PathLike = ROOT) -> Ended:
    """Runs one command line to its end."""
    self.start(*arguments, cwd=cwd)
    return self.wait()

  def start(self, *arguments: str, cwd: str | os.PathLike = ROOT) -> int:
    """Starts one command line; the number of its process, for whoever wants to end it before `wait`."""
    asked = {"argv": [self._module, *arguments], "cwd": str(cwd), "out": str(self._out)}
    self._asks.write(json.dumps(asked) + "\n")
    self._asks.flush()
    return int(self._answers.readline())

  @staticmethod
  def alive(process: int) -> bool:
    """Whether a process that was started has not ended."""
    try:
      return pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
      return False

  def wait(self) -> Ended:
    """How what was started ended; of a signal n the code is -n."""
    code = int(self._answers.readline())
    texts = [pathlib.Path(f"{self._out}.{name}").read_text(errors="replace") for name in ("out", "err")]
    return Ended(code, *texts)


def environment(**changes: str) -> dict[str, str]:
  """Of a child that finds this repository and has one CPU device, not the eight of the tests.

  Where compiled programs are kept it keeps the small ones, too: the next child takes them.
  """
  paths: Sequence[str] = [str(ROOT), *filter(None, sys.path)]
  return (
    os.environ
    | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": compiling.flags()}
    | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    | changes
  )
