"""Many command lines of one experiment for the price of one import: each runs in a fork of its own."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

from tests import compiling

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Reads {"argv", "cwd", "out"} a line; answers with the child's number, then its exit code. It imports but
# never starts a backend, so that a fork of it is as good as a new process. Modes of files bind it, also as
# root.
_SERVER = """
import importlib, json, os, sys, traceback
from sleep_jax.experiments import cli
from tests import unprivileged
module = importlib.import_module(sys.argv[1])
print(flush=True)
for line in sys.stdin:
  asked = json.loads(line)
  pid = os.fork()
  if pid == 0:
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
  print(pid, flush=True)
  print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclasses.dataclass(frozen=True)
class Ended:
  """How a command ended."""

  code: int
  out: str
  err: str


class Experiment:
  """A process that has imported an experiment and runs its command lines. A context manager.

  Args:
    module: the experiment.
    scratch: folder for what is printed.
    changes: of the environment.
  """

  def __init__(self, module: str, scratch: pathlib.Path, **changes: str):
    self._module, self._out = module, scratch / "output"
    self._process = subprocess.Popen(
      [sys.executable, "-W", "ignore", "-c", _SERVER, module],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=environment(**changes),
    )
    self._process.stdout.readline()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._process.stdin.close()
    self._process.stdout.close()
    self._process.wait()

  def run(self, *arguments: str, cwd: str | os.PathLike = ROOT) -> Ended:
    """Runs one command line to its end."""
    self.start(*arguments, cwd=cwd)
    return self.wait()

  def start(self, *arguments: str, cwd: str | os.PathLike = ROOT) -> int:
    """Starts one command line; the number of its process, for whoever wants to end it before `wait`."""
    asked = {"argv": [self._module, *arguments], "cwd": str(cwd), "out": str(self._out)}
    self._process.stdin.write(json.dumps(asked) + "\n")
    self._process.stdin.flush()
    return int(self._process.stdout.readline())

  def wait(self) -> Ended:
    """How what was started ended; of a signal n the code is -n."""
    code = int(self._process.stdout.readline())
    texts = [pathlib.Path(f"{self._out}.{name}").read_text(errors="replace") for name in ("out", "err")]
    return Ended(code, *texts)


def environment(**changes: str) -> dict[str, str]:
  """Of a child that finds this repository and has one CPU device, not the eight of the tests."""
  paths: Sequence[str] = [str(ROOT), *filter(None, sys.path)]
  return (
    os.environ
    | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": compiling.flags()}
    | changes
  )
