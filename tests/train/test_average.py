"""The moving average of the weights: what it is, who takes it, and that a run resumes with it."""

import functools
import shutil

import jax
import numpy as np
import pytest

from sleep_jax import config, optim, pretrained, train, windows
from sleep_jax.config import ConfigError
from sleep_jax.runtime import checkpoint, metrics, workdir
from tests import hybrids
from tests.train import test_task

KEEP = 0.6


def kind(**changes):
  cfg, task = test_task.device_kind()
  return config.replace(cfg, optim={"average": KEEP}, **changes), task


def trained(cfg, task, folder, **run):
  with workdir.prepare(folder, config.to_dict(cfg), **run) as prepared:
    return train.train(cfg, task, prepared, report=lambda line: None)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
  """Folder of a finished run of 4 steps, and its config and task."""
  folder = tmp_path_factory.mktemp("runs") / "run"
  cfg, task = kind()
  trained(cfg, task, folder)
  return folder, cfg, task


def read(folder, cfg, name):
  """Weights of the last checkpoint: `params` or `average`."""
  state = jax.eval_shape(functools.partial(train.init_state, cfg, train.optimization(cfg).tx))
  with checkpoint.Checkpoints(folder / "checkpoints", read_only=True) as saved:
    return saved.restore({name: getattr(state, name)}, subset=True)[1][name]


def test_it_is_the_mean_with_weights_that_fall_by_a_factor():
  """Against the sum written out: each step's weights times how much of them every later step keeps."""
  steps = [{"w": np.random.default_rng(i).normal(size=(2, 3)).astype(np.float32)} for i in range(6)]
  average = steps[0]
  for t, weights in enumerate(steps[1:], 1):
    average = optim.moved(average, weights, KEEP, np.int32(t))
  keeps = [min(KEEP, (1 + t) / (10 + t)) for t in range(1, 6)]
  assert keeps[0] == pytest.approx(2 / 11) and KEEP not in keeps  # the start is soon forgotten
  shares = [np.prod(keeps)] + [(1 - k) * np.prod(keeps[i + 1 :]) for i, k in enumerate(keeps)]
  assert sum(shares) == pytest.approx(1)
  want = sum(share * x["w"].astype(float) for share, x in zip(shares, steps, strict=True))
  np.testing.assert_allclose(average["w"], want, rtol=1e-5)
  late = optim.moved(steps[0], steps[1], KEEP, np.int32(1000))["w"]
  np.testing.assert_allclose(late, KEEP * steps[0]["w"] + (1 - KEEP) * steps[1]["w"], rtol=1e-5)


def test_a_step_moves_it_to_the_weights_behind_the_step_and_trains_as_without():
  cfg, task = kind()
  plan = windows.plan(task.layout, cfg.model.window)
  ends = {}
  for name, one in (("with", cfg), ("without", config.replace(cfg, optim={"average": 0.0}))):
    _, tx, one_step = train.optimization(one)
    state = hybrids.jit(functools.partial(train.init_state, one, tx))()
    first = state.params
    batch = task.batch(state.key, state.step, one.train.batch_size)
    ends[name] = hybrids.jit(functools.partial(one_step, segments=plan))(state, batch)[0]
  hybrids.assert_same(ends["with"].params, ends["without"].params)
  want = jax.tree.map(lambda a, w: a + 9 / 11 * (w - a), first, ends["with"].params)
  hybrids.assert_near(ends["with"].average, want, 1e-6)
  assert ends["without"].average is None and ends["without"].tested is ends["without"].params
  assert ends["with"].tested is ends["with"].average


def test_the_run_is_evaluated_and_loaded_by_its_average(ran):
  folder, cfg, task = ran
  average, last = read(folder, cfg, "average"), read(folder, cfg, "params")
  assert hybrids.distance(average["embed"], last["embed"]) > 1e-4
  hybrids.assert_same(pretrained.load_run(folder).weights, average)
  row = [r for r in metrics.read(folder / "metrics.jsonl") if r["kind"] == "eval"][-1]
  losses = [task.steps(cfg, None, None).evaluation()(weights)["loss"] for weights in (average, last)]
  assert row["loss"] == pytest.approx(losses[0], rel=1e-6)
  assert abs(losses[0] - losses[1]) > 1e-5


def test_a_run_that_goes_on_ends_as_one_that_never_stopped(ran, tmp_path):
  folder, cfg, task = ran
  grown, longer = tmp_path / "grown", config.replace(cfg, train={"steps": 8})
  shutil.copytree(folder, grown)
  trained(longer, task, grown, may_grow=("train.steps",))
  trained(longer, task, tmp_path / "whole")
  for name in ("params", "average"):
    hybrids.assert_same(read(grown, longer, name), read(tmp_path / "whole", longer, name))


@pytest.mark.parametrize("value", [1.0, -0.1, float("nan")])
def test_what_keeps_all_or_less_than_nothing_is_refused(value):
  with pytest.raises(ConfigError, match=r"^optim\.average: must "):
    config.OptimConfig(average=value)
