"""What a config needs before anything is compiled: a lower bound, and refusals that name a field."""

import tracemalloc

import jax
import jax.numpy as jnp
import pytest

from sleep_jax import config, generate, model, optim, train
from sleep_jax.config import ConfigError, SleepConfig
from sleep_jax.cost import footprint, need
from sleep_jax.data import depo, memory, rule110
from sleep_jax.experiments import config_file, gsm_infinite
from sleep_jax.experiments import depo as depo_experiment
from sleep_jax.experiments import rule110 as rule110_experiment
from sleep_jax.train import host_steps
from tests import hybrids

GB = 10**9
MODELS = {
  "hybrid": {"pattern": ("attn", "gdn")},
  "sliding": {"pattern": ("attn", "hebbian", "attn"), "eviction": "sliding"},
  "bfloat16": {"pattern": ("attn", "delta"), "dtype": "bfloat16"},
  "memory alone": {"pattern": ("kda", "gdn2")},
  "attention alone": {"pattern": ("attn", "attn")},
}


def run(name, sleep=None, **changes):
  """A run of Rule 110 with one of the models."""
  values = dict(MODELS[name])
  cfg = hybrids.model_config(values.pop("pattern"), **values)
  made = config.Config(data=rule110.Rule110Config(), model=cfg, sleep=sleep or SleepConfig())
  sizes = {"batch_size": 8, "eval_batch_size": 8, "eval_sequences": 8}
  return config.replace(made, train=sizes | changes.pop("train", {}), **changes)


@pytest.mark.parametrize("average", [0.0, 0.9])
@pytest.mark.parametrize("name", MODELS)
def test_weights_and_optimizer_are_those_that_the_run_makes(name, average):
  cfg = run(name, optim={"average": average})
  state = jax.eval_shape(lambda: train.init_state(cfg, train.optimization(cfg)[1]))
  weights, moments = footprint.size(state.params), footprint.size(state.opt_state)
  counted = need.least(cfg, 100)
  assert counted["average of the weights"] == footprint.size(state.average) == bool(average) * weights
  assert footprint.optimizer(cfg.model, cfg.optim) == moments + footprint.size(state.average)
  assert counted["weights"] == need.weights(cfg.model) == weights
  assert 0 <= weights + moments - counted["gradients and optimizer"] < 64  # the counters of steps


def test_of_frozen_weights_only_themselves_are_counted():
  cfg = run("hybrid", optim={"trained": ("head",)})
  assert need.least(cfg, 100)["gradients and optimizer"] == 0
  assert optim.freeze(cfg.optim, model.declare(cfg.model))  # the pattern fits


ROOMS = [(rule110, rule110.Rule110Config()), (depo, depo.DepoConfig()), (memory, memory.MemoryConfig())]


@pytest.mark.parametrize(("room", "data"), ROOMS)
def test_a_batch_is_what_the_task_makes(room, data):
  cfg = config.replace(run("hybrid"), data=data)
  batch = jax.eval_shape(lambda key: room.batch(data, key, 0, 8), jax.random.key(0))
  least = need.least(cfg, data.length)["batch"]
  assert least <= footprint.size(batch) <= 1.5 * least
  assert need.least(cfg, data.length, grouped=3)["batch"] == 3 * least


@pytest.mark.parametrize("kept", ["last", "each"])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", MODELS)
def test_a_session_is_what_generate_makes(name, rows, kept):
  cfg = run(name).model
  sleep_cfg = SleepConfig(num_passes=3, kept=kept, first_block=1)
  made = jax.eval_shape(lambda: generate.start(cfg, sleep_cfg, rows))
  least = need.session(cfg, sleep_cfg, rows)
  contexts = footprint.state(cfg, rows, sleep_cfg) - rows * (need._state(cfg) + need._kept(cfg, sleep_cfg))
  assert least <= footprint.size(made) <= 2.5 * least + 2 * contexts  # the fast weights are in it twice


@pytest.mark.parametrize(
  ("name", "remat"),
  [
    pytest.param(name, remat, marks=() if (name, remat) == ("hybrid", "window") else pytest.mark.slow)
    for name in MODELS
    for remat in footprint.REMAT
  ],
)
def test_activations_are_no_more_than_a_gradient_keeps(name, remat):
  """In float32, whose casts add nothing; the states between windows are the larger part for long texts."""
  sleep_cfg = SleepConfig(num_passes=3, remat=remat)
  cfg = run(name, sleep_cfg, train={"batch_size": 1, "eval_batch_size": 1, "eval_sequences": 1})
  for tokens in (9, 40):
    keeps = footprint.gradient(cfg.model, sleep_cfg, tokens)
    state = footprint.state(cfg.model, 1, sleep_cfg) + cfg.model.vocab_size * need.FLOAT32
    test = need._awake(cfg.model, tokens, 1) + tokens * need.TOKEN
    assert need._asleep(cfg.model, sleep_cfg, tokens, 1) <= keeps + state
    assert need.least(cfg, tokens)["activations"] >= test


PRESETS = {"rule110": "demo", "depo": "tiny", "gsm_infinite": "tiny"}
HUGE = (
  ("rule110", "train.batch_size", 2**31 - 1),
  ("rule110", "train.eval_batch_size", 2**28),
  ("rule110", "model.embed_dim", 2**30),
  ("rule110", "model.mlp_dim", 2**31 - 1),
  ("rule110", "model.attention.num_heads", 2**30),
  ("rule110", "model.attention.head_dim", 2**30),
  ("rule110", "model.fast.num_heads", 2**31 - 1),
  ("rule110", "model.fast.key_dim", 2**31 - 1),
  ("rule110", "model.fast.value_dim", 2**31 - 1),
  ("rule110", "model.fast.conv_size", 2**31 - 1),
  ("rule110", "train.steps_per_dispatch", 2**31 - 1),
  ("rule110", "data.num_strings", 2**26),
  ("depo", "train.batch_size", 2**31 - 1),
  ("gsm_infinite", "train.batch_size", 2**31 - 1),
  ("gsm_infinite", "data.cut.bucket_batches", 2**31 - 1),
  ("gsm_infinite", "model.vocab_size", 2**31 - 1),
)
# Larger than any field may be, or than any data of such a field.
BEYOND = (
  ("rule110", "train.batch_size", 2**31, "train.batch_size: must be at most 2147483647"),
  ("depo", "train.batch_size", 2**31, "train.batch_size: must be at most 2147483647"),
  ("gsm_infinite", "train.batch_size", 2**31, "train.batch_size: must be at most 2147483647"),
  ("depo", "data.max_name", 2**31, "data.max_name: must"),
  ("depo", "data.max_name", 2**31 - 1, "data."),
  ("depo", "data.max_nodes", 2**31 - 1, "data."),
  ("depo", "data.num_pairs", 2**26, "data."),
  ("depo", "data.context_length", 2**31 - 1, "data."),
  ("rule110", "sleep.num_passes", 2**31 - 1, "sleep.num_passes: must be at most 256 where sleep.loops"),
)


def built(name, field, value):
  """Builds and checks a preset with one field changed, as its command does before anything is made."""
  c = config_file.read(f"{name}:{PRESETS[name]}")
  with c.ignore_type():
    c.update_from_flattened_dict({field: value})
  if field == "train.eval_batch_size":
    c.train.eval_sequences = value
  if field == "train.steps_per_dispatch":
    c.train.update(steps=value, eval_every=value, save_every=value, batch_size=1)
  values = c.to_dict()
  if name == "gsm_infinite":
    cfg = gsm_infinite.build(values)
    host_steps.check_size(cfg, cfg.data.cut)
  else:
    cfg, task = {"rule110": rule110_experiment, "depo": depo_experiment}[name].build(values)
    task.check(cfg)


def refused(name, field, value):
  tracemalloc.start()
  try:
    with pytest.raises(ConfigError) as caught:
      built(name, field, value)
    assert tracemalloc.get_traced_memory()[1] < 64e6
  finally:
    tracemalloc.stop()
  assert "\n" not in str(caught.value)
  return str(caught.value)


@pytest.mark.parametrize(("name", "field", "value"), HUGE)
def test_a_size_that_cannot_be_is_refused_by_name(name, field, value, monkeypatch):
  monkeypatch.setattr(need, "memory", lambda: 16 * GB)
  monkeypatch.setattr(jax, "jit", lambda *_, **__: pytest.fail("something is compiled"))
  assert refused(name, field, value).startswith(f"{field}: ")


@pytest.mark.parametrize(("name", "field", "value", "message"), BEYOND)
def test_a_size_beyond_its_field_is_refused_by_name(name, field, value, message):
  assert refused(name, field, value).startswith(message)


def test_the_presets_themselves_fit(monkeypatch):
  monkeypatch.setattr(need, "memory", lambda: 64 * GB)
  for name in PRESETS:
    built(name, "seed", 1)


def test_what_fits_to_the_byte_passes_and_a_byte_less_does_not():
  cfg = run("sliding", SleepConfig(num_passes=3, kept="each"))
  whole, session = need.total(cfg, 100), need.session(cfg.model, cfg.sleep, 2)
  need.check(cfg, 100, available=whole)
  need.check_session(cfg.model, cfg.sleep, 2, available=session)
  need.check_weights(cfg.model, {"a": 1}, available=need.weights(cfg.model))
  with pytest.raises(ConfigError, match="is too much for the .* of memory here: such a run needs at least"):
    need.check(cfg, 100, available=whole - 1)
  with pytest.raises(ConfigError, match="^window: .* such a session needs at least"):
    need.check_session(cfg.model, cfg.sleep, 2, available=session - 1)
  with pytest.raises(ConfigError, match="^b: 3 is too much .* such a model needs at least"):
    need.check_weights(cfg.model, {"a": 1, "b": 3}, available=need.weights(cfg.model) - 1)


@pytest.mark.parametrize(
  ("changes", "rows", "field"),
  [
    ({"window": 2**31 - 1}, 1, "window"),
    ({}, 2**31 - 1, "rows"),
    ({"eviction": "sliding"}, 1, "sleep.num_passes"),
  ],
)
def test_a_session_that_cannot_be_is_refused_by_name(changes, rows, field):
  cfg = config.replace(run("hybrid").model, **changes)
  sleep_cfg = SleepConfig(num_passes=2**31 - 1, kept="each")
  with pytest.raises(ConfigError, match=f"^{field}: 2147483647 is too much"):
    need.check_session(cfg, sleep_cfg, rows, available=GB)
  assert jnp.dtype(cfg.dtype) == jnp.float32


def test_caches_of_passes_without_a_gradient_are_counted():
  """N caches of each block are made whatever gradients go through."""
  sleep_cfg = SleepConfig(num_passes=10**9, backprop_passes=1, kept="each")
  cfg = run("sliding", sleep_cfg)
  with pytest.raises(ConfigError, match="^sleep.num_passes: 1000000000 is too much"):
    need.check(cfg, 100, available=64 * GB)
