"""Training: it learns, and however it is stopped it ends with the bytes of the run that never was.

One run is made without interruption, another one is killed, stopped and poisoned on its way, all in
processes of their own. What varies how the same numbers are computed is compared in this process.
"""

import functools
import json
import math
import os
import pathlib
import random
import shutil
import signal
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from sleep_jax import config, sharding, train, windows
from sleep_jax.experiments import rule110
from sleep_jax.experiments.configs import rule110 as presets
from sleep_jax.runtime import checkpoint, metrics
from tests import forked

STEPS = 100
SETTINGS = {
  "data.num_strings": 1,
  "data.rollout_steps": 1,
  "model.blocks": ("gdn",),  # learns one step of the rule, and is compiled sooner than two blocks
  "model.window": 6,
  "train.steps": STEPS,
  "train.batch_size": 64,
  "train.save_every": 20,
  "train.eval_every": 10,
  "train.log_every": 1,
  "train.eval_sequences": 512,
  "train.eval_batch_size": 512,
}
MILLISECONDS = ("wake_ms_per_answer", "sleep_ms_per_window")
TIMES = (
  *("wall_s", "cpu_s", "tokens_per_s"), *(name + end for name in MILLISECONDS for end in ("", "_p10", "_p90"))
)  # fmt: skip


def settings(**changes):
  """The tiny preset as `Config` and `Task`, changed by dotted names with __ for a dot."""
  values = presets.get_config("tiny")
  dotted = {key.replace("__", "."): value for key, value in changes.items()}
  values.update_from_flattened_dict(SETTINGS | dotted)
  return rule110.build(values.to_dict())


def final_bytes(folder, step=STEPS):
  """Path -> bytes of every array of a checkpoint."""
  cfg, _ = settings()
  tx = train.optimization(cfg).tx
  wanted = jax.eval_shape(functools.partial(train.init_state, cfg, tx))
  with checkpoint.Checkpoints(folder / "checkpoints", read_only=True) as saved:
    found, state = saved.restore(wanted)
  assert found == step, (found, step)
  state = state.replace(key=jax.random.key_data(state.key))
  return {
    jax.tree_util.keystr(path): np.asarray(x).tobytes()
    for path, x in jax.tree_util.tree_flatten_with_path(state)[0]
  }


def rows(folder, *kinds):
  """Rows without what depends on the clock."""
  found = metrics.read(folder / "metrics.jsonl")
  return [{k: v for k, v in row.items() if k not in TIMES} for row in found if row["kind"] in kinds]


def last_step(folder):
  """The newest step written down, 0 if none is."""
  try:
    return max((row["step"] for row in metrics.read(folder / "metrics.jsonl")), default=0)
  except (OSError, metrics.MetricsError):  # none yet, or replaced at this moment
    return 0


class Runs:
  """Starts the experiment in processes that share a cache of compiled programs, one after the other."""

  def __init__(self, folder):
    self.folder = folder
    self.cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(folder / "cache")

  @functools.cached_property
  def usual(self):
    return self.server()

  def server(self, **environment):
    cache = {"JAX_COMPILATION_CACHE_DIR": self.cache}
    return forked.Experiment("tests.train.changed_rule110", self.folder, **(cache | environment))

  def start(self, workdir, *flags, changed="", server=None):
    given = {flag.partition("=")[0] for flag in flags}
    fields = [f"--config.{key}={value}" for key, value in SETTINGS.items() if f"--config.{key}" not in given]
    return (server or self.usual).start(
      f"--config={forked.ROOT}/experiments/configs/rule110.py:tiny",
      f"--workdir={workdir}",
      f"--changed={changed}",
      "--tensorboard=False",  # a second of imports for each start
      *fields,
      *flags,
    )

  def run(self, workdir, *flags, **kw):
    self.start(workdir, *flags, **kw)
    return self.usual.wait()

  def signal_at(self, process, workdir, step, number):
    """Sends a signal soon after a step was written down; what became of the process."""
    deadline = time.monotonic() + 200
    while last_step(workdir) < step and forked.Experiment.alive(process) and time.monotonic() < deadline:
      time.sleep(0.02)
    os.kill(process, number)
    return self.usual.wait()


@pytest.fixture(scope="module")
def runs():
  with tempfile.TemporaryDirectory() as folder:
    runs = Runs(pathlib.Path(folder))
    with runs.usual:
      yield runs


@pytest.fixture(scope="module")
def whole(runs):
  """The run that is never interrupted."""
  ended = runs.run(runs.folder / "whole")
  assert ended.code == 0, ended.err
  return runs.folder / "whole"


@pytest.fixture(scope="module")
def battered(runs, whole):
  """A run that meets one mishap after the other; how each of its starts ended, and a copy made on the way."""
  folder, ended = runs.folder / "battered", {}
  process = runs.start(folder)
  ended["killed"] = runs.signal_at(process, folder, 45, signal.SIGKILL)
  # saves are at every second evaluation, so that at the first one after a save none is due
  ended["terminated"] = runs.run(folder, changed="stop_in_evaluation 1")
  copy = runs.folder / "copy"
  shutil.copytree(folder, copy)
  ended["poisoned"] = runs.run(folder, changed=f"poison {STEPS - 13}")
  ended["finished"] = runs.run(folder)
  ended["again"] = runs.run(folder)
  return folder, ended, copy


def test_it_learns_what_one_step_of_the_rule_does(whole):
  evaluations = rows(whole, "eval")
  assert [row["step"] for row in evaluations] == list(range(0, STEPS + 1, 10))
  p = 0.625  # of a 1 after one step on a ring
  constant = -p * math.log(p) - (1 - p) * math.log(1 - p)
  assert evaluations[0]["loss"] > constant
  assert evaluations[-1]["loss"] < 0.5 * constant
  assert evaluations[-1]["exact"] > 0.9 > 0.7 > evaluations[-1]["const_exact"]


def test_everything_is_written_down(whole):
  train_rows = rows(whole, "train")
  assert [row["step"] for row in train_rows] == list(range(1, STEPS + 1))
  assert all(row["tokens"] == row["step"] * 64 * 7 for row in train_rows)
  assert all(row["learning_rate"] == presets.get_config("tiny").optim.muon_lr for row in train_rows)
  for kind in ("cost", "sleep", "done"):
    [row] = rows(whole, kind)
    assert row["step"] == STEPS
  [asleep] = rows(whole, "sleep")
  assert (asleep["windows"], asleep["passes"]) == (1, 1)
  written = json.loads((whole / "config.json").read_text())
  assert written == json.loads(json.dumps(config.to_dict(settings()[0])))
  timed = [row for row in metrics.read(whole / "metrics.jsonl") if "wall_s" in row]
  assert [row["wall_s"] for row in timed] == sorted(row["wall_s"] for row in timed)


def test_a_killed_run_leaves_no_word(battered):
  _, ended, _ = battered
  assert ended["killed"].code == -signal.SIGKILL


def test_sigterm_in_an_evaluation_saves_and_ends_with_3(battered):
  _, ended, _ = battered
  assert ended["terminated"].code == 3, ended["terminated"].err
  [line] = ended["terminated"].err.splitlines()
  step = int(line.split("saved step ")[1].split(",")[0])
  assert line == f"stopped by SIGTERM; saved step {step}, rerun the same command to go on"
  # the next start finds that very step
  assert f"resuming at step {step} of {STEPS}" in ended["poisoned"].out


def test_a_nan_ends_with_1_and_names_its_step(battered):
  _, ended, _ = battered
  poisoned = ended["poisoned"]
  assert poisoned.code == 1, poisoned.err
  [line] = poisoned.err.splitlines()
  assert line.startswith(f"failed: step {STEPS - 12}: loss nan, gradient norm nan; stopped; ")
  assert f"the last good checkpoint is step {STEPS - 20};" in line
  assert f"resuming at step {STEPS - 20} of {STEPS}" in ended["finished"].out


def test_the_battered_run_ends_as_the_whole_one(battered, whole):
  folder, ended, _ = battered
  assert ended["finished"].code == 0, ended["finished"].err
  assert final_bytes(folder) == final_bytes(whole)
  assert rows(folder, "eval", "train", "sleep", "done") == rows(whole, "eval", "train", "sleep", "done")


def test_a_finished_run_is_left_alone(battered):
  folder, ended, _ = battered
  again = ended["again"]
  assert (again.code, again.err) == (0, "")
  assert again.out == f"{folder} is complete: {STEPS} steps\n"


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(battered, whole, runs):
  copy = battered[2]
  steps = sorted(int(p.name) for p in (copy / "checkpoints").iterdir() if p.name.isdigit())
  damage(copy / "checkpoints" / str(steps[-1]))
  ended = runs.run(copy)
  assert ended.code == 0, ended.err
  assert f"step {steps[-1]} is damaged" in ended.out
  assert f"resuming at step {steps[-2]} of {STEPS}" in ended.out
  assert final_bytes(copy) == final_bytes(whole)
  assert rows(copy, "eval", "train") == rows(whole, "eval", "train")


def test_with_every_checkpoint_damaged_nothing_is_overwritten(whole, runs):
  folder = runs.folder / "damaged"
  shutil.copytree(whole, folder)
  lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
  (folder / "metrics.jsonl").write_text("".join(line for line in lines if '"done"' not in line))
  for path in (folder / "checkpoints").iterdir():
    if path.name.isdigit():
      damage(path)
  before = {p: p.read_bytes() for p in (folder / "checkpoints").rglob("*") if p.is_file()}
  before[folder / "metrics.jsonl"] = (folder / "metrics.jsonl").read_bytes()
  ended = runs.run(folder)
  assert ended.code == 2, ended.err
  assert len(ended.err.splitlines()) == 1
  assert "damaged" in ended.err
  assert {p: p.read_bytes() for p in before} == before


def damage(step):
  """Flips one bit in the largest file of a step."""
  path = max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment_it_ends_the_same(runs, whole, seed):
  rng, folder = random.Random(seed), runs.folder / f"killed{seed}"
  for kill in range(4):
    process = runs.start(folder)
    # anywhere: before the first step, between steps, in a save, after the last
    until, extra = last_step(folder) + rng.choice([0, 1, 25, 60]), rng.uniform(0, 1.5 if kill else 6.0)
    deadline = time.monotonic() + 100
    alive = forked.Experiment.alive
    while last_step(folder) < until and alive(process) and time.monotonic() < deadline:
      time.sleep(0.02)
    time.sleep(extra)
    if alive(process):
      os.kill(process, rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
    ended = runs.usual.wait()
    assert ended.code in (-signal.SIGKILL, -signal.SIGTERM, 3, 0), ended
  ended = runs.run(folder)
  assert ended.code == 0, ended.err
  assert final_bytes(folder) == final_bytes(whole)
  assert rows(folder, "eval", "train", "done") == rows(whole, "eval", "train", "done")


@pytest.mark.slow
def test_eight_devices_train_as_one(runs, whole):
  folder = runs.folder / "eight"
  flags = ["--config.train.steps=20", "--config.mesh.data=4", "--config.mesh.model=2"]
  with runs.server(XLA_FLAGS="--xla_force_host_platform_device_count=8") as eight:
    runs.start(folder, *flags, server=eight)
    ended = eight.wait()
  assert ended.code == 0, ended.err
  want = [row for row in rows(whole, "train") if row["step"] <= 20]
  for got, row in zip(rows(folder, "train"), want, strict=True):
    assert got["loss"] == pytest.approx(row["loss"], rel=1e-4), row["step"]
  assert rows(folder, "done")


@pytest.mark.slow
class SameNumbersTest(parameterized.TestCase):
  """What changes how, not what, is computed; 5 steps of a run each."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.base = losses()

  def test_a_mesh_of_eight(self):
    np.testing.assert_allclose(losses(mesh__data=4, mesh__model=2), self.base, rtol=1e-5)

  @parameterized.named_parameters(
    ("dispatches_of_one_step", {"train__steps_per_dispatch": 1}, 1e-6),
    ("passes_written_out", {"sleep__loops": "unroll"}, 1e-5),
    ("data_parallel", {"mesh__data": 8}, 1e-5),
    ("microbatches", {"train__microbatches": 4}, 1e-5),
    ("microbatches_on_a_mesh", {"train__microbatches": 2, "mesh__data": 4, "mesh__model": 2}, 1e-5),
    ("bfloat16", {"model__dtype": "bfloat16"}, 0.03),
  )
  def test_losses(self, changes, tolerance):
    np.testing.assert_allclose(losses(**changes), self.base, rtol=tolerance)

  def test_the_base_moves(self):
    self.assertLen(self.base, 5)
    self.assertGreater(np.ptp(self.base), 0.01)


def losses(**changes):
  """Losses of the first five steps with N = 2."""
  both = {"sleep__num_passes": 2, "data__num_strings": 2, "model__blocks": ("attn", "gdn")}
  cfg, task = settings(**both | changes)
  _, tx, one_step = train.optimization(cfg)
  segments = windows.plan(task.layout, cfg.model.window)
  with jax.set_mesh(sharding.make_mesh(cfg.mesh) if cfg.mesh.data > 1 else None):
    state = jax.jit(functools.partial(train.init_state, cfg, tx))()
    dispatch = train.make_dispatch(cfg, task, one_step, segments)
    found = []
    while len(found) < 5:
      state, measured = dispatch(state)
      found += [float(x) for x in measured["loss"]]
    assert int(state.step) == 5
  return found


class DataOrderTest(parameterized.TestCase):
  def test_runs_that_are_compared_read_the_same_data(self):
    """Weights and data of the start do not depend on N, on learning rates or on the length of the run."""
    states = []
    for changes in ({}, {"sleep__num_passes": 4}, {"optim__muon_lr": 0.5, "train__steps": 40}):
      cfg, task = settings(**changes)
      tx = train.optimization(cfg).tx
      key = jax.jit(lambda cfg=cfg, tx=tx: train.init_state(cfg, tx).key)()
      batch = jax.jit(task.batch, static_argnums=2)(key, jnp.int32(7), 16)
      states.append((jax.random.key_data(key), batch))
    for other in states[1:]:
      jax.tree.map(np.testing.assert_array_equal, other, states[0])

  def test_another_seed_reads_other_data(self):
    keys = []
    for seed in (0, 1):
      cfg, _ = settings(seed=seed)
      tx = train.optimization(cfg).tx
      keys.append(jax.random.key_data(jax.jit(lambda cfg=cfg, tx=tx: train.init_state(cfg, tx).key)()))
    self.assertFalse(np.array_equal(*keys))


class FitTest(parameterized.TestCase):
  @parameterized.parameters(
    ({"train__steps": 7}, "train.steps: must be a multiple of train.steps_per_dispatch = 5, got 7"),
    ({"train__eval_every": 7}, "train.eval_every: must be a multiple of train.steps_per_dispatch = 5"),
    ({"train__save_every": 21}, "train.save_every: must be a multiple of train.steps_per_dispatch = 5"),
    (
      {"train__batch_size": 12, "mesh__data": 8},
      "train.batch_size: must be a multiple of mesh.data = 8, got 12",
    ),
    (
      {"train__eval_batch_size": 4, "mesh__data": 8},
      "train.eval_batch_size: must be a multiple of mesh.data = 8",
    ),
    (
      {"train__microbatches": 16, "mesh__data": 8},
      "train.microbatches: must leave a part a multiple of mesh.data = 8 sequences, got parts of 4",
    ),
    ({"mesh__data": 3, "mesh__model": 3}, "mesh: data = 3 x model = 3 does not fit 8 device(s)"),
    ({"model__fast__kernel": "xla2"}, "model.fast.kernel: unknown value 'xla2'; did you mean \"xla\"?"),
  )
  def test_what_does_not_fit_is_refused_in_one_line(self, changes, message):
    cfg, _ = settings(**changes)
    with self.assertRaises(config.ConfigError) as caught:
      train.check_fits(cfg)
    self.assertIn(message, str(caught.exception))
    self.assertNotIn("\n", str(caught.exception))

  def test_what_fits_gets_its_mesh(self):
    cfg, _ = settings(mesh__data=4, mesh__model=2)
    self.assertEqual(train.check_fits(cfg).devices.shape, (4, 2))
