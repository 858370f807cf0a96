"""The growth of a gradient against finite differences, and the perturbed loss against the model's own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import config, model, windows
from sleep_jax.config import SleepConfig
from sleep_jax.scoring import stability
from tests import hybrids


def setting(pattern=("gdn", "hebbian"), **changes):
  """Config, weights, batch and plan: two windows asleep, one that answers."""
  cfg = hybrids.model_config(pattern, **changes)
  batch, layout = hybrids.random_batch(12, (10, 11), pads=(0, 3))
  return cfg, hybrids.random_params(cfg), batch, windows.plan(layout, cfg.window)


def zeros(cfg, batch, sleep_cfg, count=2):
  """Nothing added to any window or pass."""
  fast = model.init_state(cfg, len(batch.inputs)).fast
  first, last = sleep_cfg.looped(len(cfg.blocks))
  repeated = {i: s.S for i, s in fast.items() if first <= int(i) < last}
  return (
    {i: jnp.zeros((count, *s.S.shape)) for i, s in fast.items()},
    {i: jnp.zeros((count, sleep_cfg.num_passes, *S.shape)) for i, S in repeated.items()},
  )


HOW = ({}, {"last_block": 1}, {"state": "reset", "first_block": 1})


@pytest.mark.parametrize(
  ("how", "loop_norm"),
  [
    (HOW[0], False),
    (HOW[2], True),
    *(pytest.param(*c, marks=pytest.mark.slow) for c in ((HOW[1], False), (HOW[2], False))),
    *(pytest.param(*c, marks=pytest.mark.slow) for c in ((HOW[0], True), (HOW[1], True))),
  ],
  ids=str,
)
def test_without_a_perturbation_the_loss_is_the_models(how, loop_norm):
  cfg, weights, batch, segments = setting(loop_norm=loop_norm)
  sleep_cfg = SleepConfig(num_passes=3, **how)
  run = hybrids.jit(lambda z: stability.perturbed_loss(weights, z, batch, segments, cfg, sleep_cfg))
  plain = hybrids.jit(lambda batch: model.loss(weights, batch, segments, cfg, sleep_cfg)[0])
  np.testing.assert_allclose(run(zeros(cfg, batch, sleep_cfg)), plain(batch), rtol=1e-5)


@functools.cache
def measured():
  """A model with a state of two numbers a head, one row, how it sleeps, and the growth of its gradient."""
  cfg, weights, batch, segments = setting(("gdn",), fast={"num_heads": 1, "key_dim": 2, "value_dim": 2})
  batch = jax.tree.map(lambda x: x[:1], dataclasses.replace(batch, valid=None))
  case = (cfg, weights, batch, segments, SleepConfig(num_passes=2))
  return *case, stability.gradient_growth(weights, batch, segments, cfg, case[-1])


def test_norms_are_those_of_finite_differences():
  """Entry by entry."""
  cfg, weights, batch, segments, sleep_cfg, growth = measured()
  run = hybrids.jit(lambda z: stability.perturbed_loss(weights, z, batch, segments, cfg, sleep_cfg))
  (by_window, by_pass), step = zeros(cfg, batch, sleep_cfg), 3e-2
  for window in range(2):
    for n in range(2):
      slopes = []
      for entry in np.ndindex(2, 2):
        at = (window, n, 0, 0, *entry)
        up, down = (run((by_window, {"0": by_pass["0"].at[at].set(sign * step)})) for sign in (1, -1))
        slopes.append((up - down) / (2 * step))
      np.testing.assert_allclose(growth.by_pass[window][n], np.linalg.norm(slopes), rtol=0.03)
  np.testing.assert_allclose(growth.by_window, [norms[0] for norms in growth.by_pass], rtol=1e-5)


def test_factors_are_geometric_means_on_the_way_back():
  growth = stability.Growth(1.0, (8.0, 4.0, 1.0), ((8.0, 6.0, 3.0), (4.0, 2.0, 2.0)))
  np.testing.assert_allclose(growth.a_window, 8.0**0.5)
  np.testing.assert_allclose(growth.a_pass, (8 / 6 * 2 * 2 * 1) ** 0.25)
  np.testing.assert_allclose(growth.first_pass, (8 / 6 * 2) ** 0.5)
  assert np.isnan(stability.Growth(1.0, (2.0,), ((2.0,),)).a_window)


def test_the_total_is_the_norm_of_the_loss_gradient():
  cfg, weights, batch, segments, sleep_cfg, growth = measured()
  _, grads, _ = hybrids.program(segments, cfg, sleep_cfg)(weights, batch)
  want = np.sqrt(sum(np.sum(np.square(x, dtype=float)) for x in jax.tree.leaves(grads)))
  np.testing.assert_allclose(growth.total, want, rtol=1e-4)


def test_what_cannot_be_measured_is_refused():
  cfg, weights, batch, segments = setting()
  with pytest.raises(config.ConfigError, match="^model.eviction: must be 'hard'"):
    stability.gradient_growth(
      weights, batch, segments, config.replace(cfg, eviction="sliding"), SleepConfig()
    )
  awake = windows.plan([True] * 12, cfg.window)
  with pytest.raises(config.ConfigError, match="^model.window: no window is slept on"):
    stability.gradient_growth(weights, batch, awake, cfg, SleepConfig())
