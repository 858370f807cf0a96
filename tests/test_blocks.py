"""Blocks that run under one loop compute what they compute written out; a block can be run alone."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from absl.testing import parameterized

from sleep_jax import blocks, config, model, sharding, windows
from sleep_jax.config import MeshConfig, SleepConfig
from tests import hybrids

# The compiler may fuse a loop's body otherwise: some units in the last place, through N passes.
NEAR = 2e-4
DEEP = ("jet", "gdn", "attn", "gdn", "attn", "gdn", "attn", "hebbian", "hebbian", "kda")


@hypothesis.given(st.lists(st.sampled_from("ab"), min_size=1, max_size=9).map(tuple))
def test_repeats_cover_the_sequence_and_write_out_as_little_as_any_cut(kinds):
  stretches, at, written = blocks.repeats(kinds), 0, 0
  for start, period, count in stretches:
    assert start == at and (count >= blocks.LEAST or period == count == 1)
    assert kinds[start : start + period * count] == kinds[start : start + period] * count
    at, written = start + period * count, written + period
  assert at == len(kinds)
  assert written == fewest(kinds)


@functools.cache
def fewest(kinds):
  """The least number of entries that must be written out, by trying everything."""
  if not kinds:
    return 0
  options = []
  for period in range(1, len(kinds) + 1):
    for count in range(1, len(kinds) // period + 1):
      if period * count > 1 and count < blocks.LEAST:
        continue
      if kinds[: period * count] == kinds[:period] * count:
        options.append(period + fewest(kinds[period * count :]))
  return min(options)


def test_a_repeating_pattern_is_one_group():
  cfg = hybrids.model_config(("attn", "gdn") * 4)
  weights = model.declare(cfg)["blocks"]
  shapes = jax.tree.map(
    lambda w: jax.ShapeDtypeStruct(w.shape, np.float32), weights, is_leaf=lambda x: hasattr(x, "init")
  )
  (group,) = jax.eval_shape(lambda w: blocks.arrange(w, cfg, scan=True), shapes)
  assert (group.start, group.count, len(group.weights)) == (0, 4, 2)
  assert group.weights[0]["mixer"]["q"].shape == (4, *weights["0"]["mixer"]["q"].shape)
  assert group.names(1) == ["1", "3", "5", "7"]


class ScanTest(parameterized.TestCase):
  """Loss, gradients and state, with equal blocks under a scan and written out."""

  @parameterized.named_parameters(
    ("hard", {}, {}),
    ("prelude and coda, recomputed", {}, {"first_block": 1, "last_block": 7, "remat": "window"}),
    ("sliding, a cache each pass", {"eviction": "sliding"}, {"kept": "each", "remat": "block"}),
    ("a memory without MLP", {"without_mlp": (1, 3, 5)}, {"state": "reset"}),
  )
  @pytest.mark.slow
  def test_equals_written_out(self, changes, how):
    batch, layout = hybrids.random_batch(14, (6, 7, 13), pads=(0, 5))
    found = self.check(DEEP, changes, SleepConfig(num_passes=3, **how), batch, layout)
    cfg, weights, segments, both = found
    states = [hybrids.reader(segments, cfg, how)(weights, batch)[1] for how in both]
    hybrids.assert_near(*states, NEAR)

  def test_equals_written_out_quickly(self):
    how = SleepConfig(num_passes=2)
    self.check(("hebbian",) * blocks.LEAST, {}, how, *hybrids.random_batch(8, (6, 7), pads=(0, 5)))

  def check(self, pattern, changes, sleep_cfg, batch, layout):
    cfg = hybrids.model_config(pattern, **changes)
    weights, segments = model.init(cfg, jax.random.key(0)), windows.plan(layout, cfg.window)
    both = [dataclasses.replace(sleep_cfg, loops=loops) for loops in ("scan", "unroll")]
    hybrids.assert_near(*(hybrids.program(segments, cfg, how)(weights, batch) for how in both), NEAR)
    return cfg, weights, segments, both

  @pytest.mark.slow
  def test_eight_devices_equal_one(self):
    cfg = hybrids.model_config(("attn", "gdn") * blocks.LEAST, vocab_size=12, embed_dim=16)
    sleep_cfg = SleepConfig(num_passes=2, remat="window")
    batch, layout = hybrids.random_batch(8, (6, 7), pads=(0,) * 8)
    segments, weights = windows.plan(layout, cfg.window), model.init(cfg, jax.random.key(0))
    want = hybrids.program(segments, cfg, sleep_cfg)(weights, batch)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=4, model=2))):
      placed = model.init(cfg, jax.random.key(0))
      rows = jax.tree.map(lambda x: sharding.constrain(jax.numpy.asarray(x), ("batch", "seq")), batch)
      got = hybrids.jit(
        lambda w, b: jax.value_and_grad(model.loss, has_aux=True)(w, b, segments, cfg, sleep_cfg)
      )(placed, rows)
      (loss, logits), grads = jax.device_get(got)
    hybrids.assert_near((loss, grads, logits), jax.device_get(want), NEAR)

  def test_the_program_does_not_grow_with_the_depth(self):
    """Twice as many equal blocks: nearly the same program under a scan, twice the program written out."""

    def lines(depth, loops):
      cfg = hybrids.model_config(("hebbian",) * depth)
      weights = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
      batch, layout = hybrids.random_batch(8, (6, 7))
      segments = windows.plan(layout, cfg.window)
      sleep_cfg = SleepConfig(num_passes=2, loops=loops)
      step = jax.jit(lambda w, b: jax.grad(model.loss, has_aux=True)(w, b, segments, cfg, sleep_cfg)[0])
      return len(step.lower(weights, batch).as_text().splitlines())

    self.assertLess(lines(6, "scan") / lines(3, "scan"), 1.25)
    self.assertGreater(lines(6, "unroll") / lines(3, "unroll"), 1.7)

  def test_two_of_a_kind_are_written_out(self):
    cfg = hybrids.model_config(("gdn", "attn") * 2)
    weights = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))["blocks"]
    groups = jax.eval_shape(lambda w: blocks.arrange(w, cfg, scan=True), weights)
    self.assertEqual([(g.start, g.count) for g in groups], [(0, 1), (1, 1), (2, 1), (3, 1)])


class RefusalTest(parameterized.TestCase):
  """Low-level functions refuse what would give numbers that mean nothing."""

  cfg = hybrids.model_config(("gdn",))

  def run_with(self, tokens, valid=None):
    state, weights = model.init_state(self.cfg, 2), hybrids.random_params(self.cfg)
    yield lambda: model.consolidate(weights, tokens, state, self.cfg, SleepConfig(), valid=valid)
    yield lambda: model.predict(weights, tokens, state, self.cfg, valid=valid)
    yield lambda: model.decode(weights, tokens, *model.open_window(state, self.cfg, 2), self.cfg, valid=valid)

  @parameterized.parameters(((2, 5),), ((2, 0),), ((8,),), ((2, 2, 2),))
  def test_tokens_that_are_no_window(self, shape):
    for call in self.run_with(np.zeros(shape, np.int32)):
      with self.assertRaisesRegex(
        ValueError, r"^tokens: a window is \[B, T\] with T in 1..4 .model.window., got"
      ):
        jax.eval_shape(call)

  def test_pads_of_another_shape(self):
    for call in self.run_with(np.zeros((2, 4), np.int32), np.ones((2, 3), bool)):
      with self.assertRaises(AssertionError):
        jax.eval_shape(call)

  def test_a_plan_with_windows_that_are_too_long(self):
    batch, layout = hybrids.random_batch(8, (6, 7))
    weights = hybrids.random_params(self.cfg)
    with self.assertRaisesRegex(ValueError, "the plan has windows of 8 tokens, model.window is 4"):
      jax.eval_shape(lambda: model.forward(weights, batch, windows.plan(layout, 8), self.cfg, SleepConfig()))

  def test_an_unknown_block_is_refused_when_the_config_is_built(self):
    with self.assertRaisesRegex(config.ConfigError, r"^model.blocks\[1\]: unknown block 'gnd'; did you mean"):
      hybrids.model_config(("attn", "gnd"))
