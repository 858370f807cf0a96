"""Host-made batches: the cut of Algorithm 1, no example lost, and an order of the seed alone."""

import numpy as np
from absl.testing import parameterized

from sleep_jax.config import ConfigError
from sleep_jax.data import batching
from sleep_jax.data.batching import BatchPlan, Bucket, CutConfig, Example

CUT = CutConfig(max_tokens=40, answer_tokens=2, tails=(4,), bucket_batches=3)
WINDOW = 8


class Made:
  """Example i: its number, then tokens that count up; 1 or 2 answer tokens."""

  def __len__(self):
    return 10_000

  def __getitem__(self, i):
    p = 1 + (i * 7) % 30
    return Example(np.arange(100, 100 + p) + 1000 * i, np.arange(1, 2 + i % 2) + 1000 * i, i % 4)


def plan(steps=9, batch=4, seed=0, **kw):
  return BatchPlan(Made(), CUT, window=WINDOW, batch_size=batch, steps=steps, seed=seed, **kw)


def fed(start=0, count=9, threads=1, **kw):
  stream = batching.feed(plan(**kw), CUT, start, threads=threads)
  return [next(stream) for _ in range(count - start)]


def same(got, want):
  assert len(got) == len(want)
  for a, b in zip(got, want, strict=True):
    assert (a.bucket, a.padding) == (b.bucket, b.padding)
    for name, x in a.rows.items():
      np.testing.assert_array_equal(x, b.rows[name])


class PlaceTest(parameterized.TestCase):
  def test_by_hand(self):
    example = Example(np.arange(10, 20), np.asarray([1, 2]))  # 9 tokens, then the one that predicts
    bucket = batching.bucket_of(example, CUT, WINDOW)
    self.assertEqual(bucket, Bucket(1, 4))
    row = batching.place(example, bucket, CUT, WINDOW)
    self.assertEqual(list(row["inputs"]), [*range(10, 18), 0, 18, 19, 1])
    self.assertEqual(list(row["valid"]), [True] * 8 + [False] + [True] * 3)
    self.assertEqual(list(row["targets"]), [0] * 10 + [1, 2])
    self.assertEqual(list(row["loss_mask"]), [0] * 10 + [1, 1])

  @parameterized.parameters(*range(1, 35))
  def test_windows_are_cut_from_the_start_and_the_answer_is_never_cut(self, p):
    example = Example(np.arange(100, 100 + p), np.asarray([1, 2]))
    bucket = batching.bucket_of(example, CUT, WINDOW)
    row = batching.place(example, bucket, CUT, WINDOW)
    self.assertEqual(list(row["inputs"][row["valid"]]), [*range(100, 100 + p), 1])
    for w in range((p - 1) // WINDOW):
      self.assertEqual(
        list(row["inputs"][w * WINDOW : (w + 1) * WINDOW]), list(example.prompt[w * 8 : w * 8 + 8])
      )
    where = batching.layout(bucket, CUT, WINDOW)
    np.testing.assert_array_equal(np.flatnonzero(row["loss_mask"]), np.flatnonzero(where))
    self.assertGreaterEqual(np.flatnonzero(where)[0], bucket.windows * WINDOW)

  def test_what_does_not_fit_is_refused(self):
    for prompt, answer in ((0, 1), (5, 0), (5, 3), (40, 1)):
      with self.assertRaisesRegex(ValueError, "an example needs"):
        batching.bucket_of(Example(np.ones(prompt), np.ones(answer)), CUT, WINDOW)
    with self.assertRaisesRegex(ConfigError, "data.cut.tails: must be at most model.window = 3, got 4"):
      batching.tail_lengths(CUT, 3)
    with self.assertRaisesRegex(ConfigError, "train.batch_size: must be a multiple of 3 hosts, got 4"):
      plan(hosts=3)
    with self.assertRaisesRegex(ConfigError, "train.steps: needs 12000 examples, the source has 10000"):
      plan(steps=3000)


class OrderTest(parameterized.TestCase):
  def test_every_example_comes_once(self):
    numbers = [t // 1000 for made in fed() for t in made.rows["targets"][:, -2]]
    self.assertEqual(sorted(numbers), list(range(36)))

  @parameterized.parameters(1, 2, 3, 7)
  def test_resuming_goes_on_where_it_was(self, start):
    same(fed(start), fed()[start:])

  def test_threads_do_not_matter_and_seeds_do(self):
    same(fed(threads=4), fed())
    self.assertNotEqual([x.bucket for x in fed(seed=1)], [x.bucket for x in fed()])

  def test_hosts_together_read_the_global_batches(self):
    halves = [fed(host=h, hosts=2) for h in range(2)]
    for whole, *parts in zip(fed(), *halves, strict=True):
      self.assertEqual({part.bucket for part in parts}, {whole.bucket})
      for name, x in whole.rows.items():
        np.testing.assert_array_equal(np.concatenate([part.rows[name] for part in parts]), x)

  def test_padding_is_the_share_of_pads(self):
    for made in fed():
      self.assertAlmostEqual(made.padding, 1 - made.rows["valid"].mean())
