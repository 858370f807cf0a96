"""Answers by group: sums counted by hand, intervals and baselines, and scores that no batch size changes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from sleep_jax.scoring import by_group


def drawn(rows, seed=0):
  """Random logits and labels: [rows, 6, 5]; two answers of 1-2 tokens after a trivial token each."""
  rng = np.random.default_rng(seed)
  long = rng.integers(0, 2, (rows, 2))
  answer = np.full((rows, 6), -1)
  mask = np.zeros((rows, 6))
  for row in range(rows):
    place = 0
    for q in range(2):
      mask[row, place : place + 2 + long[row, q]] = 1
      answer[row, place + 1 : place + 2 + long[row, q]] = q
      place += 3
  logits = 2 * rng.normal(size=(rows, 6, 5))
  return logits, rng.integers(0, 5, (rows, 6)), mask, answer, rng.integers(0, 3, rows)


def by_hand(logits, targets, mask, answer, group, g):
  """(loss, answer loss, exact) of a group by loops."""
  nats, answer_nats, right = [], [], []
  for b in np.flatnonzero(group == g):
    for m in np.flatnonzero(mask[b]):
      loss = np.log(np.exp(logits[b, m]).sum()) - logits[b, m, targets[b, m]]
      nats.append(loss)
      answer_nats += [loss] if answer[b, m] >= 0 else []
    for q in set(answer[b]) - {-1}:
      right.append(all(logits[b, m].argmax() == targets[b, m] for m in np.flatnonzero(answer[b] == q)))
  return np.mean(nats), np.mean(answer_nats), np.mean(right)


class ScoreTest(parameterized.TestCase):
  def test_by_hand(self):
    data = drawn(60)
    sums = by_group.score(*jax.device_put(data), 2, 3)
    row = by_group.rates(sums, ["k1", "k2", "k4"])
    for g, name in enumerate(("k1", "k2", "k4")):
      want = by_hand(*data, g)
      got = (row[f"{name}_loss"], row[f"{name}_answer_loss"], row[f"{name}_exact"])
      np.testing.assert_allclose(got, want, rtol=1e-5)
      places = row["by_answer"][name]
      self.assertAlmostEqual(np.mean(places["exact"]), want[2], places=5)  # both are asked equally often
      self.assertEqual(row[f"{name}_asked"], 2 * np.sum(data[-1] == g))

  @parameterized.parameters(1, 7, 16, 60)
  def test_scores_do_not_depend_on_the_batch_size(self, size):
    data = drawn(60)
    whole = by_group.score(*jax.device_put(data), 2, 3)
    parts = [by_group.score(*(jnp.asarray(x[i : i + size]) for x in data), 2, 3) for i in range(0, 60, size)]
    summed = jax.tree.map(lambda *x: sum(x), *parts)
    for name in whole:
      tolerance = 1e-5 if "nats" in name else 0  # what is counted is exact
      np.testing.assert_allclose(summed[name], whole[name], rtol=tolerance)

  def test_one_wrong_token_makes_the_answer_wrong(self):
    logits = 5 * np.eye(5)[np.asarray([[0, 1, 2]])]
    targets, answer = np.asarray([[0, 1, 3]]), np.asarray([[0, 1, 1]])
    sums = by_group.score(*map(jnp.asarray, (logits, targets, np.ones((1, 3)), answer, [0])), 2, 1)
    np.testing.assert_array_equal(sums["right"], [[1, 0]])
    np.testing.assert_array_equal(sums["asked"], [[1, 1]])

  def test_what_is_masked_is_no_answer(self):
    logits, targets, _, answer, group = drawn(4)
    sums = by_group.score(*map(jnp.asarray, (logits, targets, np.zeros((4, 6)), answer, group)), 2, 3)
    self.assertEqual(float(sums["asked"].sum() + sums["tokens"].sum() + sums["nats"].sum()), 0.0)
    self.assertTrue(np.isnan(by_group.rates(sums, ["a", "b", "c"])["a_exact"]))


class BaselineTest(parameterized.TestCase):
  @parameterized.parameters((0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662))
  def test_intervals_of_the_textbook(self, right, asked, low, high):
    np.testing.assert_allclose(by_group.wilson(right, asked), (low, high), atol=1e-4)

  def test_an_interval_holds_its_rate(self):
    for right, asked in itertools.product((0, 1, 50), (50, 51)):
      low, high = by_group.wilson(right, asked)
      self.assertTrue(0 <= low <= right / asked <= high <= 1)
    self.assertEqual(by_group.wilson(0, 0), (0.0, 1.0))

  def test_majority_counts_whole_answers(self):
    # answers: (7), (7, 8), (7), (9); the ANS before each is no part of them
    targets = np.asarray([[1, 7, 0], [1, 7, 8], [1, 7, 0], [1, 9, 0]])
    answer = np.asarray([[-1, 0, -1], [-1, 0, 0], [-1, 0, -1], [-1, 0, -1]])
    got = by_group.majority(targets, answer, np.asarray([0, 0, 0, 1]), ["a", "b"], 1)
    self.assertEqual(got, {"const_exact": 0.5, "a_majority": 2 / 3, "b_majority": 1.0})
