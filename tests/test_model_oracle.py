"""The whole model against the NumPy oracle: logits, state, loss and gradients.

The package computes in float32 whatever it is asked, the oracle in float64 at the same parameters. Each
tolerance is five to ten times the worst difference measured over these cases and five seeds (2e-5 of S,
7e-6 of logits, 1e-4 of gradients); what a mistake in a setting changes is a hundred times larger
(`test_the_tolerance_would_notice`).
"""

import dataclasses

import jax
import numpy as np
import pytest
from absl.testing import parameterized

from sleep_jax import carry, config, windows
from tests import hybrids, oracle
from tests.hybrids import HYBRID

STATE = LOGITS = 1e-4  # relative to the largest entry of each array
GRADIENT = 1e-3  # relative to the largest entry of each tensor's gradient
LOSS = 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
  """A run: a model, how it sleeps, and a batch with `pads` on the left of its rows."""

  name: str
  pattern: tuple[str, ...] = HYBRID
  length: int = 14  # with L = 4 the last window is half as long
  scored: tuple[int, ...] = (6, 7, 13)  # windows: asleep, read, asleep, read
  pads: tuple[int, ...] = (0, 1, 5)  # none, part of a window, a window and a part
  window: int = 4
  fast: tuple = ()
  attention: tuple = ()
  sleep: tuple = ()

  @property
  def model(self) -> config.ModelConfig:
    return hybrids.model_config(
      self.pattern, window=self.window, fast=dict(self.fast), attention=dict(self.attention)
    )


def case(name, *, fast=None, attention=None, sleep=None, **fields) -> Case:
  nested = {"fast": fast, "attention": attention, "sleep": sleep}
  return Case(name, **fields, **{key: tuple((value or {}).items()) for key, value in nested.items()})


FORWARD = (
  case("interleaved windows", sleep={"num_passes": 3}),
  case(
    "middle blocks loop",
    sleep={"num_passes": 3, "first_block": 1, "last_block": 3, "loops": "unroll"},
    fast={"conv_size": 0},
    attention={"qk_norm": False, "num_kv_heads": 4},
  ),
  case(
    "first blocks loop",
    pattern=("gdn", "attn", "hebbian"),
    length=18,
    scored=(16,),  # four equal windows asleep under one scan
    pads=(0, 4, 8),  # whole windows
    sleep={"num_passes": 2, "last_block": 2},
    fast={"conv_context": "reset"},
  ),
  case(
    "last blocks loop",
    pattern=("hebbian", "attn", "gdn"),
    length=13,  # the last window is one token, fewer than the convolution reaches back
    scored=(12,),
    sleep={"num_passes": 2, "first_block": 1, "remat": "window"},
    fast={"conv_size": 2},
    attention={"num_kv_heads": 1, "rope_theta": 50.0},
  ),
  case("one window", pattern=("gdn", "attn"), window=40, length=6, scored=(2, 5), pads=(0, 1, 2)),
  case(
    "the last window asleep and short",
    pattern=("attn", "gdn"),
    length=11,
    scored=(4, 5, 6, 7),  # a window read in full
    sleep={"num_passes": 2},
  ),
  case(
    "read and slept on",
    scored=(0, 2, 3, 6, 7, 9, 12, 13),
    sleep={"when": "always", "num_passes": 3},
  ),
  case(
    "read and slept on, the middle loops",
    scored=(1, 6, 13),  # the third window has no loss
    sleep={"when": "always", "num_passes": 3, "first_block": 1, "last_block": 3, "remat": "window"},
  ),
  case(
    "the last window without a loss",
    pattern=("attn", "gdn"),
    length=11,
    scored=(1, 4, 5, 6, 7),
    sleep={"when": "always", "num_passes": 2},
  ),
  case("attention alone", pattern=("attn", "attn"), sleep={"num_passes": 2}),
)

SLOW_FORWARD = (
  case("a convolution of one tap", pattern=("gdn",), sleep={"num_passes": 2}, fast={"conv_size": 1}),
  case(
    "windows of one token",
    pattern=("gdn", "attn"),
    window=1,
    length=5,
    scored=(4,),
    pads=(0, 2, 3),
    sleep={"num_passes": 3},
  ),
)

GRADIENTS = (
  case(
    "two windows under a scan",
    pattern=("gdn", "attn"),
    length=10,
    scored=(8, 9),
    sleep={"num_passes": 2},
  ),
  case(
    "read and slept on",
    pattern=("gdn", "attn"),
    length=11,
    scored=(0, 3, 5, 9, 10),
    sleep={"when": "always", "num_passes": 2, "first_block": 0, "last_block": 1},
  ),
)

SLOW_GRADIENTS = (
  case("all of it, read and slept on", scored=range(14), sleep={"when": "always", "num_passes": 3}),
  case(
    "read and slept on, by passes",
    scored=(1, 2, 6, 7, 9, 13),
    sleep={"when": "always", "num_passes": 3, "remat": "pass", "loops": "unroll", "first_block": 1},
  ),
  case(
    "interleaved, written out, rematerialised",
    pattern=("hebbian",),
    sleep={"num_passes": 2, "loops": "unroll", "remat": "block"},
    fast={"conv_context": "reset", "conv_size": 2},
    pads=(0, 0),
  ),
  case("all of it", sleep={"num_passes": 3, "remat": "window"}),
  case("all of it by passes", sleep={"num_passes": 3, "remat": "pass", "loops": "unroll"}),
  case(
    "the middle loops",
    pattern=("gdn", "attn", "gdn", "hebbian"),
    length=18,
    scored=(16, 17),
    sleep={"num_passes": 3, "first_block": 1, "last_block": 3, "remat": "pass"},
    fast={"conv_size": 0},
    attention={"qk_norm": False},
  ),
)


def prepared(c: Case, seed: int = 0):
  """Config, sleep config, parameters, batch, plan and the oracle's settings."""
  sleep_cfg = config.SleepConfig(**dict(c.sleep))
  batch, layout = hybrids.random_batch(c.length, c.scored, pads=c.pads, seed=seed + 1)
  params, segments = hybrids.random_params(c.model, seed), windows.plan(layout, c.window, sleep_cfg)
  return c.model, sleep_cfg, params, batch, segments, hybrids.oracle_settings(c.model, sleep_cfg, batch)


def check_logits(test, got, expected, batch, segments):
  """At the positions that are read, pads apart."""
  at = windows.answer_positions(segments)
  test.assertTrue(set(at) <= set(expected["positions"]))
  exact = expected["logits"][:, np.searchsorted(expected["positions"], at)]
  keep = np.ones(exact.shape[:2], bool) if batch.valid is None else batch.valid[:, at]
  hybrids.assert_near(np.asarray(got)[keep], exact[keep], LOGITS)


class ForwardTest(parameterized.TestCase):
  @parameterized.named_parameters((c.name, c) for c in FORWARD)
  def test_logits_and_state(self, c):
    self.check(c)

  @parameterized.named_parameters((c.name, c) for c in SLOW_FORWARD)
  @pytest.mark.slow  # innermost: absl hands the marks of a function on to its cases
  def test_logits_and_state_of_rarer_shapes(self, c):
    self.check(c)

  def check(self, c):
    cfg, sleep_cfg, params, batch, segments, settings = prepared(c)
    logits, state = hybrids.reader(segments, cfg, sleep_cfg)(params, batch)
    expected = oracle.forward(params, batch.inputs, batch.loss_mask, **settings)
    check_logits(self, logits, expected, batch, segments)
    opened = carry.open_window(state, cfg)  # "reset" drops the contexts when the next window opens
    hybrids.assert_near(hybrids.as_dicts(opened.fast), hybrids.from_oracle(expected["state"]), STATE)

  def test_the_tolerance_would_notice(self):
    """One pass more, another block range, or one pad less is at least a hundred tolerances away."""
    cfg, _, params, batch, _, settings = prepared(FORWARD[0])
    right = oracle.forward(params, batch.inputs, batch.loss_mask, **settings)
    fewer = np.array(batch.valid)
    fewer[1, 0] = True
    for wrong in (
      {"num_passes": 4},
      {"looped": (0, 3)},
      {"looped": (1, 4)},
      {"conv_context": "reset"},
      {"valid": fewer},
      {"rope_theta": 5_000.0},
    ):
      other = oracle.forward(params, batch.inputs, batch.loss_mask, **settings | wrong)
      self.assertGreater(hybrids.distance(other["logits"], right["logits"]), 100 * LOGITS, wrong)


class GradientTest(parameterized.TestCase):
  """The loss and its gradients through all passes and windows, by complex step in the oracle."""

  def check(self, c, entries):
    cfg, sleep_cfg, params, batch, segments, settings = prepared(c)
    loss, grads, logits = hybrids.program(segments, cfg, sleep_cfg)(params, batch)
    data = (batch.inputs, batch.targets, batch.loss_mask)
    expected = oracle.forward(params, batch.inputs, batch.loss_mask, **settings)
    check_logits(self, logits, expected, batch, segments)
    np.testing.assert_allclose(float(loss), oracle.loss(params, *data, **settings), rtol=LOSS)

    sampled = oracle.sample_gradients(params, *data, entries=entries, **settings)
    self.assertEqual({e.path for e in sampled}, {path for path, _ in oracle.leaves(params)})
    far = {}
    for path, index, exact in sampled:
      got = np.asarray(oracle.leaf(grads, path), np.float64)
      error = abs(got[index] - exact) / np.abs(got).max()
      if not error <= GRADIENT:
        far[path, index] = (got[index], exact, error)
    self.assertEmpty(far)
    self.assertEqual(jax.tree.structure(grads), jax.tree.structure(params))

  @parameterized.named_parameters((c.name, c) for c in GRADIENTS)
  def test_gradients(self, c):
    self.check(c, entries=2)

  @parameterized.named_parameters((c.name, c) for c in SLOW_GRADIENTS)
  @pytest.mark.slow
  def test_gradients_of_more_models(self, c):
    self.check(c, entries=2)
