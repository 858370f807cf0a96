"""The Flax face trains to the same weights as our own step."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from sleep_jax import config, flax_module, train, windows
from tests import hybrids

CFG = hybrids.model_config(("attn", "jet"))
SLEEP = config.SleepConfig(num_passes=2)


@pytest.mark.slow
def test_two_steps_of_plain_nnx_are_two_steps_of_our_trainer():
  batch, layout = hybrids.random_batch(7, [5, 6])
  segments = windows.plan(layout, CFG.window)
  run = config.Config(
    data=None, model=CFG, sleep=SLEEP, optim=config.OptimConfig(newton_schulz_dtype="float32")
  )
  _, tx, one_step = train.optimization(run)
  ours = train.init_state(run, tx)
  module = flax_module.SleepingHybrid(CFG, SLEEP, weights=ours.params)
  hybrids.assert_same(module.tree(), ours.params)
  step = hybrids.jit(functools.partial(one_step, segments=segments))

  graph, held = nnx.split(module)

  @hybrids.jit
  def flax_step(held, opt_state):
    module = nnx.merge(graph, held)
    loss, grads = nnx.value_and_grad(lambda m: m.loss(batch, segments))(module)
    weights = module.tree()
    updates, opt_state = tx.update(nnx.to_pure_dict(grads)["weights"], opt_state, weights)
    nnx.update(module, {"weights": optax.apply_updates(weights, updates)})
    return loss, nnx.state(module), opt_state

  opt_state = tx.init(module.tree())
  for _ in range(2):
    before = ours.params
    ours, measured = step(ours, batch)
    loss, held, opt_state = flax_step(held, opt_state)
    nnx.update(module, held)
    np.testing.assert_allclose(loss, measured["loss"], rtol=1e-6)
    hybrids.assert_near(module.tree(), ours.params, 1e-5)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, ours.params)
    assert moved["embed"] and moved["blocks"]["1"]["mixer"]["q"]


@pytest.mark.slow
def test_the_optimizer_of_nnx_takes_it_as_it_is():
  batch, layout = hybrids.random_batch(7, [5, 6])
  segments = windows.plan(layout, CFG.window)
  module = flax_module.SleepingHybrid(CFG, SLEEP, jax.random.key(0))
  weights, tx = module.tree(), optax.sgd(0.1)
  optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)
  graph, held = nnx.split(module)
  grads = hybrids.jit(lambda held: nnx.grad(lambda m: m.loss(batch, segments))(nnx.merge(graph, held)))(held)
  optimizer.update(module, grads)
  expected = jax.tree.map(lambda w, g: w - 0.1 * g, weights, nnx.to_pure_dict(grads)["weights"])
  hybrids.assert_near(module.tree(), expected, 1e-6)


def test_it_wants_a_key_or_weights():
  with pytest.raises(ValueError, match="a key or weights"):
    flax_module.SleepingHybrid(CFG, SLEEP)
