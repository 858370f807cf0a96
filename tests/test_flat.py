"""One loop over all passes over all windows: the numbers of the other forms, and what is kept where."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from sleep_jax import config, model, params, sharding, windows
from sleep_jax.config import ConfigError, SleepConfig
from sleep_jax.cost import footprint
from sleep_jax.kernels.measure import static_tpu
from sleep_jax.launch import aot
from tests import hybrids

NEAR = 1e-4  # of the largest entry, as in `test_promises`
PAIR = ("gdn", "attn")
DEEP = ("attn", "gdn", "attn", "hebbian")


class NumbersTest(parameterized.TestCase):
  def test_loss_logits_and_gradients_are_those_without(self):
    """All is read and slept on, one block each before the loop, in it and behind it, a cache a pass."""
    how = {"when": "always", "kept": "each", "first_block": 1, "last_block": 2, "num_passes": 2}
    self.check(("gdn", "attn", "hebbian"), {"eviction": "sliding"}, how, remat="offload")

  @parameterized.named_parameters(
    ("hard", PAIR, {}, {}),
    ("one pass", PAIR, {}, {"num_passes": 1, "remat": "block"}),
    ("sliding", PAIR, {"eviction": "sliding"}, {}),
    (
      "sliding, a cache a pass",
      DEEP,
      {"eviction": "sliding"},
      {"kept": "each", "first_block": 1, "last_block": 3},
    ),
    (
      "reset, a norm between passes",
      DEEP,
      {"loop_norm": True},
      {"state": "reset", "last_block": 2, "remat": "pass"},
    ),
    ("all is read and slept on", PAIR, {}, {"when": "always"}),
    (
      "all is read, sliding",
      DEEP,
      {"eviction": "sliding"},
      {"when": "always", "first_block": 1, "last_block": 3},
    ),
  )
  @pytest.mark.slow
  def test_they_are_so_in_other_forms(self, pattern, changes, how):
    self.check(pattern, changes, how, loops="flat")

  def check(self, pattern, changes, how, **flat):
    cfg = hybrids.model_config(pattern, **changes)
    plain = SleepConfig(**({"num_passes": 3} | how))
    scored = range(14) if plain.when == "always" else (9, 13)
    batch, layout = hybrids.random_batch(14, scored, pads=(0, 5))
    if plain.when == "always":  # another text begins: in the first row's last window, in the second's third
      begins = np.zeros((2, 14), bool)
      begins[0, 12] = begins[1, 8] = True
      batch = dataclasses.replace(batch, begins=begins)
    segments, weights = windows.plan(layout, cfg.window, plain), hybrids.random_params(cfg)
    flat = dataclasses.replace(plain, **flat)
    got, want = (hybrids.program(segments, cfg, how)(weights, batch) for how in (flat, plain))
    hybrids.assert_near(got, jax.tree.map(lambda x: np.asarray(x, float), want), NEAR)

  @parameterized.parameters("hard", "sliding")
  def test_a_shorter_last_window_is_in_the_same_loop(self, eviction):
    """The program is no longer than that of whole windows, but for what puts the pads there."""
    cfg = hybrids.model_config(PAIR, eviction=eviction)
    sleep_cfg, weights = SleepConfig(num_passes=2, loops="flat"), hybrids.random_params(cfg)

    def loops(length):
      batch, layout = hybrids.random_batch(length, (length - 1,))
      segments = windows.plan(layout, cfg.window)
      traced = jax.make_jaxpr(lambda w: model.loss(w, batch, segments, cfg, sleep_cfg)[0])(weights)
      return [eqn.params["length"] for eqn in traced.eqns if eqn.primitive.name == "scan"]

    self.assertEqual(loops(14), [3 * 2 + 1])
    self.assertEqual(loops(14), loops(16))

  @pytest.mark.slow
  def test_on_a_mesh_of_eight(self):
    cfg = hybrids.model_config(PAIR, embed_dim=16)
    weights = model.init(cfg, jax.random.key(0))
    batch, layout = hybrids.random_batch(14, (9, 13), pads=(0,) * 8)
    segments = windows.plan(layout, cfg.window)
    run = hybrids.program(segments, cfg, SleepConfig(num_passes=2, remat="offload"))
    want = run(weights, batch)
    with jax.set_mesh(sharding.make_mesh(config.MeshConfig(data=4, model=2))):
      place = lambda axes, x: sharding.constrain(jnp.asarray(x), axes)  # noqa: E731
      declared = model.declare(cfg)
      placed = jax.tree.map(lambda w, x: place(w.axes, x), declared, weights, is_leaf=params.is_weight)
      rows = jax.tree.map(lambda x: place(("batch", "seq"), x), batch)
      got = hybrids.jit(run.__wrapped__)(placed, rows)
    hybrids.assert_near(got, jax.tree.map(lambda x: np.asarray(x, float), want), NEAR)

  @parameterized.parameters(
    ({"loops": "unroll", "remat": "offload"}, "sleep.loops: must be scan or flat, as all passes are under"),
    ({"num_passes": 2, "backprop_passes": 1, "loops": "flat"}, "sleep.backprop_passes: must be None, as all"),
    ({"loops": "flat", "remat": "window"}, "sleep.remat: must be none, block, pass or offload where"),
  )
  def test_what_it_cannot_do_is_refused(self, changes, message):
    with self.assertRaisesRegex(ConfigError, message):
      SleepConfig(**changes)

  def test_a_model_that_reads_awake_in_several_passes_is_refused(self):
    cfg = hybrids.model_config(("attn", "attn"), predict_passes=2)
    batch, layout = hybrids.random_batch(14, (9, 13))
    segments, weights = windows.plan(layout, cfg.window), hybrids.random_params(cfg)
    with self.assertRaisesRegex(ConfigError, "sleep.loops: .* model.predict_passes is 2"):
      model.forward(weights, batch, segments, cfg, SleepConfig(loops="flat"))


@pytest.mark.parametrize(("num_windows", "num_passes"), [(2, 1), (3, 4)])
def test_of_every_pass_that_alone_is_kept_which_it_began_with(num_windows, num_passes):
  """h, S as the window and as the pass found it, and the inputs of the window's convolutions.

  The last window, of two tokens, is read awake in one pass of the same loop.
  """
  cfg, sleep_cfg = hybrids.model_config(PAIR), SleepConfig(num_passes=num_passes, remat="offload")
  batch, layout = hybrids.random_batch(4 * num_windows + 2, (4 * num_windows + 1,))
  segments, weights = windows.plan(layout, cfg.window), hybrids.random_params(cfg)

  def gradient(w):
    return jax.vjp(lambda w: model.loss(w, batch, segments, cfg, sleep_cfg)[0], w)[1]

  kept = jax.make_jaxpr(gradient)(weights).out_avals
  on_host = [x.shape for x in kept if x.memory_space == jax.memory.Space.Host]
  steps, fast = num_windows * num_passes + 1, jax.eval_shape(lambda: model.init_state(cfg, 2)).fast["0"]
  begun = ((2, 4, hybrids.WIDTH), fast.S.shape, fast.S.shape, fast.context.shape)
  assert sorted(on_host) == sorted((steps, *shape) for shape in begun)


@pytest.mark.aot
def test_a_tpu_keeps_in_the_hosts_memory_what_is_counted_from_shapes(monkeypatch):
  """Of 32 windows the device has less than a third of it."""
  pytest.importorskip("libtpu")
  for name, value in aot.QUIET.items():
    monkeypatch.setenv(name, value)
  chip = topologies.get_topology_desc(platform="tpu", topology_name=static_tpu.TOPOLOGIES["v5e"]).devices[0]
  fast = config.FastConfig(num_heads=4, key_dim=128, value_dim=128)
  cfg = config.ModelConfig(vocab_size=128, embed_dim=512, blocks=("gdn",), window=256, fast=fast)
  sleep_cfg = SleepConfig(num_passes=2, remat="offload")

  def on_chip(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(chip))

  def compiled(tokens):
    segments = windows.plan([i == tokens - 1 for i in range(tokens)], cfg.window)
    ids = on_chip((4, tokens), jnp.int32)
    batch = windows.Batch(ids, ids, on_chip((4, tokens)))
    weights = jax.tree.map(lambda x: on_chip(x.shape), footprint.weights(cfg))
    run = jax.jit(jax.grad(lambda w, b: model.loss(w, b, segments, cfg, sleep_cfg)[0]))
    return run.lower(weights, batch).compile().memory_analysis()

  memory, counted = compiled(33 * cfg.window), footprint.on_host(cfg, sleep_cfg, 33 * cfg.window, batch=4)
  assert counted <= memory.host_temp_size_in_bytes < 1.05 * counted
  assert memory.temp_size_in_bytes < 0.3 * counted
