"""`experiments.cli` and `sleep_jax.experiments.cli` are one module in a clone, in any order of imports."""

import pathlib
import random
import subprocess
import sys

import pytest

from tests.forked import ROOT, environment

# Imports the names of its arguments in their order; then each file is one module, by both names.
PAIRS = """
import importlib, importlib.util, sys
for name in sys.argv[1:]:
  importlib.import_module(name)
pairs = [(name, f"sleep_jax.{name}") for name in list(sys.modules) if f"sleep_jax.{name}" in sys.modules]
for short, long in pairs:
  module = sys.modules[short]
  assert module is sys.modules[long], short
  assert module.__spec__.name == module.__name__, (short, module.__spec__)
for name in sys.argv[1:]:
  package, _, attribute = name.rpartition(".")
  assert not package or getattr(importlib.import_module(package), attribute) is sys.modules[name]
assert len(pairs) >= len({name.removeprefix("sleep_jax.") for name in sys.argv[1:]}), pairs
"""
NAMES = (
  *("kernels", "kernels.kda", "kernels.kda.api", "kernels.common.dispatch", "kernels.gated_delta.reference"),
  *("experiments", "experiments.cli", "experiments.tasks", "experiments.rule110", "experiments.configs.depo"),
  *("experiments.figures.rule110", "launch", "launch.local_multiprocess", "benchmarks", "benchmarks.tables"),
)


def python(*words, cwd=ROOT, path=ROOT):
  done = subprocess.run(
    [sys.executable, "-W", "error::ImportWarning", *words],
    env=environment(PYTHONPATH=str(path)), cwd=cwd, capture_output=True, text=True, timeout=240, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 8))])
def test_both_names_are_one_module_in_any_order(seed):
  names = [*NAMES, *(f"sleep_jax.{name}" for name in NAMES)]
  random.Random(seed).shuffle(names)
  python("-c", PAIRS, *names)


SCRIPT = """
from experiments import cli, rule110, tasks
from kernels.common import op
from kernels.gated_hebbian import gated_hebbian
from sleep_jax import experiments, kernels, rules
from sleep_jax.experiments import cli as again
from sleep_jax.kernels.common.op import Op

assert cli is again and issubclass(op.Op, Op)
rules.register("mine", rules.Rule(gated_hebbian))
assert tasks.experiment_of({"data": {"num_cells": 6}}) is rule110
CONFIG = cli.define_config_flag()


def main():
  values = cli.required("config", CONFIG.value).to_dict()
  print(rule110.build(values)[0].model.blocks)


if __name__ == "__main__":
  cli.run(main)
"""
STUDY = """
from experiments import cli
from experiments.configs import rule110


def get_config(preset="tiny"):
  assert cli.define_config_flag().path
  c = rule110.get_config(preset)
  c.model.blocks = ("attn", "mine")
  return c
"""


def test_a_script_and_a_config_of_ones_own_may_say_either_name(tmp_path):
  (tmp_path / "script.py").write_text(SCRIPT)
  (tmp_path / "study.py").write_text(STUDY)
  assert "('attn', 'mine')" in python("script.py", "--config=study.py:tiny", cwd=tmp_path)


def test_a_package_of_that_name_which_is_not_ours_stays_itself(tmp_path):
  for name in ("kernels", "experiments"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("mine = True\n")
    (tmp_path / name / "cli.py").write_text("mine = True\n")
  program = f"""
import sys
sys.path.append({str(ROOT)!r})
import kernels, experiments.cli
from sleep_jax.experiments import cli
from sleep_jax.kernels import kda
assert kernels.mine and experiments.mine and experiments.cli.mine and not hasattr(cli, "mine")
print(cli.__file__, kda.__file__)
"""
  files = python("-c", program, cwd=tmp_path, path=tmp_path).split()
  assert [pathlib.Path(file).relative_to(ROOT).parts[0] for file in files] == ["experiments", "kernels"]
