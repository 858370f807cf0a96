"""The killer itself: few kills through the same code as `make torture`, and that it notices what is lost."""

import json
import shutil
import subprocess
import sys

import jax.numpy as jnp
import pytest

from sleep_jax.runtime import metrics, workdir
from sleep_jax.runtime.checkpoint import Checkpoints
from tests import forked, torture


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_runs_that_are_killed_end_as_if_nobody_had():
  """A run of each kind: data from the device, data from the host, a sweep."""
  command = [sys.executable, "-m", "tests.torture", "--kills=6", "--each=2", "--seed=2"]
  done = subprocess.run(command, cwd=forked.ROOT, env=forked.environment(), capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  lines = done.stdout.splitlines()
  assert len([line for line in lines if line.startswith("kill ")]) == 6
  assert lines[-1].startswith("6 kills, ")
  assert {kind for kind in torture.KINDS if kind in done.stdout} == set(torture.KINDS)


@pytest.fixture
def whole(tmp_path):
  with workdir.prepare(tmp_path / "whole", {"seed": 1}) as run:
    with (
      metrics.Writer(run.path, tensorboard=False) as writer,
      Checkpoints(run.checkpoints, config=run.config) as saved,
    ):
      for step in (1, 2):
        writer.write({"kind": "train", "step": step, "loss": 0.5 / step, "wall_s": 1.0})
        saved.save(step, {"w": jnp.ones((2, 3)) / step}, block=True)
  return run.path


def test_equal_ends_are_equal(whole, tmp_path):
  shutil.copytree(whole, tmp_path / "run")
  lines = (whole / "metrics.jsonl").read_text().replace("1.0}", "7.0}")  # the clock is no difference
  (tmp_path / "run" / "metrics.jsonl").write_text(lines)
  torture._same_ends(tmp_path / "run", whole)
  with metrics.Writer(whole, tensorboard=False) as writer:
    writer.write({"kind": "done", "step": 2, "wall_s": 1.0})
  torture._same_rows(tmp_path / "run", whole, 2)  # a run that is killed when all is saved has no end yet
  assert torture._on_disk(whole / "checkpoints") == 2


@pytest.mark.parametrize(("old", "new"), [("0.25", "0.2500001"), ('"train", "step": 2', '"eval", "step": 2')])
def test_a_row_that_differs_is_noticed(whole, tmp_path, old, new):
  shutil.copytree(whole, tmp_path / "run")
  text = (whole / "metrics.jsonl").read_text()
  (tmp_path / "run" / "metrics.jsonl").write_text(text.replace(old, new))
  assert old in text
  with pytest.raises(torture.DifferenceError, match="a row of "):
    torture._same_ends(tmp_path / "run", whole)
  torture._same_rows(tmp_path / "run", whole, 1)  # up to where they are the same


def test_only_a_run_that_has_saved_nothing_may_have_no_row(tmp_path):
  """It was killed before the row of its first test, which it writes when it begins anew."""
  row = {"kind": "eval", "step": 0, "loss": 1.0}
  for name, rows in (("whole", [row]), ("killed", []), ("other", [row | {"loss": 2.0}])):
    (tmp_path / name).mkdir()
    (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
  torture._same_rows(tmp_path / "killed", tmp_path / "whole", 0)
  for name, upto in (("killed", 1), ("killed", None), ("other", 0)):
    with pytest.raises(torture.DifferenceError):
      torture._same_rows(tmp_path / name, tmp_path / "whole", upto)


def test_a_row_that_is_missing_is_noticed(whole, tmp_path):
  shutil.copytree(whole, tmp_path / "run")
  first = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)[0]
  (tmp_path / "run" / "metrics.jsonl").write_text(first)
  with pytest.raises(torture.DifferenceError, match="has 1 rows"):
    torture._same_ends(tmp_path / "run", whole)


@pytest.mark.parametrize("value", [0.5 + 2**-24, 0.0])
def test_one_bit_of_the_weights_is_noticed(whole, tmp_path, value):
  shutil.copytree(whole, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
  with Checkpoints(tmp_path / "run" / "checkpoints") as saved:
    saved.save(2, {"w": (jnp.ones((2, 3)) / 2).at[1, 2].set(value)}, block=True)
  with pytest.raises(torture.DifferenceError, match="w of the last state differs"):
    torture._same_ends(tmp_path / "run", whole)


def test_a_step_that_is_damaged_or_gone_is_not_there(whole):
  manifest = whole / "checkpoints" / "2" / "manifest.json"
  text = manifest.read_text()
  manifest.unlink()
  with pytest.raises(torture.DifferenceError):  # it has no manifest, and no note that it was being written
    torture._on_disk(whole / "checkpoints")
  manifest.write_text(text)
  shutil.rmtree(whole / "checkpoints" / "2")
  assert torture._on_disk(whole / "checkpoints") == 1


def test_what_a_run_said_is_read():
  said = "step 5\nsaved step 5\nsaved step 10\nsaved step 1"  # killed in the middle of a word
  assert torture._acknowledged(said, None) == 10
  lines = "n2_s0        saved step 5\nn4_s0        saved step 15\nn2_s0        \nn2_s0 saved step 9 times\n"
  assert [torture._acknowledged(lines, name) for name in ("n2_s0", "n4_s0", "n1_s0")] == [5, 15, 0]
