"""The Flax face trains to the same weights as our own step."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from sleep_jax import config, flax_module, generate, model, train, windows
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


@pytest.mark.parametrize(("kept", "caches"), [("each", 3), ("last", 1)])
def test_the_state_has_as_many_caches_as_the_sleep_config_says(kept, caches):
  """Without it a model with a cache a pass would silently sleep with one."""
  cfg = hybrids.model_config(("attn", "gdn"), eviction="sliding")
  module = flax_module.SleepingHybrid(
    cfg, config.SleepConfig(num_passes=3, kept=kept), weights=hybrids.random_params(cfg)
  )
  assert module.init_state(2).kept["0"].k.shape[0] == caches
  hybrids.assert_same(module.init_state(2), model.init_state(cfg, 2, module.sleep_cfg))


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_each_method_is_the_pure_function_with_masks(eviction):
  cfg = hybrids.model_config(("attn", "gdn"), eviction=eviction)
  sleep_cfg = config.SleepConfig(num_passes=2, kept="each")
  weights = hybrids.random_params(cfg)
  module = flax_module.SleepingHybrid(cfg, sleep_cfg, weights=weights)
  tokens, valid = hybrids.random_tokens(2, 4), np.array([[True] * 4, [False, False, True, True]])
  graph, held = nnx.split(module)
  asleep = hybrids.jit(
    lambda held, start, valid: nnx.merge(graph, held).consolidate(tokens, start, valid=valid)
  )
  pure = hybrids.jit(lambda w, start: model.consolidate(w, tokens, start, cfg, sleep_cfg, valid=valid))
  state = asleep(held, module.init_state(2), valid)
  hybrids.assert_same(state, pure(weights, model.init_state(cfg, 2, sleep_cfg)))
  unmasked = asleep(held, module.init_state(2), None)
  assert hybrids.distance(unmasked.fast["1"].S, state.fast["1"].S) > 1e-3
  awake = hybrids.jit(lambda held, state: nnx.merge(graph, held).predict(tokens, state, valid=valid))
  pure = hybrids.jit(lambda w, state: model.predict(w, tokens, state, cfg, valid=valid))
  hybrids.assert_same(awake(held, state), pure(weights, state))


def test_reads_and_generates_as_the_pure_functions_do():
  weights, tokens, key = model.init(CFG, jax.random.key(0)), hybrids.random_tokens(1, 6), jax.random.key(0)
  module = flax_module.SleepingHybrid(CFG, SLEEP, weights=weights)
  session = generate.read(weights, tokens, generate.start(CFG, SLEEP, 1), CFG, SLEEP)
  want = [t for t, _ in generate.generate(weights, session, CFG, SLEEP, count=5, key=key)]
  got = [t for t, _ in module.generate(module.read(tokens, module.start(1)), count=5, key=key)]
  np.testing.assert_array_equal(got, want)


@pytest.mark.slow
def test_remat_of_the_sleep_config_changes_memory_not_gradients():
  batch, layout = hybrids.random_batch(12, [10, 11])
  segments, weights = windows.plan(layout, CFG.window), model.init(CFG, jax.random.key(0))

  def run(remat):
    sleep_cfg = config.SleepConfig(num_passes=4, remat=remat)
    module = flax_module.SleepingHybrid(CFG, sleep_cfg, weights=weights)
    graph, held = nnx.split(module)
    grad = hybrids.jit(lambda held: nnx.grad(lambda m: m.loss(batch, segments))(nnx.merge(graph, held)))
    compiled = grad.lower(held).compile()
    return nnx.to_pure_dict(grad(held))["weights"], compiled.memory_analysis().temp_size_in_bytes

  (plain, large), (recomputed, small) = run("none"), run("window")
  hybrids.assert_near(recomputed, plain, 1e-4)
  assert small < large
