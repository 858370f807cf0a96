"""A checkpoint belongs to its run: one that was copied here from another is refused, whatever differs."""

import json
import shutil

import jax.numpy as jnp
import pytest
from absl.testing import parameterized

from sleep_jax.runtime import manifest, workdir
from sleep_jax.runtime.checkpoint import CheckpointError, Checkpoints
from sleep_jax.runtime.run_config import RunConfig

CONFIG = {
  "seed": 0,
  "model": {"window": 16, "blocks": ["attn", "gdn"]},
  "train": {"steps": 12, "init_from": None},
}


def config(base=CONFIG, **dotted):
  changed = json.loads(json.dumps(base))
  for key, value in dotted.items():
    *groups, name = key.split("__")
    tree = changed
    for group in groups:
      tree = tree[group]
    tree[name] = value
  return changed


def state(step):
  return {"w": jnp.full(3, step, jnp.float32)}


def save(path, values, *steps, **kw):
  """Saves steps in the workdir of a run."""
  with workdir.prepare(path, values, **kw) as run, Checkpoints(run.checkpoints, config=run.config) as saved:
    for step in steps:
      saved.save(step, state(step), block=True)


def resume(path, values, said, **kw):
  with workdir.prepare(path, values, **kw) as run:
    with Checkpoints(run.checkpoints, config=run.config, report=said.append) as saved:
      restored = saved.restore(state(0))
      return restored and restored[0]


def contents(folder):
  return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in ("lock", "env.json")}


@pytest.mark.parametrize(
  ("change", "told"),
  [
    ({"train__steps": 24}, "train.steps: 24 in the checkpoint, 12 asked for"),
    ({"seed": 1}, "seed: 1 in the checkpoint, 0 asked for"),
    ({"model__blocks": ["attn"]}, r'model.blocks: \["attn"\] in the checkpoint, \["attn", "gdn"\] asked for'),
    ({"train__init_from": "x"}, 'train.init_from: "x" in the checkpoint, null asked for'),
    ({"model__gate": 1}, "model.gate: 1 in the checkpoint, absent asked for"),
    ({"seed": False}, "seed: false in the checkpoint, 0 asked for"),
  ],
  ids=str,
)
@pytest.mark.parametrize("others", ["alone", "newest", "oldest"])
def test_checkpoints_of_another_run_are_refused(tmp_path, change, told, others):
  mine, other, said = tmp_path / "mine", tmp_path / "other", []
  save(other, config(**change), 6)
  save(mine, CONFIG, *{"alone": (), "newest": (3,), "oldest": (9,)}[others])
  shutil.copytree(other / "checkpoints" / "6", mine / "checkpoints" / "6")
  before = contents(tmp_path)
  for _ in range(2):  # nothing is moved, so that a second try does not train on
    with pytest.raises(CheckpointError, match=f"step 6 in .* is of another run: {told}$") as e:
      resume(mine, CONFIG, said)
    assert "\n" not in str(e.value)
  assert contents(tmp_path) == before
  assert said == []


def test_of_a_run_with_the_same_config_they_are_as_good_as_its_own(tmp_path):
  save(tmp_path / "a", CONFIG, 6)
  save(tmp_path / "b", CONFIG)
  shutil.copytree(tmp_path / "a" / "checkpoints" / "6", tmp_path / "b" / "checkpoints" / "6")
  assert resume(tmp_path / "b", CONFIG, []) == 6


def test_a_run_that_is_made_longer_keeps_its_checkpoints_and_a_shorter_one_is_another(tmp_path):
  grows, said = {"may_grow": ("train.steps",)}, []
  save(tmp_path / "run", CONFIG, 6, 12)
  longer = config(train__steps=24)
  assert resume(tmp_path / "run", longer, said, **grows) == 12
  save(tmp_path / "run", longer, 18, **grows)
  assert resume(tmp_path / "run", longer, said, **grows) == 18
  with pytest.raises(workdir.WorkdirError, match="train.steps: 24 in the workdir, 12 asked for"):
    resume(tmp_path / "run", CONFIG, said, **grows)
  save(tmp_path / "short", CONFIG, **grows)
  shutil.copytree(tmp_path / "run" / "checkpoints" / "18", tmp_path / "short" / "checkpoints" / "18")
  with pytest.raises(CheckpointError, match="step 18 .* another run: train.steps: 24 in the checkpoint, 12"):
    resume(tmp_path / "short", CONFIG, said, **grows)
  assert said == []


def test_a_field_that_is_new_to_the_program_makes_no_other_run(tmp_path):
  save(tmp_path / "run", CONFIG, 6)
  newer, defaults = config(model__gate="none"), {"model": {"gate": "none"}}
  assert resume(tmp_path / "run", newer, [], defaults=defaults) == 6
  assert resume(tmp_path / "run", newer, [], defaults=defaults) == 6  # in config.json, not in the step


def test_a_step_from_before_they_named_their_run_is_taken_with_a_word(tmp_path):
  save(tmp_path / "run", CONFIG, 6)
  folder, said = tmp_path / "run" / "checkpoints" / "6", []
  (folder / "manifest.json").unlink()
  manifest.write_manifest(folder, {"w": "float32[3]"})  # as it was written then
  assert "config" not in json.loads((folder / "manifest.json").read_text())
  assert resume(tmp_path / "run", CONFIG, said) == 6
  assert said == ["step 6 was saved before checkpoints named their run; it is taken as this run's"]


def test_readers_that_know_of_no_run_restore_any(tmp_path):
  save(tmp_path / "run", CONFIG, 6)
  with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as saved:
    assert saved.restore(state(0))[0] == 6


class RuleTest(parameterized.TestCase):
  @parameterized.parameters(
    (1, 2, True),
    (2, 1, False),
    (1.5, 2, True),
    (True, 2, False),
    (None, 2, False),
    ("1", 2, False),
    (float("nan"), 2, False),
  )
  def test_only_numbers_grow(self, stored, now, fits):
    rule = RunConfig({"a": now}, may_grow=("a",))
    self.assertEqual(rule.differences(json.loads(json.dumps({"a": stored})), "workdir") is None, fits)

  def test_long_lists_of_differences_are_cut(self):
    rule = RunConfig({f"x{i:02}": "y" * 1000 for i in range(50)})
    told = rule.differences({}, "workdir")
    self.assertEndsWith(told, "; and 40 more")
    self.assertLess(len(told), 4000)
