"""Evaluation: rates from logits counted by hand, what sleep changed, and what an answer costs."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from sleep_jax import model, windows
from sleep_jax.config import AttentionConfig, FastConfig, ModelConfig, SleepConfig
from sleep_jax.cost import measured
from sleep_jax.data import rule110
from sleep_jax.scoring import by_position, sleep_changes

TASK = rule110.Rule110Config(num_strings=2, num_cells=4, rollout_steps=1)
CONFIG = ModelConfig(
  vocab_size=3,
  embed_dim=8,
  mlp_dim=8,
  blocks=("hebbian", "attn"),
  window=4,
  attention=AttentionConfig(num_heads=1, head_dim=4),
  fast=FastConfig(num_heads=2, key_dim=4, value_dim=3, conv_size=3, decay_init=(0.1, 1.0)),
)
SEGMENTS = windows.plan(rule110.layout(TASK), CONFIG.window)


def log_softmax(x):
  x = np.asarray(x, np.float64)
  return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


class ScoreTest(parameterized.TestCase):
  def test_by_hand(self):
    # three sequences with two answers each; the last answer of the third is not asked for
    best = np.array([[1, 0], [1, 1], [0, 2]])
    targets = np.array([[1, 0], [1, 0], [0, 0]])
    mask = np.array([[1, 1], [1, 1], [1, 0]])
    logits = 3.0 * np.eye(3)[best]
    got = by_position.rates(by_position.score(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(mask)))
    right, wrong = np.log(np.exp(3) + 2) - 3, np.log(np.exp(3) + 2)
    self.assertAlmostEqual(got.pop("loss"), (4 * right + wrong) / 5, places=6)
    low, high = got.pop("low"), got.pop("high")
    for rate in (low, high):  # Wilson's ends are where the rate lies 1.96 standard errors from 2 of 3
      self.assertAlmostEqual(abs(2 / 3 - rate) / np.sqrt(rate * (1 - rate) / 3), 1.96, places=3)
    self.assertTrue(0 < low < 2 / 3 < high < 1)
    want = {"exact": 2 / 3, "bit": 4 / 5, "string_0": 1.0, "string_1": 1 / 2}
    self.assertSameElements(got, want)
    for name, value in want.items():
      self.assertAlmostEqual(got[name], value, places=6)

  def test_sums_of_parts_are_the_sums_of_the_whole(self):
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(8, 3, 4)), rng.integers(0, 4, (8, 3))
    mask = rng.integers(0, 2, (8, 3))
    whole = by_position.score(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(mask))
    parts = [
      by_position.score(jnp.asarray(logits[rows]), jnp.asarray(targets[rows]), jnp.asarray(mask[rows]))
      for rows in (slice(0, 3), slice(3, 8))
    ]
    summed = jax.tree.map(lambda a, b: a + b, *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), summed, whole)

  def test_best_constants_by_hand(self):
    targets = [[0, 1], [0, 1], [1, 1], [0, 0], [1, 1], [0, 1]]
    got = by_position.best_constant(np.asarray(targets))
    self.assertEqual(got, {"const_exact": 3 / 6, "const_bit": 7 / 12})


class EvaluateTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    quick = {"xla_backend_optimization_level": 0}
    cls.weights = jax.jit(lambda key: model.init(CONFIG, key), compiler_options=quick)(jax.random.key(0))
    draw = jax.jit(lambda i: rule110.batch(TASK, jax.random.key(9), i, 16))
    cls.batches = [draw(i) for i in range(3)]

  def test_rates_of_a_held_out_set(self):
    sleep_cfg = SleepConfig(num_passes=2, backprop_passes=1, remat="block")
    test = by_position.make_evaluate(
      lambda i: rule110.batch(TASK, jax.random.key(9), i, 16), 3, SEGMENTS, CONFIG, sleep_cfg
    )
    got = test(self.weights)

    forward = jax.jit(
      lambda b: model.forward(self.weights, b, SEGMENTS, CONFIG, SleepConfig(num_passes=2))[0]
    )
    logits = np.concatenate([forward(batch) for batch in self.batches])
    targets = np.concatenate([batch.targets[:, -2:] for batch in self.batches])
    right = logits.argmax(-1) == targets
    nats = -np.take_along_axis(log_softmax(logits), targets[..., None], -1).mean()
    self.assertAlmostEqual(got["loss"], nats, delta=1e-5)
    ones = targets.mean()
    pairs = np.bincount(targets @ [2, 1], minlength=4).max() / 48
    want = {
      "exact": right.all(1).mean(),
      "bit": right.mean(),
      "string_0": right[:, 0].mean(),
      "string_1": right[:, 1].mean(),
      "const_exact": pairs,
      "const_bit": max(ones, 1 - ones),
    }
    for name, value in want.items():
      self.assertAlmostEqual(got[name], value, places=6, msg=name)
    self.assertLess(got["low"], got["exact"])
    self.assertGreater(got["high"], got["exact"])
    self.assertEqual(set(got), {"loss", "low", "high", *want})
    self.assertEqual(test(self.weights), got)  # the set is fixed

  def test_changes_of_each_pass_and_window(self):
    batch = self.batches[0]
    sleep_cfg = SleepConfig(num_passes=2, backprop_passes=1, loops="unroll")
    got = sleep_changes.sleep_changes(self.weights, batch, SEGMENTS, CONFIG, sleep_cfg)
    self.assertEqual(set(got), {"0"})

    @jax.jit
    def after(state, tokens):
      return [
        model.consolidate(self.weights, tokens, state, CONFIG, SleepConfig(num_passes=n)) for n in (1, 2)
      ]

    state = model.init_state(CONFIG, 16)
    for window in range(2):
      one, two = after(state, batch.inputs[:, 4 * window : 4 * window + 4])
      S = [np.asarray(s.fast["0"].S, np.float64).reshape(16, -1) for s in (state, one, two)]
      for n in (1, 2):
        want = np.linalg.norm(S[n] - S[n - 1], axis=1) / np.linalg.norm(S[n], axis=1)
        self.assertAlmostEqual(got["0"][window][n - 1], want.mean(), delta=1e-5)
      state = two
    self.assertAlmostEqual(got["0"][0][0], 1.0, places=5)  # from nothing to something
    self.assertLen(got["0"], 2)

  def test_cost_is_measured_and_the_state_counted(self):
    got = measured.cost(self.weights, CONFIG, SleepConfig(num_passes=2, backprop_passes=1))
    times = ("wake_ms_per_answer", "sleep_ms_per_window")
    self.assertEqual(set(got), {t + end for t in times for end in ("", "_p10", "_p90")} | {"state_bytes"})
    for name in times:
      self.assertGreater(got[f"{name}_p10"], 0)
      self.assertLessEqual(got[f"{name}_p10"], got[name])
      self.assertLessEqual(got[name], got[f"{name}_p90"])
    self.assertEqual(got["state_bytes"], measured.state_bytes(CONFIG))

  @parameterized.parameters(("float32", 3, 4), ("bfloat16", 3, 2), ("float32", 0, 4))
  def test_bytes_of_the_state(self, dtype, conv_size, width):
    # two layers with fast weights: S [2, 4, 3] in float32 and c - 1 inputs of q, k and v
    fast = FastConfig(num_heads=2, key_dim=4, value_dim=3, conv_size=conv_size)
    cfg = ModelConfig(vocab_size=3, blocks=("attn", "gdn", "hebbian"), dtype=dtype, fast=fast)
    S, context = 2 * 4 * 3 * 4, max(conv_size - 1, 0) * 2 * (4 + 4 + 3) * width
    self.assertEqual(measured.state_bytes(cfg), 2 * (S + context))

  def test_the_state_does_not_grow_with_the_window(self):
    sizes = {
      measured.state_bytes(ModelConfig(vocab_size=3, blocks=("attn", "gdn"), window=w)) for w in (1, 24, 4096)
    }
    self.assertLen(sizes, 1)
    self.assertEqual(measured.state_bytes(ModelConfig(vocab_size=3, blocks=("attn",))), 0)
