"""A process of its own for a module of this package."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import sleep_jax

Done = subprocess.CompletedProcess[str]
WHERE = Path(sleep_jax.__file__).parents[
  1
]  # from here `sleep_jax` is found, in a clone and where it is installed


def run_module(module: str, *arguments: str, environment: Mapping[str, str]) -> Done:
  """Runs `python -m MODULE ARGUMENTS` to its end; what it printed is in the result.

  Args:
    module: full name, `sleep_jax.kernels...`, which works in a clone and where the package is installed.
    environment: the whole environment of the process.
  """
  command = [sys.executable, "-m", module, *arguments]
  return subprocess.run(command, cwd=WHERE, env=environment, capture_output=True, text=True, check=False)
