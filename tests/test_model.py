"""Plans, loss, what a sleep leaves and FLOPs, each by hand, by definition or by the oracle."""

import functools
from unittest import mock

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import strategies as st

from sleep_jax import blocks, config, model, products, windows
from sleep_jax.cost import flops
from sleep_jax.scoring import sleep_changes
from tests import hybrids, oracle


class PlanTest(parameterized.TestCase):
  @hypothesis.settings(deadline=None, max_examples=200)
  @hypothesis.given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 45))
  def test_covers_the_sequence_once_in_order(self, layout, window):
    hypothesis.assume(any(layout))
    segments = windows.plan(layout, window)
    covered, read, found = [], [], []
    for s in segments:
      self.assertGreaterEqual(s.count, 1)
      for w in range(s.count):
        start = s.start + w * s.length
        covered.extend(range(start, start + s.length))
        read.extend(start + i for i in s.reads)
        found.append((s.length, s.reads))
    self.assertEqual(covered, list(range(len(layout))))
    self.assertEqual(read, [i for i, scored in enumerate(layout) if scored])
    np.testing.assert_array_equal(windows.answer_positions(segments), read)
    # All windows are L long but the last, and neighbours are merged exactly if they are alike.
    self.assertEqual([length for length, _ in found[:-1]], [window] * (len(found) - 1))
    self.assertLessEqual(found[-1][0], window)
    self.assertLen(segments, 1 + sum(a != b for a, b in zip(found, found[1:], strict=False)))

  def test_by_hand(self):
    layout = np.zeros(14, bool)
    layout[[9, 13]] = True
    self.assertEqual(
      windows.plan(layout, 4),
      (
        windows.Segment(start=0, length=4, count=2, reads=()),
        windows.Segment(start=8, length=4, count=1, reads=(1,)),
        windows.Segment(start=12, length=2, count=1, reads=(1,)),
      ),
    )

  def test_nothing_to_learn_is_refused(self):
    with self.assertRaisesRegex(config.ConfigError, "^loss_mask: no position has a loss"):
      windows.plan([False] * 5, 2)

  @parameterized.parameters(7, 9)
  def test_a_batch_of_another_length_is_refused(self, length):
    cfg, segments = hybrids.model_config(("gdn",)), windows.plan([False] * 7 + [True], 4)
    batch, _ = hybrids.random_batch(length, (length - 1,))
    with self.assertRaisesRegex(ValueError, f"plan is for 8 tokens, the batch has {length}"):
      model.forward(hybrids.random_params(cfg), batch, segments, cfg, config.SleepConfig())


class LossTest(parameterized.TestCase):
  def test_cross_entropy_by_hand(self):
    logits = jnp.log(
      jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], [[0.2, 0.2, 0.6], [1 / 3, 1 / 3, 1 / 3]]])
    )
    targets, mask = jnp.array([[1, 2], [0, 0]]), jnp.array([[1.0, 1.0], [0.0, 1.0]])
    expected = -(np.log(0.25) + np.log(0.8) + np.log(1 / 3)) / 3
    np.testing.assert_allclose(model.cross_entropy(logits, targets, mask), expected, rtol=1e-6)
    # A shift of all logits of an answer changes nothing, however large.
    np.testing.assert_allclose(model.cross_entropy(logits + 1e4, targets, mask), expected, rtol=1e-3)
    self.assertEqual(float(model.cross_entropy(logits, targets, 0 * mask)), 0.0)

  def test_the_loss_reads_the_answers_alone(self):
    cfg, sleep_cfg = hybrids.model_config(("gdn",)), config.SleepConfig()
    batch, layout = hybrids.random_batch(8, (6, 7))
    segments = windows.plan(layout, cfg.window)
    run = hybrids.jit(lambda p, b: model.loss(p, b, segments, cfg, sleep_cfg))
    params = hybrids.random_params(cfg)
    loss, logits = run(params, batch)
    self.assertEqual((loss.dtype, logits.shape), (jnp.float32, (2, 2, cfg.vocab_size)))
    elsewhere = np.where(layout, batch.targets, (batch.targets + 1) % cfg.vocab_size)
    self.assertEqual(run(params, batch.replace(targets=elsewhere))[0], loss)


class ConsolidateTest(parameterized.TestCase):
  """Only S leaves a sleep."""

  @parameterized.parameters(1, 2)
  def test_the_last_hidden_states_are_dropped(self, num_passes):
    """What comes after the last write of the last pass has no gradient; earlier passes reach it through h."""
    cfg = hybrids.model_config(("gdn",))
    sleep_cfg, tokens = config.SleepConfig(num_passes=num_passes), hybrids.random_tokens(2, 4)

    def total(params):
      state = model.consolidate(params, tokens, model.init_state(cfg, 2), cfg, sleep_cfg)
      return jnp.sum(state.fast["0"].S ** 2)

    grads = hybrids.jit(jax.grad(total))(hybrids.random_params(cfg))
    largest = jax.tree.map(lambda g: float(jnp.abs(g).max()), grads)
    block = largest["blocks"]["0"]
    self.assertGreater(block["mixer"]["k"], 0)
    for after in (block["mlp"]["down"], block["mlp_norm"], block["mixer"]["o"], block["mixer"]["gate"]):
      self.assertEqual(after > 0, num_passes > 1)
    self.assertEqual((largest["head"], largest["final_norm"]), (0, 0))


class SleepChangesTest(parameterized.TestCase):
  def test_changes_of_S_pass_by_pass_are_the_oracles(self):
    """Also where a window that is read lies between two that are slept on: it writes too."""
    cfg, sleep_cfg = hybrids.model_config(("gdn", "attn")), config.SleepConfig(num_passes=2)
    batch, layout = hybrids.random_batch(13, (6, 12), pads=(0, 1))
    params, segments = hybrids.random_params(cfg), windows.plan(layout, cfg.window)
    got = sleep_changes.sleep_changes(params, batch, segments, cfg, sleep_cfg)
    settings = hybrids.oracle_settings(cfg, sleep_cfg, batch)
    trace = oracle.forward(params, batch.inputs, batch.loss_mask, **settings)["trace"]
    expected = []
    for chunk in trace:
      S = [np.linalg.norm(a.reshape(2, -1), axis=1) for a in chunk["S"]["0"]]
      moved = [
        np.linalg.norm((b - a).reshape(2, -1), axis=1)
        for a, b in zip(chunk["S"]["0"], chunk["S"]["0"][1:], strict=False)
      ]
      if chunk["asleep"]:
        expected.append([np.mean(m / s) for m, s in zip(moved, S[1:], strict=True)])
    self.assertEqual(set(got), {"0"})
    np.testing.assert_allclose(got["0"], expected, rtol=1e-4)


class MatmulDtypeTest(parameterized.TestCase):
  """`model.matmul_dtype=bfloat16`: all large products round their operands, and nothing else does."""

  cfg = hybrids.model_config(("attn", "gdn"), matmul_dtype="bfloat16")
  sleep_cfg = config.SleepConfig(num_passes=2)

  def test_loss_and_gradients_are_near_the_exact_ones(self):
    batch, layout = hybrids.random_batch(12, (9, 11))
    segments, weights = windows.plan(layout, 4), hybrids.random_params(self.cfg)
    exact_cfg = config.replace(self.cfg, matmul_dtype="same")
    got, exact = (hybrids.program(segments, c, self.sleep_cfg)(weights, batch) for c in (self.cfg, exact_cfg))
    self.assertNotEqual(float(got[0]), float(exact[0]))
    np.testing.assert_allclose(got[0], exact[0], rtol=0.02)
    hybrids.assert_near(got[1], jax.tree.map(lambda x: np.asarray(x, float), exact[1]), 0.15)

  @parameterized.parameters(  # x, w, contracted dimensions, turned; the last width is odd
    ((3, 5, 8), (8, 4, 6), 1, False),
    ((3, 5, 4, 6), (4, 6, 8), 2, False),
    ((3, 5, 8), (7, 8), 1, True),
    ((3, 5, 7), (7, 8), 1, False),
  )
  def test_a_product_and_its_gradients_are_those_of_the_rounded_operands(self, xs, ws, num_in, turned):
    kx, kw, ky = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(kx, xs), jax.random.normal(kw, ws)
    axes = (None,) * (len(xs) + len(ws) - 2 * num_in)

    @functools.partial(jax.jit, static_argnums=3)
    def product(x, w, dy, rounded):
      y, back = jax.vjp(lambda x, w: products.dense(x, w, axes, num_in, turned=turned, rounded=rounded), x, w)
      return y, *back(dy)

    dy = jax.random.normal(ky, products.dense(x, w, axes, num_in, turned=turned).shape)
    rounded = (a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, w, dy))
    for got, expected in zip(product(x, w, dy, "bfloat16"), product(*rounded, None), strict=True):
      np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)

  @parameterized.parameters(  # the shapes of what is not rounded: steps a and b, and narrow layers
    ("attn", "gdn", {(12, 2, 2)}),
    ("attn", "kda", {(12, 1, 2), (12, 5), (5, 2, 3), (5, 2, 5)}),
    ("attn", "jet", {(12, 2, 2), (12, 1), (1, 2, 5, 4)}),
    ("attn", "hebbian", {(12, 2, 2)}),
  )
  def test_all_products_but_those_of_gates_are_rounded(self, mixer, rule, narrow):
    cfg = hybrids.model_config((mixer, rule), matmul_dtype="bfloat16", window=6)
    batch, layout = hybrids.random_batch(12, (10, 11))
    exact, dense = set(), products.dense

    def recorded(x, w, *args, rounded=None, **settings):
      if rounded is None:
        exact.add(w.shape)
      return dense(x, w, *args, rounded=rounded, **settings)

    with mock.patch.object(products, "dense", recorded):
      weights = model.init(cfg, jax.random.key(0))
      jax.eval_shape(
        lambda w: model.forward(w, batch, windows.plan(layout, 6), cfg, self.sleep_cfg)[0], weights
      )
    self.assertEqual(exact, narrow)


class FlopsTest(parameterized.TestCase):
  cfg = config.ModelConfig(
    vocab_size=100,
    embed_dim=256,
    mlp_dim=512,
    blocks=("attn", "gdn"),
    window=32,
    attention=config.AttentionConfig(num_heads=4, num_kv_heads=2),
    fast=config.FastConfig(num_heads=2, key_dim=64, value_dim=128),
  )
  segments = windows.plan(np.arange(96) >= 95, 32)  # two windows asleep, one with one answer

  def test_by_hand(self):
    mlp = 3 * 256 * 512
    attn = 2 * (256 * 256 + 2 * 256 * 128 + 256 * 256 + mlp) + 2 * 2 * 4 * 64 * 32 / 2  # half of the pairs
    projections = 256 * 2 * (64 + 64 + 128 + 128) + 2 * 128 * 256
    chunk = 2 * 2 * (32 * 64 * 2 + 32 * 128 * 2 + 64 * 128 * 3)
    gdn = 2 * (projections + mlp) + chunk
    count = flops.per_sequence(self.segments, self.cfg, config.SleepConfig(num_passes=5))
    self.assertEqual(count.asleep, 2 * 5 * 32 * (attn + gdn))
    self.assertEqual(count.awake, 32 * (attn + gdn) + 2 * 256 * 100)
    self.assertEqual(count.train, 3 * (count.awake + count.asleep))
    self.assertAlmostEqual(count.asleep_share, count.asleep / (count.asleep + count.awake))

  @parameterized.parameters((0, None), (1, 2), (0, 1))
  def test_sleep_grows_by_the_looped_blocks_and_waking_not_at_all(self, first, last):
    def count(n):
      sleep_cfg = config.SleepConfig(num_passes=n, first_block=first, last_block=last)
      return flops.per_sequence(self.segments, self.cfg, sleep_cfg)

    one, two, nine = count(1), count(2), count(9)
    self.assertEqual(one.awake, nine.awake)
    self.assertEqual(nine.asleep - one.asleep, 8 * (two.asleep - one.asleep))
    looped = len(self.cfg.blocks[first:last])
    self.assertGreater((two.asleep - one.asleep) / one.asleep, 0.4 * looped)

  def test_the_compiler_counts_about_as_many(self):
    """XLA's count, before it optimises, also has the norms, the gates and both halves of attention."""
    sleep_cfg = config.SleepConfig(num_passes=3, loops="unroll")
    batch = jax.tree.map(lambda x: x[:1], hybrids.random_batch(96, (95,))[0])
    params = jax.eval_shape(lambda: model.init(self.cfg, jax.random.key(0)))
    run = jax.jit(lambda p, b: model.forward(p, b, self.segments, self.cfg, sleep_cfg))
    counted = run.lower(params, batch).cost_analysis()["flops"]
    work = flops.per_sequence(self.segments, self.cfg, sleep_cfg)
    self.assertAlmostEqual(counted / (work.awake + work.asleep), 1.0, delta=0.1)


class DeclareTest(parameterized.TestCase):
  def test_an_unknown_block_is_named(self):
    with self.assertRaisesRegex(config.ConfigError, r'^model.blocks\[1\]: .*did you mean "gdn"'):
      blocks.declare(hybrids.model_config(("attn", "gdm")))

  def test_declares_what_the_oracle_expects(self):
    """Names and shapes, with and without the optional ones."""
    for changes in ({}, {"fast": {"conv_size": 0}, "attention": {"qk_norm": False}}):
      cfg = hybrids.model_config(**changes)
      drawn = jax.eval_shape(lambda cfg=cfg: model.init(cfg, jax.random.key(0)))
      shapes = [jax.tree.map(lambda x: x.shape, tree) for tree in (drawn, hybrids.random_params(cfg))]
      self.assertEqual(*shapes)


class ScaleTest(parameterized.TestCase):
  """What `embed_norm` and `residual_scale` do can be folded into other weights of a model without them."""

  def logits(self, cfg, params):
    batch, layout = hybrids.random_batch(14, (6, 7, 13), pads=(0, 1, 5))
    segments = windows.plan(layout, cfg.window)
    return hybrids.reader(segments, cfg, config.SleepConfig(num_passes=2))(params, batch)[0]

  def test_a_norm_on_the_embedding_is_an_embedding_of_normal_rows(self):
    cfg = hybrids.model_config()
    params = hybrids.random_params(cfg)
    scale = np.linspace(0.5, 2.0, cfg.embed_dim, dtype=np.float32)
    rows = np.asarray(params["embed"])
    normal = scale * rows / np.sqrt(np.mean(rows**2, axis=1, keepdims=True) + cfg.norm_eps)
    want = self.logits(cfg, params | {"embed": jnp.asarray(normal)})
    got = self.logits(config.replace(cfg, embed_norm=True), params | {"embed_norm": jnp.asarray(scale)})
    hybrids.assert_near(np.asarray(got), np.asarray(want), 1e-5)
    self.assertIn("embed_norm", model.declare(config.replace(cfg, embed_norm=True)))
    self.assertNotIn("embed_norm", model.declare(cfg))

  def test_a_residual_scale_is_a_factor_of_every_output_projection(self):
    cfg = hybrids.model_config()
    params = hybrids.random_params(cfg)

    def smaller(path, x):
      name = [key.key for key in path]
      return 0.25 * x if name[-2:] in (["mixer", "o"], ["mlp", "down"]) else x

    want = self.logits(cfg, jax.tree_util.tree_map_with_path(smaller, params))
    got = self.logits(config.replace(cfg, residual_scale=0.25), params)
    hybrids.assert_near(np.asarray(got), np.asarray(want), 1e-5)
    self.assertGreater(np.abs(np.asarray(got) - np.asarray(self.logits(cfg, params))).max(), 1e-2)
