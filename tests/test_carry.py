"""Sliding eviction against NumPy oracles that never shift a cache.

Tolerances are those of `test_model_oracle`, for its reasons.
"""

import numpy as np
import pytest
from absl.testing import parameterized

from sleep_jax import config, windows
from tests import hybrids, oracle, oracle_sliding
from tests.hybrids import HYBRID, assert_near

NEAR, GRADIENT = 1e-4, 1e-3


def prepared(pattern=HYBRID, *, length=14, scored=(6, 7, 13), pads=(0, 1, 5), sleep=None, **changes):
  """Config, sleep config, parameters, batch, plan and the sliding oracle's settings."""
  cfg = hybrids.model_config(pattern, eviction="sliding", **changes)
  sleep_cfg = config.SleepConfig(**(sleep or {}))
  batch, layout = hybrids.random_batch(length, scored, pads=pads)
  settings = hybrids.oracle_settings(cfg, sleep_cfg, batch)
  settings |= {"kept": sleep_cfg.kept, "reset": sleep_cfg.state == "reset"}
  segments = windows.plan(layout, cfg.window, sleep_cfg)
  return cfg, sleep_cfg, hybrids.random_params(cfg), batch, segments, settings


class OrdinaryHybridTest(parameterized.TestCase):
  @parameterized.parameters((("attn", "gdn"), 4), (("attn", "attn"), 3), (("gdn", "attn"), 1))
  def test_one_pass_is_sliding_window_attention_without_windows(self, pattern, window):
    cfg, sleep_cfg, params, batch, segments, _ = prepared(pattern, window=window)
    logits, state = hybrids.reader(segments, cfg, sleep_cfg)(params, batch)
    plain = oracle.unwindowed_hybrid(
      params, batch.inputs, pattern=pattern, window=window, valid=batch.valid, eviction="sliding"
    )
    assert_near(logits, plain["logits"][:, windows.answer_positions(segments)], NEAR)
    assert_near({i: state.fast[i].S for i in plain["S"]}, plain["S"], NEAR)


CASES = (
  ("last pass", {"num_passes": 3}),
  ("each pass", {"num_passes": 3, "kept": "each"}),
  (
    "the middle loops, written out",
    {"num_passes": 2, "kept": "each", "first_block": 1, "last_block": 3, "loops": "unroll", "remat": "pass"},
  ),
  ("read and slept on", {"when": "always", "num_passes": 2}),
  (
    "read and slept on, the middle loops, each pass",
    {"when": "always", "num_passes": 3, "kept": "each", "first_block": 1, "last_block": 3},
  ),
  ("reset", {"num_passes": 2, "state": "reset", "first_block": 1, "remat": "window"}),
)


class OracleTest(parameterized.TestCase):
  @parameterized.named_parameters(*CASES)
  def test_logits_and_state(self, sleep):
    cfg, sleep_cfg, params, batch, segments, settings = prepared(sleep=sleep)
    logits, state = hybrids.reader(segments, cfg, sleep_cfg)(params, batch)
    expected = oracle_sliding.forward(params, batch.inputs, batch.loss_mask, **settings)
    at = windows.answer_positions(segments)
    exact = expected["logits"][:, np.searchsorted(expected["positions"], at)]
    keep = batch.valid[:, at]
    assert_near(np.asarray(logits)[keep], exact[keep], NEAR)
    for i, S in expected["S"].items():
      assert_near(state.fast[i].S, S, NEAR)
    for i, caches in expected["history"].items():
      here = sleep_cfg.first_block <= int(i) < (sleep_cfg.last_block or 4)
      kept, newest = state.kept[i], batch.valid[:, -3:]
      self.assertLen(kept.k, len(caches) if here else 1)
      for n, (k, v) in enumerate(caches[: len(kept.k)]):
        np.testing.assert_array_equal(kept.valid[n], newest)
        assert_near(np.asarray(kept.k[n])[newest], k[:, -3:][newest], NEAR)
        assert_near(np.asarray(kept.v[n])[newest], v[:, -3:][newest], NEAR)

  def test_the_tolerance_would_notice(self):
    _, _, params, batch, _, settings = prepared(sleep=CASES[0][1])

    def run(**wrong):
      return oracle_sliding.forward(params, batch.inputs, batch.loss_mask, **settings | wrong)

    for wrong in ({"kept": "each"}, {"reset": True}, {"num_passes": 2}, {"looped": (1, 4)}):
      self.assertGreater(hybrids.distance(run(**wrong)["logits"], run()["logits"]), 10 * NEAR, wrong)

  @parameterized.parameters(("last", "unread"), ("each", "unread"), ("last", "always"), ("each", "always"))
  @pytest.mark.slow
  def test_gradients_through_what_is_kept(self, kept, when):
    scored = (8, 9) if when == "unread" else (0, 3, 5, 8, 9)
    cfg, sleep_cfg, params, batch, segments, settings = prepared(
      ("gdn", "attn"), length=10, scored=scored, sleep={"when": when, "num_passes": 2, "kept": kept}
    )
    _, grads, _ = hybrids.program(segments, cfg, sleep_cfg)(params, batch)
    data = (batch.inputs, batch.targets, batch.loss_mask)
    for path, index, exact in oracle.sample_gradients(
      params, *data, entries=2, run=oracle_sliding.forward, **settings
    ):
      got = np.asarray(oracle.leaf(grads, path), np.float64)
      self.assertLess(abs(got[index] - exact), GRADIENT * np.abs(got).max(), (path, index))
