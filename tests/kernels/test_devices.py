"""Where JAX has no device, commands say so on one line: the user's mistake, or a broken machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sleep_jax.kernels.common import devices
from tests import compiling

ROOT = Path(__file__).parents[2]
MAINS = (
  ("experiments.rule110", "--config=experiments/configs/rule110.py:tiny", "--workdir=/dev/null/none"),
  ("benchmarks.scaling", "--preset=tiny"),
  ("kernels.bench", "--shapes=R"),
)


@pytest.mark.parametrize("command", MAINS, ids=lambda command: command[0])
def test_a_platform_that_is_not_installed_is_a_mistake(command):
  env = os.environ | compiling.environment() | {"JAX_PLATFORMS": "abacus", "PYTHONPATH": str(ROOT)}
  done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=env, capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (2, "")
  [line] = done.stderr.splitlines()
  assert line.startswith("error: JAX_PLATFORMS: this installation of jax has no platform 'abacus'; ")


def raised(error, file):
  """The error, raised in a file of that name."""
  try:
    exec(compile("raise error", file, "exec"), {"error": error})  # noqa: S102
  except Exception as e:
    return e


def test_a_device_that_does_not_work_is_no_mistake():
  said = "Unable to initialize backend 'cuda': no driver. (set JAX_PLATFORMS='' to automatically choose)"
  found = devices.lacking(raised(RuntimeError(said), "/jax/_src/xla_bridge.py"))
  assert not found.mistake
  assert str(found) == "no device to compute on: Unable to initialize backend 'cuda': no driver."


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize backend"), AssertionError()])
def test_other_errors_are_left_alone(error):
  assert devices.lacking(raised(error, "elsewhere.py")) is None
  assert devices.lacking(raised(KeyError("x"), "xla_bridge.py")) is None
