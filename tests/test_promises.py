"""What the method promises, one test a promise, on the whole model.

Rounding aside the two sides of each comparison are the same numbers: tolerances are float32's, some units
in the last place times the depth of the computation (see `test_model_oracle` for what was measured).
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from sleep_jax import config, model, params, sharding, windows
from sleep_jax.config import MeshConfig, SleepConfig
from sleep_jax.cost import measured
from tests import hybrids, oracle
from tests.hybrids import assert_near, assert_same

NEAR = 1e-4  # of the largest entry
PAIR = ("gdn", "attn")


class PlainHybridTest(parameterized.TestCase):
  @parameterized.parameters(("attn", "gdn"), ("hebbian",))
  def test_one_pass_is_the_hybrid_without_windows(self, *pattern):
    """N = 1: attention with a window mask, convolution and recurrence over the whole sequence, no pads."""
    cfg, sleep_cfg = hybrids.model_config(pattern), SleepConfig(num_passes=1)
    batch, layout = hybrids.random_batch(14, (6, 7, 13), pads=(0, 1, 5))
    segments, weights = windows.plan(layout, cfg.window), hybrids.random_params(cfg)
    logits, state = hybrids.reader(segments, cfg, sleep_cfg)(weights, batch)
    plain = oracle.unwindowed_hybrid(
      weights, batch.inputs, pattern=pattern, window=cfg.window, valid=batch.valid
    )
    at = windows.answer_positions(segments)
    assert_near(np.asarray(logits), plain["logits"][:, at], NEAR)
    assert_near({i: s.S for i, s in state.fast.items()}, plain["S"], NEAR)


class EvictionTest(parameterized.TestCase):
  """What is evicted can be seen through the state alone."""

  def windows(self, conv_context):
    """Config, weights, sleep and wake as compiled functions, and the states after two different windows."""
    cfg = hybrids.model_config(fast={"conv_context": conv_context})
    weights, start = hybrids.random_params(cfg), model.init_state(cfg, 2)
    sleep_cfg = SleepConfig(num_passes=2)
    asleep = hybrids.jit(lambda tokens, state: model.consolidate(weights, tokens, state, cfg, sleep_cfg))
    awake = hybrids.jit(lambda tokens, state: model.predict(weights, tokens, state, cfg)[0])
    return cfg, awake, [asleep(hybrids.random_tokens(2, 4, seed), start) for seed in (0, 1)]

  @parameterized.parameters("carry", "reset")
  def test_another_past_with_this_state_gives_the_same_answers(self, conv_context):
    cfg, awake, (one, other) = self.windows(conv_context)
    tokens = hybrids.random_tokens(2, 4, 7)
    answers = np.asarray(awake(tokens, one))
    self.assertGreater(hybrids.distance(awake(tokens, other), answers), 0.01)  # the past is seen ...
    same_S = other.replace(fast={i: s.replace(S=one.fast[i].S) for i, s in other.fast.items()})
    if conv_context == "reset":  # ... through S alone
      np.testing.assert_array_equal(awake(tokens, same_S), answers)
    else:  # ... through S and the last inputs of the convolutions, which are a part of the state
      self.assertGreater(hybrids.distance(awake(tokens, same_S), answers), 1e-4)

  def test_the_state_is_all_that_a_sequence_keeps(self):
    """Reading on from a state equals reading the whole: the windows before it have left nothing else."""
    cfg, sleep_cfg = hybrids.model_config(PAIR), SleepConfig(num_passes=2)
    batch, layout = hybrids.random_batch(12, (10, 11))
    weights, segments = hybrids.random_params(cfg), windows.plan(layout, cfg.window)
    whole, _ = hybrids.reader(segments, cfg, sleep_cfg)(weights, batch)
    asleep = hybrids.jit(lambda x, state: model.consolidate(weights, x, state, cfg, sleep_cfg))
    state = model.init_state(cfg, 2)
    for start in (0, 4):
      state = asleep(batch.inputs[:, start : start + 4], state)
    stored = jax.tree.map(np.array, state)  # through the host and back
    awake = hybrids.jit(lambda x, state: model.predict(weights, x, state, cfg, reads=(2, 3))[0])
    logits = awake(batch.inputs[:, 8:], stored)
    assert_near(logits, whole, NEAR)


class WritingTest(parameterized.TestCase):
  """What a window writes can depend on what S holds only if a layer before it, or a pass, has read S."""

  @parameterized.parameters(
    (1, ("attn", "gdn"), True), (2, ("attn", "gdn"), False), (1, ("attn", "gdn") * 2, False)
  )
  def test_one_pass_of_one_fast_weight_block_writes_the_same_whatever_S_holds(self, passes, pattern, same):
    """S then moves from entry to exit along an affine map: old contents decay, or give way by key."""
    cfg, sleep_cfg = hybrids.model_config(pattern), SleepConfig(num_passes=passes)
    weights, tokens = hybrids.random_params(cfg), hybrids.random_tokens(2, 4, 0)
    asleep = hybrids.jit(lambda state: model.consolidate(weights, tokens, state, cfg, sleep_cfg))
    rng = np.random.default_rng(1)

    def ends(contents):
      state = model.init_state(cfg, 2, sleep_cfg)
      fast = {i: s.replace(S=jnp.asarray(contents[i], jnp.float32)) for i, s in state.fast.items()}
      return {i: np.asarray(s.S, np.float64) for i, s in asleep(state.replace(fast=fast)).fast.items()}

    shapes = {i: s.S.shape for i, s in model.init_state(cfg, 2).fast.items()}
    one, other = ({i: rng.normal(size=shape) for i, shape in shapes.items()} for _ in range(2))
    both, none = {i: one[i] + other[i] for i in one}, {i: np.zeros_like(x) for i, x in one.items()}
    last = str(len(pattern) - 1)
    left, right = (ends(x)[last] + ends(y)[last] for x, y in ((both, none), (one, other)))
    bent = np.abs(left - right).max() / np.abs(right).max()
    if same:
      self.assertLess(bent, 1e-5)
    else:
      self.assertGreater(bent, 1e-2)


class PadTest(parameterized.TestCase):
  def test_padded_rows_equal_the_same_rows_without_pads(self):
    cfg, sleep_cfg = hybrids.model_config(PAIR), SleepConfig(num_passes=2)
    pads = (0, 4, 6)  # none, a window, a window and a half
    batch, layout = hybrids.random_batch(12, (10, 11), pads=pads)
    weights, segments = hybrids.random_params(cfg), windows.plan(layout, cfg.window)
    logits, state = hybrids.reader(segments, cfg, sleep_cfg)(weights, batch)
    asleep = hybrids.jit(lambda x, state: model.consolidate(weights, x, state, cfg, sleep_cfg))
    awake = hybrids.jit(lambda x, state: model.predict(weights, x, state, cfg))
    for row, before in enumerate(pads):
      alone, start = model.init_state(cfg, 1), before
      while start < 8:  # the row's own windows, the first one without its pads
        stop = start // 4 * 4 + 4
        alone = asleep(batch.inputs[row : row + 1, start:stop], alone)
        start = stop
      answers, alone = awake(batch.inputs[row : row + 1, 8:], alone)
      assert_near(logits[row], answers[0, 2:], NEAR)
      assert_near(jax.tree.map(lambda x, row=row: x[row], state), jax.tree.map(lambda x: x[0], alone), NEAR)

  @parameterized.parameters(1, 2)
  def test_a_window_of_pads_leaves_every_bit_of_S(self, num_passes):
    cfg, sleep_cfg = hybrids.model_config(), SleepConfig(num_passes=num_passes)
    weights, rng = hybrids.random_params(cfg), np.random.default_rng(0)
    start = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), model.init_state(cfg, 2))
    run = hybrids.jit(
      lambda x, valid, state: model.consolidate(weights, x, state, cfg, sleep_cfg, valid=valid)
    )
    half = np.array([[False] * 4, [False, False, True, True]])
    tokens = hybrids.random_tokens(2, 4)
    after = run(tokens, half, start)
    for i, before in start.fast.items():
      np.testing.assert_array_equal(after.fast[i].S[0], before.S[0])
      self.assertGreater(hybrids.distance(after.fast[i].S[1], before.S[1]), 0.01)
    # Nor does it matter which tokens the pads are.
    assert_same(run(np.where(half, tokens, (tokens + 1) % cfg.vocab_size), half, start), after)


class AwakeTest(parameterized.TestCase):
  @parameterized.parameters(((1, 1, 1, 1), "carry"), ((2, 1, 1), "reset"))
  def test_token_by_token_equals_one_parallel_pass(self, cuts, conv_context):
    cfg = hybrids.model_config(fast={"conv_context": conv_context})
    weights, sleep_cfg = hybrids.random_params(cfg), SleepConfig(num_passes=2)
    slept = hybrids.jit(lambda x, s: model.consolidate(weights, x, s, cfg, sleep_cfg))(
      hybrids.random_tokens(2, 4, 5), model.init_state(cfg, 2)
    )
    tokens = hybrids.random_tokens(2, 4, 6)
    whole, after = hybrids.jit(lambda x, s: model.predict(weights, x, s, cfg))(tokens, slept)
    decode = hybrids.jit(lambda x, s, cache: model.decode(weights, x, s, cache, cfg))
    (fast, cache), logits, at = model.open_window(slept, cfg, 2), [], 0
    for length in cuts:
      out, fast, cache = decode(tokens[:, at : at + length], fast, cache)
      logits.append(out)
      at += length
    assert_near(np.concatenate(logits, axis=1), whole, NEAR)
    assert_near(hybrids.as_dicts(fast), hybrids.as_dicts(after.fast), NEAR)

  def test_neither_cost_nor_state_depends_on_passes_or_on_how_much_was_read(self):
    """One compiled program answers after any past: its inputs have one type, whatever lies behind them."""
    cfg = hybrids.model_config(PAIR)
    weights = hybrids.random_params(cfg)
    decode = hybrids.jit(lambda x, s, cache: model.decode(weights, x, s, cache, cfg))
    token, sizes = hybrids.random_tokens(2, 1), set()
    for num_passes, length in ((1, 4), (3, 12)):
      batch, _ = hybrids.random_batch(length, (length - 1,))
      segments = windows.plan([False] * (length - 4) + [True] * 4, cfg.window)
      read = hybrids.reader(segments, cfg, SleepConfig(num_passes=num_passes))
      _, state = read(weights, batch)
      decode(token, *model.open_window(state, cfg, 2))
      sizes.add(sum(x.nbytes for x in jax.tree.leaves(state)))
    self.assertEqual(decode._cache_size(), 1)
    self.assertEqual(sizes, {2 * measured.state_bytes(cfg)})
    compiled = decode.lower(token, *model.open_window(state, cfg, 2)).compile()
    self.assertLess(compiled.memory_analysis().temp_size_in_bytes, 64 * 1024)


class RematTest(parameterized.TestCase):
  """Remat changes memory, not gradients: N = 8 passes over a window that outweighs the weights."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.cfg = hybrids.model_config(("gdn",), window=32)
    cls.batch, layout = hybrids.random_batch(64, (63,), pads=(0,) * 4)
    cls.segments = windows.plan(layout, cls.cfg.window)
    cls.params = hybrids.random_params(cls.cfg)
    cls.plain = cls.compiled("none")

  @classmethod
  def compiled(cls, remat):
    run = hybrids.program(cls.segments, cls.cfg, SleepConfig(num_passes=8, remat=remat))
    return run.lower(cls.params, cls.batch).compile()

  def check(self, remat, share):
    run = self.compiled(remat)
    used, before = (x.memory_analysis().temp_size_in_bytes for x in (run, self.plain))
    self.assertLess(used, share * before, f"{remat}: {used} of {before} bytes")
    assert_near(run(self.params, self.batch), self.plain(self.params, self.batch), 1e-3)

  def test_of_passes(self):
    self.check("pass", 0.5)

  @parameterized.parameters(("block", 0.8), ("window", 0.5))
  @pytest.mark.slow
  def test_of_blocks_and_windows(self, remat, share):
    self.check(remat, share)


class DtypeTest(parameterized.TestCase):
  def test_bfloat16_trains_with_a_float32_state(self):
    cfg = hybrids.model_config(("gdn",), dtype="bfloat16")
    sleep_cfg = SleepConfig(num_passes=2)
    batch, layout = hybrids.random_batch(8, (6, 7), pads=(0, 1, 5))
    weights, segments = hybrids.random_params(cfg), windows.plan(layout, cfg.window)
    loss, grads, logits = hybrids.program(segments, cfg, sleep_cfg)(weights, batch)
    self.assertEqual((loss.dtype, logits.dtype), (jnp.float32, jnp.float32))
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, weights)
    chex.assert_tree_all_finite((loss, grads))
    settings = hybrids.oracle_settings(cfg, sleep_cfg, batch)
    exact = oracle.loss(weights, batch.inputs, batch.targets, batch.loss_mask, **settings)
    self.assertAlmostEqual(float(loss), exact, delta=0.03 * exact)  # 2^-8 an operation
    _, state = jax.eval_shape(lambda w, b: model.forward(w, b, segments, cfg, sleep_cfg), weights, batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, model.init_state(cfg, 3))
    self.assertEqual((state.fast["0"].S.dtype, state.fast["0"].context.dtype), (jnp.float32, jnp.bfloat16))

    # The same program where every token forgets everything before it, or nothing at all.
    for A_log in (60.0, -60.0):
      mixer = weights["blocks"]["0"]["mixer"]
      extreme = oracle.replace_leaf(
        weights, ("blocks", "0", "mixer", "A_log"), np.full_like(mixer["A_log"], A_log)
      )
      chex.assert_tree_all_finite(hybrids.program(segments, cfg, sleep_cfg)(extreme, batch))


class MeshTest(parameterized.TestCase):
  """One device and eight give the same losses, gradients and states."""

  cfg = hybrids.model_config(PAIR, vocab_size=12, embed_dim=16)
  sleep_cfg = SleepConfig(num_passes=2, remat="pass")

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.batch, layout = hybrids.random_batch(8, (6, 7), pads=(0, 1, 5, 0, 0, 2, 3, 4))
    cls.segments, cls.params = windows.plan(layout, cls.cfg.window), hybrids.random_params(cls.cfg)
    cls.expected = hybrids.jit(cls.run_model)(cls.params, cls.batch)

  @classmethod
  def run_model(cls, weights, batch):
    """Loss, its gradients and the state at the end."""

    def loss(weights):
      logits, state = model.forward(weights, batch, cls.segments, cls.cfg, cls.sleep_cfg)
      at = windows.answer_positions(cls.segments)
      return model.cross_entropy(logits, batch.targets[:, at], batch.loss_mask[:, at]), state

    (value, state), grads = jax.value_and_grad(loss, has_aux=True)(weights)
    return value, grads, state

  def check(self, data, model_axis):
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=data, model=model_axis))):
      declared = model.declare(self.cfg)
      weights = jax.tree.map(
        lambda w, x: sharding.constrain(jnp.asarray(x), w.axes),
        declared,
        self.params,
        is_leaf=params.is_weight,
      )
      batch = jax.tree.map(lambda x: sharding.constrain(jnp.asarray(x), ("batch", "seq")), self.batch)
      loss, grads, state = hybrids.jit(self.run_model)(weights, batch)
      for wanted in (weights["blocks"]["0"]["mixer"]["q"], batch.inputs):
        self.assertFalse(wanted.sharding.is_fully_replicated)
      for got, given in zip(jax.tree.leaves(grads), jax.tree.leaves(weights), strict=True):
        self.assertTrue(
          got.sharding.is_equivalent_to(given.sharding, got.ndim), (got.sharding, given.sharding)
        )
      initial = model.init_state(self.cfg, 8)
      for got, given in zip(jax.tree.leaves(state), jax.tree.leaves(initial), strict=True):
        self.assertTrue(
          got.sharding.is_equivalent_to(given.sharding, got.ndim), (got.sharding, given.sharding)
        )
      self.assertFalse(state.fast["0"].S.sharding.is_fully_replicated)
    assert_near(*(jax.device_get(x) for x in ((loss, grads, state), self.expected)), 1e-4)

  def test_four_by_two(self):
    self.check(4, 2)

  @pytest.mark.slow
  def test_eight_by_one(self):
    self.check(8, 1)

  def test_a_pod_is_checked_without_one(self):
    """On an abstract mesh of 64 x 4: gradients lie where their weights lie."""
    cfg = config.replace(
      self.cfg,
      embed_dim=128,
      mlp_dim=128,
      attention={"num_heads": 8, "num_kv_heads": 4, "head_dim": 16},
      fast={"num_heads": 4, "key_dim": 16, "value_dim": 16},
    )
    mesh = jax.sharding.AbstractMesh(
      (64, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )
    sleep_cfg = dataclasses.replace(self.sleep_cfg, num_passes=4)
    with jax.sharding.use_abstract_mesh(mesh):

      def placed(shape, axes, dtype=jnp.float32):
        where = jax.sharding.NamedSharding(mesh, sharding.spec(axes, shape))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

      weights = jax.tree.map(lambda w: placed(w.shape, w.axes), model.declare(cfg), is_leaf=params.is_weight)
      tokens, rows = placed((128, 8), ("batch", "seq"), jnp.int32), placed((128, 8), ("batch", "seq"))
      batch = windows.Batch(tokens, tokens, rows, placed((128, 8), ("batch", "seq"), bool))
      grads, _ = jax.eval_shape(
        jax.grad(lambda w, b: model.loss(w, b, self.segments, cfg, sleep_cfg), has_aux=True), weights, batch
      )
    for got, given in zip(jax.tree.leaves(grads), jax.tree.leaves(weights), strict=True):
      self.assertEqual(got.sharding.spec, given.sharding.spec)
