"""Rule 110: the right answers at the right place, in a stream that depends on nothing but its index."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from sleep_jax import windows
from sleep_jax.config import ConfigError
from sleep_jax.data import rule110
from sleep_jax.data.rule110 import ASK, Rule110Config
from sleep_jax.experiments import rule110 as experiment
from sleep_jax.experiments.configs import rule110 as presets
from tests import hybrids

REFERENCE = pathlib.Path(__file__).parents[1] / "data" / "rule110_reference.jsonl"
SMALL = Rule110Config(num_strings=3, num_cells=7, rollout_steps=2)

# Wolfram's numbering: bit n of 110 is what becomes of a neighbourhood that reads as the number n.
TABLE = {f"{n:03b}": str(110 >> n & 1) for n in range(8)}

# t -> P(first cell = 1) for 24 random cells on a ring, from enumerating all 2^24 in another program.
RING_OF_24 = {1: 0.6250, 4: 0.5352, 32: 0.5617}


def by_table(cells, steps, boundary):
  """Rule 110 on a text of 0s and 1s, neighbourhood by neighbourhood."""
  for _ in range(steps):
    left, right = (cells[-1], cells[0]) if boundary == "periodic" else ("0", "0")
    framed = left + cells + right
    cells = "".join(TABLE[framed[i : i + 3]] for i in range(len(cells)))
  return cells


def packed(texts):
  return np.asarray([int(text[::-1], 2) for text in texts], np.uint32)


def unpacked(bits, num_cells):
  return ["".join(str(int(x) >> i & 1) for i in range(num_cells)) for x in bits]


compiled = hybrids.jit(rule110.batch, static_argnums=(0, 3))


def draw(cfg, seed=0, size=16, step=0):
  return jax.tree.map(np.asarray, compiled(cfg, jax.random.key(seed), step, size))


class EvolveTest(parameterized.TestCase):
  @parameterized.product(boundary=("periodic", "zero"), t=(0, 1, 2, 4, 8, 16, 32))
  def test_reference_file(self, boundary, t):
    rows = [json.loads(line) for line in REFERENCE.read_text().splitlines()]
    cfg = Rule110Config(num_cells=24, rollout_steps=t, boundary=boundary)
    got = rule110.evolve(packed([row["s"] for row in rows]), cfg)
    self.assertEqual(unpacked(got, 24), [row[boundary][str(t)] for row in rows])

  @settings(max_examples=20, deadline=None)
  @given(data=st.data(), boundary=st.sampled_from(["periodic", "zero"]), t=st.integers(0, 5))
  def test_any_string_by_the_table(self, data, boundary, t):
    n = data.draw(st.sampled_from([3, 4, 31, 32]))
    texts = data.draw(st.lists(st.text("01", min_size=n, max_size=n), min_size=4, max_size=4))
    cfg = Rule110Config(num_cells=n, rollout_steps=t, boundary=boundary)
    self.assertEqual(
      unpacked(rule110.evolve(packed(texts), cfg), n), [by_table(s, t, boundary) for s in texts]
    )

  def test_any_shape(self):
    cells = np.arange(24, dtype=np.uint32).reshape(2, 3, 4)
    got = rule110.evolve(cells, SMALL)
    self.assertEqual((got.shape, got.dtype), ((2, 3, 4), np.uint32))
    np.testing.assert_array_equal(got.ravel(), rule110.evolve(cells.ravel(), SMALL))

  @parameterized.parameters("periodic", "zero")
  def test_how_often_each_answer_comes_on_12_cells(self, boundary):
    everything = np.arange(1 << 12, dtype=np.uint32)
    cells = (everything[:, None] >> np.arange(12) & 1).astype(int)  # [2^12, 12]
    for t in range(1, 6):
      left, right = np.roll(cells, 1, axis=1), np.roll(cells, -1, axis=1)
      if boundary == "zero":
        left[:, 0] = right[:, -1] = 0
      cells = 110 >> (4 * left + 2 * cells + right) & 1
      cfg = Rule110Config(num_cells=12, rollout_steps=t, boundary=boundary)
      labels = np.asarray(rule110.evolve(everything, cfg)) & 1
      self.assertEqual(labels.sum(), cells[:, 0].sum())
      if boundary == "zero":  # only zeros in cells 0..t leave a zero in the first one
        self.assertEqual(1 - labels.mean(), 2.0 ** -(t + 1))

  def test_how_often_each_answer_comes_on_the_papers_ring(self):
    for t, want in RING_OF_24.items():
      cfg = Rule110Config(num_cells=24, rollout_steps=t)

      @jax.jit
      def ones(cfg=cfg):
        def part(i):
          return jnp.sum(rule110.evolve((i << 16) + jnp.arange(1 << 16, dtype=jnp.uint32), cfg) & 1)

        return jnp.sum(jax.lax.map(part, jnp.arange(1 << 8, dtype=jnp.uint32)))

      self.assertAlmostEqual(float(ones()) / (1 << 24), want, delta=5.1e-5)  # four decimals are known


class SequenceTest(parameterized.TestCase):
  @parameterized.product(boundary=("periodic", "zero"), cells=(5, 24), steps=(0, 1, 6))
  def test_tokens_and_labels(self, boundary, cells, steps):
    cfg = Rule110Config(num_strings=3, num_cells=cells, rollout_steps=steps, boundary=boundary)
    made = draw(cfg)
    for inputs, targets in zip(made.inputs, made.targets, strict=True):
      strings = ["".join(map(str, inputs[i * cells : (i + 1) * cells])) for i in range(3)]
      labels = [int(by_table(s, steps, boundary)[0]) for s in strings]
      self.assertEqual(list(inputs[3 * cells :]), [ASK, *labels[:-1]])
      self.assertEqual(list(targets[3 * cells :]), labels)

  def test_only_the_answers_count(self):
    made = draw(SMALL)
    want = [False] * (3 * 7) + [True] * 3
    self.assertEqual(list(rule110.layout(SMALL)), want)
    self.assertEqual(SMALL.length, 24)
    for name in ("inputs", "targets", "loss_mask"):
      self.assertEqual(getattr(made, name).shape, (16, 24))
    np.testing.assert_array_equal(made.loss_mask, np.broadcast_to(np.asarray(want, float), (16, 24)))
    self.assertIsNone(made.valid)
    self.assertLess(made.inputs.max(), rule110.VOCAB_SIZE)
    self.assertEqual((made.inputs.dtype, made.targets.dtype), (np.int32, np.int32))

  def test_the_paper_setting_has_its_sizes(self):
    cfg = Rule110Config()
    self.assertEqual((cfg.length, rule110.layout(cfg).sum()), (100, 4))
    segments = windows.plan(rule110.layout(cfg), 24)
    slept_on, answered = segments
    self.assertEqual((slept_on.count, slept_on.length, slept_on.reads), (4, 24, ()))
    self.assertEqual((answered.start, answered.length, answered.reads), (96, 4, (0, 1, 2, 3)))

  @parameterized.parameters(3, 7, 21)
  def test_windows_that_fit_hold_cells_or_answers(self, window):
    rule110.check_window(SMALL, window)
    for segment in windows.plan(rule110.layout(SMALL), window):
      self.assertEqual(segment.reads, () if segment.start < 21 else (0, 1, 2))

  @parameterized.parameters(
    (5, "model.window: must divide the 21 cells (data.num_strings x data.num_cells)"),
    (24, "model.window: must divide the 21 cells"),
    (1, "model.window: must hold the 3 answers (data.num_strings), got 1"),
  )
  def test_other_windows_are_refused(self, window, message):
    with self.assertRaises(ConfigError) as caught:
      rule110.check_window(SMALL, window)
    self.assertIn(message, str(caught.exception))
    self.assertNotIn("\n", str(caught.exception))


class StreamTest(parameterized.TestCase):
  def test_a_sequence_depends_on_seed_and_index_alone(self):
    whole = draw(SMALL, size=24)
    for size in (1, 6, 8):
      parts = [draw(SMALL, size=size, step=i) for i in range(24 // size)]
      together = jax.tree.map(lambda *x: np.concatenate(x), *parts)
      for name in ("inputs", "targets", "loss_mask"):
        np.testing.assert_array_equal(getattr(together, name), getattr(whole, name))

  def test_it_is_the_same_whether_compiled_or_not(self):
    eager = rule110.batch(SMALL, jax.random.key(3), 5, 8)
    np.testing.assert_array_equal(eager.inputs, draw(SMALL, seed=3, size=8, step=5).inputs)

  def test_depth_changes_answers_not_strings(self):
    deep = Rule110Config(num_strings=3, num_cells=7, rollout_steps=9)
    np.testing.assert_array_equal(draw(SMALL).inputs[:, :21], draw(deep).inputs[:, :21])

  def test_a_curriculum_asks_for_fewer_steps_of_the_same_strings(self):
    cfg = Rule110Config(num_strings=3, num_cells=7, rollout_steps=3, curriculum_steps=6)
    lessons = hybrids.jit(rule110.lessons, static_argnums=(0, 3))
    for step, t in enumerate([1, 1, 2, 2, 3, 3, 3, 3]):
      plain = Rule110Config(num_strings=3, num_cells=7, rollout_steps=t)
      got, want = lessons(cfg, jax.random.key(0), step, 16), draw(plain, step=step)
      np.testing.assert_array_equal(got.inputs[:, :21], want.inputs[:, :21])
      np.testing.assert_array_equal(got.targets, want.targets)
    # What is not training asks for all of them from the beginning, and without a curriculum so does training.
    deep = Rule110Config(num_strings=3, num_cells=7, rollout_steps=3)
    np.testing.assert_array_equal(draw(cfg).targets, draw(deep).targets)
    np.testing.assert_array_equal(lessons(deep, jax.random.key(0), 0, 16).targets, draw(deep).targets)

  def test_streams_of_different_seeds_share_nothing(self):
    cfg = Rule110Config(num_strings=4, num_cells=24, rollout_steps=0)
    rows = [
      {tuple(row) for row in draw(cfg, seed=seed, size=2048).inputs[:, :96]}
      for seed in (0, 1, cfg.held_out_seed)
    ]
    for row in rows:
      self.assertLen(row, 2048)  # 2^96 strings: none comes twice
    self.assertLen(set.union(*rows), 3 * 2048)

  def test_cells_are_fair_coins(self):
    cfg = Rule110Config(num_strings=2, num_cells=8, rollout_steps=1)
    size = 4096
    cells = draw(cfg, size=size).inputs[:, :16]
    deviation = 0.5 / np.sqrt(size)
    self.assertLess(np.abs(cells.mean(axis=0) - 0.5).max(), 5 * deviation)
    signs = 2 * cells - 1
    pairs = signs.T @ signs / size  # 0 off the diagonal, with deviation 1 / sqrt(size)
    self.assertLess(np.abs(pairs - np.eye(16)).max(), 5 * 2 * deviation)
    # and one sequence says nothing of the next
    self.assertLess(np.abs(signs[:-1].T @ signs[1:] / size).max(), 5 * 2 * deviation)

  @parameterized.parameters(
    ({"num_strings": 0}, "data.num_strings: must be at least 1, got 0"),
    ({"num_strings": 2**20}, "data.num_strings: must be at most 41943 of 24 cells, got 1048576"),
    ({"num_cells": 33}, "data.num_cells: must lie in 3..32, got 33"),
    ({"rollout_steps": 2**31}, "data.rollout_steps: must be at most 65536, got 2147483648"),
    ({"held_out_seed": 2**32}, "data.held_out_seed: must be at most 4294967295, got 4294967296"),
    ({"boundary": "zeros"}, "data.boundary: unknown value 'zeros'; did you mean \"zero\"?"),
  )
  def test_what_cannot_be_is_one_line(self, changes, message):
    with self.assertRaises(ConfigError) as caught:
      Rule110Config(**changes)
    self.assertEqual(message, str(caught.exception))

  def test_a_stream_that_would_repeat_itself_is_refused(self):
    cfg = presets.get_config("tiny")
    cfg.train.update(steps=2**20, batch_size=2**12)
    built, task = experiment.build(cfg.to_dict())
    with self.assertRaisesRegex(
      ConfigError, "^train.steps: times train.batch_size must be at most 2147483648"
    ):
      task.check(built)
