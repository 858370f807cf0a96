"""From a checkpoint to training: a run starts with its weights, and stage 1 moves the memory alone."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import optax
import pytest

from sleep_jax import config, model, optim, params, pretrained, train
from tests import hybrids

OURO = pathlib.Path(__file__).resolve().parents[1] / "data" / "golden" / "ouro_tiny"


def run_config(cfg, **optim_fields):
  return config.Config(
    data=None,
    model=cfg,
    sleep=config.SleepConfig(num_passes=2),
    optim=config.OptimConfig(newton_schulz_dtype="float32", **optim_fields),
    train=config.TrainConfig(init_from=str(OURO)),
  )


def test_a_run_starts_with_the_weights_of_a_checkpoint():
  source = pretrained.open_source(OURO, window=8, predict_passes=1)
  run = run_config(source.model)
  tx = optim.make(run.optim, model.declare(run.model), 2)
  train.check_fits(run)
  state = train.first_state(run, tx)
  hybrids.assert_same(state.params, pretrained.load(OURO)[1])
  optim.check_partition(state.opt_state, model.declare(run.model))
  assert int(state.step) == 0
  data_key = jax.random.split(jax.random.key(run.seed))[1]  # as that of a run whose weights are drawn
  np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(data_key))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"norm_eps": 1e-3}, "^train.init_from: .* is another model: model.norm_eps is 0.001, that of the check"),
    ({"blocks": ("attn",)}, "model.blocks is .'attn',., that of the checkpoint .'attn', 'attn', 'attn'."),
  ],
)
def test_another_model_is_refused_before_anything_is_made(changes, message):
  source = pretrained.open_source(OURO, window=8, predict_passes=1)
  with pytest.raises(config.ConfigError, match=message):
    train.check_fits(run_config(dataclasses.replace(source.model, **changes)))


def test_no_checkpoint_is_one_line():
  source = pretrained.open_source(OURO, window=8, predict_passes=1)
  run = config.replace(run_config(source.model), train={"init_from": "nowhere"})
  with pytest.raises(config.ConfigError, match="^nowhere: there is no such folder$"):
    train.check_fits(run)


@pytest.mark.slow
def test_stage_1_moves_the_memory_alone_and_its_norm_is_that_of_the_memory():
  base = hybrids.model_config(("attn", "attn"))
  weights = model.init(base, jax.random.key(0))
  fast = config.FastConfig(num_heads=1, key_dim=3, value_dim=4, generator_reduction=2)
  cfg, weights = pretrained.add_memory(base, weights, jax.random.key(1), num_layers=1, fast=fast)
  assert pretrained.memory_weights(cfg) == ("blocks/1/*",)
  weights["blocks"]["1"]["mixer"]["o"] = (
    weights["blocks"]["1"]["mixer"]["o"] + 0.1
  )  # so that all of it learns
  batch, layout = hybrids.random_batch(7, [5, 6])
  segments = model.plan(layout, cfg.window)
  run = dataclasses.replace(
    run_config(cfg, trained=pretrained.memory_weights(cfg)), train=config.TrainConfig()
  )
  declared = model.declare(cfg)
  tx = optim.make(run.optim, declared, 2)
  state = train.TrainState(
    step=jax.numpy.zeros((), "int32"), key=jax.random.key(0), params=weights, opt_state=tx.init(weights)
  )
  step = hybrids.jit(functools.partial(train.train_step, cfg=run, tx=tx, segments=segments))
  after, measured = step(state, batch)
  _, grads, _ = hybrids.program(segments, cfg, run.sleep)(weights, batch)
  np.testing.assert_allclose(measured["grad_norm"], optax.tree.norm(grads["blocks"]["1"]), rtol=1e-4)
  assert measured["grad_norm"] < 0.9 * optax.tree.norm(grads)
  for (path, old), new in zip(
    jax.tree_util.tree_leaves_with_path(weights), jax.tree.leaves(after.params), strict=True
  ):
    name = params.name_of(path)
    assert np.array_equal(old, new) != name.startswith("blocks/1/"), name
