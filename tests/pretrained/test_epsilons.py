"""A checkpoint's epsilons reach the layers that they belong to."""

import jax
import numpy as np

from sleep_jax import config, windows
from tests import hybrids, oracle


def test_the_norm_behind_the_fast_weights_has_its_own_epsilon(monkeypatch):
  """Against the oracle with another constant. At 0.3 nothing that S answers keeps its size."""
  cfg = hybrids.model_config(("attn", "gdn"), fast={"out_norm_eps": 0.3})
  weights, sleep_cfg = hybrids.random_params(cfg), config.SleepConfig(num_passes=2)
  batch, layout = hybrids.random_batch(7, [5, 6])
  got, _ = hybrids.reader(windows.plan(layout, cfg.window), cfg, sleep_cfg)(weights, batch)
  wanted = {}
  for eps in (0.3, 1e-5):
    monkeypatch.setattr(oracle, "OUT_NORM_EPS", eps)
    settings = hybrids.oracle_settings(cfg, sleep_cfg, batch)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), weights)
    answer = oracle.forward(params, batch.inputs, batch.loss_mask, **settings)
    wanted[eps] = answer["logits"][:, np.isin(answer["positions"], np.flatnonzero(layout))]
  assert hybrids.distance(got, wanted[0.3]) < 1e-4 < hybrids.distance(got, wanted[1e-5])
