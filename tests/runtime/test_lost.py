"""A workdir deleted, moved or replaced under a living run: noticed, said, and what can be saved is."""

import json
import os
import re
import shutil

import jax.numpy as jnp
import pytest

from sleep_jax import config, train
from sleep_jax.experiments import rule110
from sleep_jax.experiments.configs import rule110 as presets
from sleep_jax.runtime import files, metrics, workdir
from sleep_jax.runtime.checkpoint import Checkpoints


def tiny():
  values = presets.get_config("tiny")
  changes = {"train.steps": 60, "train.save_every": 20, "train.log_every": 1, "train.eval_every": 60}
  values.update_from_flattened_dict(
    changes
    | {
      "model.blocks": ("gdn",),
      "train.steps_per_dispatch": 2,
      "train.eval_sequences": 8,
      "train.eval_batch_size": 8,
    }
  )
  return rule110.build(values.to_dict())


def delete(path):
  while path.exists():  # a save that is under way may write into it meanwhile
    shutil.rmtree(path, ignore_errors=True)


def move(path):
  path.rename(path.with_name("moved"))


def move_its_parent(path):
  path.parent.rename(path.parent.with_name("elsewhere"))


def replace(path):
  move(path)
  path.mkdir()


def replace_by_a_copy(path):
  move(path)
  shutil.copytree(path.with_name("moved"), path)


def replace_by_a_link(path):
  move(path)
  path.symlink_to("/")


def replace_by_a_file(path):
  move(path)
  path.write_text("mine")


def delete_inner(name):
  def do(path):
    inner = path / name
    delete(inner) if inner.is_dir() else inner.unlink()

  do.__name__ = f"delete_{name}"
  return do


def replace_inner(name):
  def do(path):
    (path / name).rename(path.with_name("aside"))
    shutil.copy(path.with_name("aside"), path / name)

  do.__name__ = f"replace_{name}"
  return do


def take(path):
  """Another run comes in, since the lock is gone."""
  (path / "lock").unlink()
  take.other = workdir.prepare(path, json.loads((path / "config.json").read_text()))


# Mischief, words of the message, where the last step is saved then.
CASES = [
  (delete, "was deleted while .*; nothing more can be saved: its folder is gone", None),
  (move, "was moved to .*/moved while .*; step {step} is saved in .*/moved/checkpoints", "moved"),
  (move_its_parent, "was moved to .*/elsewhere/run while .*; step {step} is saved in", "../elsewhere/run"),
  (replace, "was moved to .*/moved while", "moved"),
  (replace_by_a_copy, "was moved to .*/moved while", "moved"),
  (replace_by_a_link, "was moved to .*/moved while", "moved"),
  (replace_by_a_file, "was moved to .*/moved while", "moved"),
  (
    delete_inner("checkpoints"),
    "checkpoints was deleted while .*; step {step} is saved in .*/run/check",
    "run",
  ),
  (
    delete_inner("metrics.jsonl"),
    "metrics.jsonl was deleted or replaced while .*; step {step} is saved",
    "run",
  ),
  (replace_inner("metrics.jsonl"), "metrics.jsonl was deleted or replaced while", "run"),
  (take, "the lock .* was deleted or replaced while .* in use by process .*; nothing more is saved", None),
]
QUICK = (replace, CASES[7][0], take)


@pytest.fixture(scope="module")
def lose(tmp_path_factory):
  """Trains, does some mischief to the workdir, and gives the folder above it and the error of the run."""

  def lose(mischief):
    cfg, task = tiny()
    home, said = tmp_path_factory.mktemp("runs") / "home", []
    home.mkdir()

    def report(line):
      said.append(line)
      if line == "saved step 20":
        mischief(home / "run")

    with workdir.prepare(home / "run", config.to_dict(cfg)) as run:
      with pytest.raises(files.LostError) as e:
        train.train(cfg, task, run, report=report)
    assert "saved step 40" not in said  # it was noticed soon: that save 20 is done is said some steps later
    assert not [line for line in said if "not saved" in line]
    return home, str(e.value)

  return lose


@pytest.mark.parametrize(
  ("mischief", "told", "saved_in"),
  [pytest.param(*c, id=c[0].__name__, marks=[pytest.mark.slow] * (c[0] not in QUICK)) for c in CASES],
)
def test_a_run_that_loses_its_workdir_stops_and_saves_what_it_can(lose, mischief, told, saved_in):
  home, error = lose(mischief)
  assert re.search(told.format(step=r"\d+"), error), error
  assert error.isprintable()
  if mischief is take:
    steps = [p.name for p in (home / "run" / "checkpoints").iterdir() if p.name.isdigit()]
    assert steps == ["20"]  # the other run's folder now
    take.other.close()
  if mischief is replace:
    assert not list((home / "run").iterdir())  # nothing was written there
  if saved_in is None:
    return
  with Checkpoints(home / saved_in / "checkpoints", read_only=True) as saved:
    step = saved.latest_step
  assert 20 < step < 40  # before the next save of its own accord
  if "metrics" not in mischief.__name__:
    rows = metrics.read(home / saved_in / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, step + 1))  # none is lost


@pytest.mark.slow
def test_the_run_goes_on_where_its_folder_went(lose):
  home, _ = lose(move)
  cfg, task = tiny()
  lines = []
  with workdir.prepare(home / "moved", config.to_dict(cfg)) as run:
    train.train(cfg, task, run, report=lines.append)
  [resumed] = [line for line in lines if line.startswith("resuming")]
  assert 20 < int(resumed.split()[3]) < 30
  rows = metrics.read(home / "moved" / "metrics.jsonl")
  assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 61))


def test_a_lock_that_was_deleted_is_made_anew(tmp_path):
  with workdir.prepare(tmp_path / "run", {}) as run:
    (tmp_path / "run" / "lock").unlink()
    assert run.lost() is None
    with pytest.raises(workdir.WorkdirError, match=f"in use by process {os.getpid()}"):
      workdir.prepare(tmp_path / "run", {})
  workdir.prepare(tmp_path / "run", {}).close()


def test_a_disk_that_does_not_answer_is_not_yet_lost(tmp_path, monkeypatch):
  folder = files.Folder(tmp_path)

  def failing(path, **kw):
    raise OSError(5, "Input/output error")

  with monkeypatch.context() as patched:
    patched.setattr(os, "stat", failing)
    assert folder.lost() is None


def test_another_file_system_in_its_place_is_noticed(tmp_path, monkeypatch):
  """As after an unmount: the name leads to a folder with another device or inode."""
  (tmp_path / "run").mkdir()
  folder, stat = files.Folder(tmp_path / "run"), os.stat
  monkeypatch.setattr(os, "stat", lambda path, **kw: stat("/" if path == folder.path else path, **kw))
  assert folder.lost() == "was replaced or unmounted"


def test_saving_notices_it_by_itself(tmp_path):
  with Checkpoints(tmp_path / "c") as saved:
    saved.save(1, {"w": jnp.ones(3)}, block=True)
    shutil.rmtree(tmp_path / "c")
    with pytest.raises(files.LostError, match="c was deleted while its run was going on$"):
      saved.save(2, {"w": jnp.ones(3)})
    assert saved.rescue(2, {"w": jnp.ones(3)}) == f"step 2 is saved in {tmp_path / 'c'}"
  with Checkpoints(tmp_path / "c", read_only=True) as saved:
    assert saved.steps() == [2]


def test_a_step_that_is_saved_already_is_not_saved_twice(tmp_path):
  with Checkpoints(tmp_path / "c") as saved:
    saved.save(1, {"w": jnp.ones(3)})
    (tmp_path / "c").rename(tmp_path / "d")
    assert saved.rescue(1, {"w": jnp.ones(3)}) == f"step 1 is saved in {tmp_path / 'd'}"


def test_rows_go_on_to_where_the_file_went(tmp_path):
  (tmp_path / "run").mkdir()
  with metrics.Writer(tmp_path / "run", tensorboard=False) as writer:
    writer.write({"kind": "train", "step": 1})
    assert writer.lost() is None
    (tmp_path / "run").rename(tmp_path / "moved")
    writer.write({"kind": "train", "step": 2})
    assert writer.lost().endswith(f"run was moved to {tmp_path / 'moved'} while its run was going on")
  assert [row["step"] for row in metrics.read(tmp_path / "moved" / "metrics.jsonl")] == [1, 2]
