"""What reading takes and refuses: uneven rows, text in parts, ids that are none, NaN, end tokens."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from sleep_jax import generate
from sleep_jax.config import ConfigError, SleepConfig
from sleep_jax.generate import SamplingConfig
from tests import hybrids
from tests.hybrids import assert_same

TWO = SleepConfig(num_passes=2)
KEY = jax.random.key(3)


class InputTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.cfg = hybrids.model_config(("gdn", "attn"))
    cls.weights = hybrids.random_params(cls.cfg)

  def start(self, rows=1):
    return generate.start(self.cfg, TWO, rows)

  def read(self, tokens, rows=1, session=None, **options):
    return generate.read(self.weights, tokens, session or self.start(rows), self.cfg, TWO, **options)

  def read_parts(self, parts, rows=1, session=None):
    return generate.read_parts(self.weights, parts, session or self.start(rows), self.cfg, TWO)

  def generated(self, session, count=6, **options):
    """The tokens, of which each row draws its own with its own key."""
    keys = jax.random.split(KEY, session.tokens.shape[0])
    made = generate.generate(self.weights, session, self.cfg, TWO, count=count, key=keys, **options)
    return [token.tolist() for token, _ in made]

  @parameterized.parameters(1, 3, 4, 5, 9)
  def test_rows_of_different_lengths_are_padded_on_the_left(self, short):
    tokens = hybrids.random_tokens(2, 9)
    valid = np.ones((2, 9), bool)
    valid[1, : 9 - short] = False
    padded = self.read(np.where(valid, tokens, 0), 2, valid=valid)
    for kind in (list, np.asarray, tuple):
      assert_same(self.read([tokens[0].tolist(), kind(tokens[1, 9 - short :].tolist())], 2), padded)

  def test_parts_are_the_whole(self):
    tokens, rng = hybrids.random_tokens(1, 19), random.Random(0)
    whole = self.read(tokens)
    for _ in range(6):
      cuts = [0, *sorted(rng.sample(range(1, 19), rng.randrange(6))), 19]
      parts = (tokens[:, a:b].tolist() for a, b in zip(cuts, cuts[1:], strict=False))
      assert_same(self.read_parts(parts), whole)
    begun, rest = self.read(tokens[:, :6]), self.read(tokens[:, 6:], session=self.read(tokens[:, :6]))
    assert_same(self.read_parts([tokens[:, 6:9], tokens[:, 9:]], session=begun), rest)

  def test_no_more_than_a_part_is_asked_for_at_a_time(self):
    """A text of any length: a part is read before the next but one is made."""
    made, seen = [0], []

    def parts():
      for _ in range(20):
        made[0] += 1
        yield hybrids.random_tokens(1, 4)

    generate.read_parts(
      self.weights, parts(), self.start(), self.cfg, TWO, watch=lambda *_: seen.append(made[0])
    )
    self.assertEqual(made, [20])
    self.assertLessEqual(max(at - n for n, at in enumerate(seen)), 2)

  def test_what_parts_raise_comes_through(self):
    def parts():
      yield [[1, 2]]
      raise OSError("the line is cut")

    with self.assertRaisesRegex(OSError, "the line is cut"):
      self.read_parts(parts())
    with self.assertRaisesRegex(ConfigError, "prompt: has no tokens"):
      self.read_parts([])

  @parameterized.named_parameters(
    ("a row is empty", [[1, 2], []], ConfigError, "prompt: row 1 has no tokens"),
    ("all rows are empty", [[], []], ConfigError, "prompt: has no tokens"),
    ("too few rows", [[1, 2]], ValueError, r"must be \[2, T\], got \(1, 2\)"),
    ("too many rows, not alike", [[1, 2], [1], [2]], ValueError, r"must be \[2, T\], got \(3, 2\)"),
    ("one row of two", [1, 2], ValueError, r"must be \[2, T\], got \(2,\)"),
    ("too deep", np.zeros((2, 2, 2), int), ValueError, r"must be \[2, T\]"),
    ("fractions", [[0.5, 1.0], [1.0, 1.0]], TypeError, "must be whole numbers, got float"),
    ("fractions, not alike", [[1, 2], [1.5]], TypeError, "must be whole numbers, got float"),
    ("truth", [[True, False], [True, False]], TypeError, "must be whole numbers, got bool"),
    ("text", [["a"], ["b"]], TypeError, "must be whole numbers"),
    ("none", [[None], [None]], TypeError, "must be whole numbers"),
    ("beyond 64 bits", [[1 << 70], [0]], TypeError, "must be whole numbers"),
    ("beyond 32 bits", [[1 << 40], [0]], ConfigError, "prompt: tokens must lie in 0..10"),
    ("unsigned", np.full((2, 1), 1 << 63, np.uint64), ConfigError, "prompt: tokens must lie in 0..10"),
    ("wraps to one that is there", [[(1 << 32) + 1], [0]], ConfigError, "prompt: tokens must lie in 0..10"),
    ("next to the last", [[11], [0]], ConfigError, "there are some in 0..11"),
    ("negative, not alike", [[-1], [1, 2]], ConfigError, "there are some in -1..2"),
  )
  def test_refused(self, tokens, kind, message):
    """As a whole and as the second of two parts, in one line; what was read before stays good."""
    for refused in (lambda: self.read(tokens, 2), lambda: self.read_parts([[[1], [2]], tokens], 2)):
      with self.assertRaisesRegex(kind, message) as caught:
        refused()
      self.assertNotIn("\n", str(caught.exception))

  def test_valid_that_does_not_fit(self):
    with self.assertRaisesRegex(ValueError, "rows of different lengths are padded here"):
      self.read([[1, 2], [1]], 2, valid=np.ones((2, 2), bool))
    with self.assertRaisesRegex(ValueError, r"must be \[2, T\], got \(2, 2\) and \(2, 1\)"):
      self.read([[1, 2], [1, 3]], 2, valid=np.ones((2, 1), bool))

  def test_a_row_ends_at_its_end_token_and_the_others_go_on(self):
    session = self.read([[1, 2, 3, 4, 5], [6, 7]], 2)
    warm = SamplingConfig(2.0)
    free = np.array(self.generated(session, sampling=warm))
    end = next(int(token) for token in free[:-1, 1] if token not in free[:, 0])
    at = free[:, 1].tolist().index(end)
    expected = free.copy()
    expected[at + 1 :, 1] = generate.ENDED
    np.testing.assert_array_equal(self.generated(session, sampling=warm, end_tokens=[end, 99]), expected)
    on = dataclasses.replace(warm, stop_at_end=False)
    np.testing.assert_array_equal(self.generated(session, sampling=on, end_tokens=[end]), free)
    np.testing.assert_array_equal(self.generated(session, sampling=[on, warm], end_tokens=[end]), expected)
    np.testing.assert_array_equal(self.generated(session, sampling=[warm, on], end_tokens=[end]), free)
    both = self.generated(session, sampling=warm, end_tokens=[end, int(free[0, 0])])
    self.assertLen(both, 1 + next(t for t in range(6) if free[t, 1] in (end, free[0, 0])))

  @parameterized.parameters(*[(n, at) for n in (float("nan"), float("inf")) for at in (1, 3, 4, 6, 9)])
  def test_logits_that_are_not_finite_end_it_with_the_first_token(self, number, at):
    """Token 10 has an embedding that is none; it is token `at` of the text, awake or in a window slept on."""
    broken = jax.tree.map(jnp.asarray, self.weights)
    broken["embed"] = broken["embed"].at[10].set(number)
    tokens = np.ones((1, 9), int)
    tokens[0, at - 1] = 10
    for read in (
      lambda: generate.read(broken, tokens, self.start(), self.cfg, TWO),
      lambda: generate.read_parts(broken, [tokens[:, :5], tokens[:, 5:]], self.start(), self.cfg, TWO),
    ):
      with self.assertRaisesRegex(generate.NotFiniteError, f"^logits are not finite from token {at} on$"):
        read()
