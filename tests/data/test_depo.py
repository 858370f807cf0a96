"""Depo: cycles, questions and answers as a reader finds them, drawn as the released generator draws."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from sleep_jax import windows
from sleep_jax.config import ConfigError
from sleep_jax.data import depo
from sleep_jax.data.depo import DepoConfig
from tests import hybrids
from tests.data import depo_reader

REFERENCE = pathlib.Path(__file__).parents[1] / "data" / "depo_reference.jsonl"
SMALL = DepoConfig(
  max_nodes=6, mini_vocab=3, max_hops=8, test_hops=(1, 8), num_pairs=4, context_length=24, query_length=24
)

compiled = hybrids.jit(depo.batch, static_argnums=(0, 3, 4))


def draw(cfg, seed=0, size=64, step=0, hops=None):
  return jax.tree.map(np.asarray, compiled(cfg, jax.random.key(seed), step, size, hops))


def read(cfg, made):
  return [depo_reader.read(list(map(int, row)), depo_reader.ours(cfg)) for row in made.inputs]


def reference():
  return [json.loads(line) for line in REFERENCE.read_text().splitlines()]


class ReaderTest(parameterized.TestCase):
  """The judge itself, on sequences of the released generator, and on broken ones."""

  def test_it_reads_the_reference_file(self):
    for row in reference():
      found = depo_reader.read(row["tokens"], depo_reader.released(row["args"]["mini_vocab"]))
      self.assertEqual(depo_reader.verify(found), row["n"])
      self.assertEqual(found.queries, [(k, tuple(a), tuple(b)) for k, a, b in row["queries"]])
      self.assertEqual(found.labels, list(np.flatnonzero(row["label"])))

  def test_it_sees_a_wrong_answer_a_broken_cycle_and_what_is_no_sequence(self):
    row = draw(SMALL, hops=1).inputs[0].tolist()
    ids = depo_reader.ours(SMALL)
    found = depo_reader.read(row, ids)
    (k, start, _), *others = found.queries
    wrong = depo_reader.Instance(found.edges, [(k, start, start), *others], [])
    with self.assertRaisesRegex(ValueError, "edges after"):
      depo_reader.verify(wrong)
    (a, b), (c, d), *rest = found.edges
    with self.assertRaises(ValueError):
      depo_reader.verify(depo_reader.Instance([(a, d), (c, b), *rest], found.queries, []))
    with self.assertRaises(ValueError):
      depo_reader.read([*row[:-1], 1, 1], ids)


class SequenceTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("the_papers", DepoConfig()),
    ("one_token_a_name", DepoConfig(mini_vocab=75, max_name=1, sizes="uniform")),
    (
      "long_names",
      DepoConfig(max_nodes=9, mini_vocab=2, min_name=3, max_name=6, query_length=140, label_ans=False),
    ),
    ("separator_and_bos", DepoConfig(max_nodes=50, separator=True, bos=True)),
    ("all_names_taken", DepoConfig(max_nodes=12, mini_vocab=3, sizes="largest", pads="masked")),
  )
  def test_every_answer_is_right(self, cfg):
    for hops in (None, cfg.max_hops):
      made = draw(cfg, hops=hops)
      self.assertEqual(made.inputs.shape, (64, cfg.length))
      self.assertLess(made.inputs.max(), cfg.vocab_size)
      for row, (found, targets, mask) in enumerate(
        zip(read(cfg, made), made.targets, made.loss_mask, strict=True)
      ):
        n = depo_reader.verify(found)
        self.assertLen(found.queries, min(n, cfg.num_pairs))
        self.assertLen({start for _, start, _ in found.queries}, min(n, cfg.num_pairs))
        if hops is not None:
          self.assertEqual((n, {k for k, _, _ in found.queries}), (cfg.max_nodes, {hops}))
        tokens = made.inputs[row]
        labels = [i for i in found.labels if cfg.label_ans or tokens[i] != cfg.ans]
        self.assertEqual(list(np.flatnonzero(mask) + 1), labels)
        np.testing.assert_array_equal(targets[mask > 0], tokens[labels])
        # edges end, and questions begin, at the border
        self.assertGreater(tokens[cfg.context_length], 2 * cfg.mini_vocab)
        self.assertIn(tokens[cfg.context_length - 1], depo_reader.ours(cfg).final)
        self.assertTrue(all(depo.layout(cfg)[mask > 0]))
      if cfg.pads == "masked":
        np.testing.assert_array_equal(made.valid, made.inputs != depo.PAD)
      else:
        self.assertIsNone(made.valid)

  def test_the_papers_setting_has_its_sizes(self):
    cfg = DepoConfig()
    self.assertEqual((cfg.length, cfg.vocab_size, cfg.hop(16), cfg.ans), (360, 118, 116, 117))
    slept_on, answered = windows.plan(depo.layout(cfg), 75)
    self.assertEqual((slept_on.count, slept_on.length, slept_on.reads), (4, 75, ()))
    self.assertEqual((answered.start, answered.length, answered.reads), (300, 60, tuple(range(1, 59))))

  def test_which_answer_a_target_belongs_to(self):
    cfg = DepoConfig(max_nodes=9, sizes="uniform")
    made = draw(cfg)
    where = depo.layout(cfg)
    got = np.asarray(depo.answer_of(cfg, made.targets[:, where], made.loss_mask[:, where]))
    for found, ids, targets in zip(read(cfg, made), got, made.targets[:, where], strict=True):
      names = [tuple(targets[ids == q]) for q in range(ids.max() + 1)]
      self.assertEqual(names, [answer for _, _, answer in found.queries])

  def test_depth_changes_answers_alone(self):
    sets = [read(SMALL, draw(SMALL, hops=k)) for k in (1, 8)]
    for one, eight in zip(*sets, strict=True):
      self.assertEqual(one.edges, eight.edges)
      self.assertEqual([q[1] for q in one.queries], [q[1] for q in eight.queries])


class StreamTest(parameterized.TestCase):
  def test_a_sequence_depends_on_seed_and_index_alone(self):
    whole = draw(SMALL, size=24)
    for size in (1, 6):
      parts = [draw(SMALL, size=size, step=i) for i in range(24 // size)]
      together = np.concatenate([part.inputs for part in parts])
      np.testing.assert_array_equal(together, whole.inputs)
    self.assertFalse(np.array_equal(draw(SMALL, seed=1, size=24).inputs, whole.inputs))

  def test_it_is_the_same_whether_compiled_or_not(self):
    eager = depo.batch(SMALL, jax.random.key(3), 5, 4)
    np.testing.assert_array_equal(eager.inputs, draw(SMALL, seed=3, size=4, step=5).inputs)

  def test_streams_of_different_seeds_share_nothing(self):
    cfg = DepoConfig(sizes="largest")
    rows = [{tuple(r) for r in draw(cfg, seed=s, size=256).inputs} for s in (0, 1, cfg.held_out_seed)]
    self.assertLen(set.union(*rows), 3 * 256)


class HeldOutTest(parameterized.TestCase):
  def test_masked_pads(self):
    cfg = DepoConfig(**{**vars(SMALL), "pads": "masked"})
    made = draw(cfg, seed=cfg.held_out_seed, size=4, hops=8)
    for found in read(cfg, made):
      self.assertEqual((depo_reader.verify(found), {k for k, _, _ in found.queries}), (6, {8}))
    np.testing.assert_array_equal(made.valid, made.inputs != depo.PAD)


class StatisticsTest(parameterized.TestCase):
  """Against the released generator's reference sequences, and against what it was measured to draw."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.cfg = DepoConfig()
    cls.train = read(cls.cfg, draw(cls.cfg, size=2048))
    cls.test = read(cls.cfg, draw(cls.cfg, size=256, hops=4))

  def test_sizes_of_cycles(self):
    n = np.asarray([len(found.edges) for found in self.train])
    values = np.arange(3, 76)
    p = 1 / (values + np.sqrt(75))
    p /= p.sum()
    deviation = np.sqrt(p * (1 - p) / len(n))
    counted = np.bincount(n, minlength=76)[3:] / len(n)
    self.assertLess(np.max(np.abs(counted - p) / deviation), 4.5)
    self.assertAlmostEqual(n.mean(), 27.5, delta=4 * n.std() / np.sqrt(len(n)))
    theirs = [row["n"] for row in reference() if row["config"] == "variant_train"]
    spread = n.std() * np.sqrt(1 / len(n) + 1 / len(theirs))
    self.assertAlmostEqual(n.mean(), np.mean(theirs), delta=4 * spread)

  def test_lengths_of_names_and_contexts(self):
    lengths = np.asarray([sum(len(a) + len(b) for a, b in found.edges) for found in self.test])
    self.assertAlmostEqual((lengths / 150).mean(), 1.60, delta=0.01)  # measured to two decimals
    theirs = [row["context_len"] - 1 for row in reference() if row["config"] == "variant_test"]
    spread = lengths.std() * np.sqrt(1 / len(lengths) + 1 / len(theirs))
    self.assertAlmostEqual(lengths.mean(), np.mean(theirs), delta=4 * spread)

  def test_hops_are_even_and_walks_come_back_as_often_as_they_should(self):
    k = np.asarray([k for found in self.train for k, _, _ in found.queries])
    counted = np.bincount(k, minlength=17)[1:] / len(k)
    self.assertLess(np.abs(counted - 1 / 16).max(), 4.5 * np.sqrt(1 / 16 / len(k)))
    n = np.arange(3, 76)
    asked = np.minimum(n, 10) / (n + np.sqrt(75))
    home = np.sum(asked * (16 // n) / 16) / np.sum(asked)
    share = np.mean([start == answer for found in self.train for _, start, answer in found.queries])
    self.assertAlmostEqual(share, home, delta=0.006)

  def test_edges_starts_and_names_are_in_no_order(self):
    # an edge's successor in print is its successor on the cycle no more often than chance, 1 / 75 each
    follows = np.mean(
      [a[1] == b[0] for found in self.test for a, b in zip(found.edges, found.edges[1:], strict=False)]
    )
    self.assertAlmostEqual(follows, 1 / 75, delta=4.5 * np.sqrt(1 / 75 / (256 * 74)))
    place = np.asarray(
      [
        [source for source, _ in found.edges].index(start)
        for found in self.test
        for _, start, _ in found.queries
      ]
    )
    self.assertAlmostEqual(place.mean(), 37, delta=4.5 * 21.7 / np.sqrt(len(place)))
    # short names come first neither in print nor on the cycle
    first = np.mean([len(found.edges[0][0]) for found in self.test])
    self.assertAlmostEqual(first, 1.6, delta=4.5 * 0.49 / np.sqrt(len(self.test)))

  def test_single_names_follow_successive_draws(self):
    # two of six names with weights 1/4 and 1/8, by enumeration
    cfg = DepoConfig(
      max_nodes=2, min_nodes=2, mini_vocab=2, max_hops=1, test_hops=(1,), context_length=8, query_length=12
    )
    found = read(cfg, draw(cfg, size=4096, hops=1))
    likely = {(3,): 0.25, (4,): 0.25} | {(a, b): 0.125 for a in (1, 2) for b in (3, 4)}
    for name, w in likely.items():
      want = w + sum(v * w / (1 - v) for other, v in likely.items() if other != name)
      share = np.mean([any(name == source for source, _ in f.edges) for f in found])
      self.assertAlmostEqual(share, want, delta=4.5 * np.sqrt(want * (1 - want) / 4096))


class MistakesTest(parameterized.TestCase):
  @parameterized.parameters(
    ({"max_nodes": 7, "mini_vocab": 2}, "data.max_nodes: must be at most 6, the names that data.mini_vocab"),
    ({"test_hops": (1, 32)}, "data.test_hops: must lie in 1..16 (data.max_hops), got 32"),
    ({"test_hops": (0,)}, "data.test_hops: must lie in 1..16 (data.max_hops), got 0"),
    ({"test_hops": ()}, "data.test_hops: must name at least one k"),
    ({"test_hops": (2, 2)}, "data.test_hops: names a k twice"),
    ({"max_nodes": 76}, "data.context_length: must hold the 304 tokens of 76 edges, got 300"),
    ({"num_pairs": 11}, "data.query_length: must hold the 66 tokens of 11 questions, got 60"),
    ({"min_nodes": 80}, "data.max_nodes: must be at least 80, got 75"),
    ({"min_nodes": 1}, "data.min_nodes: must be at least 2, got 1"),
    ({"max_name": 0}, "data.max_name: must be at least 1, got 0"),
    ({"max_name": 4}, "data.mini_vocab: allows 6377550 names, at most 65536 can be drawn from"),
    ({"max_name": 2**31}, "data.max_name: must be at most 64, got 2147483648"),
    ({"max_hops": 2**31}, "data.max_hops: must be at most 65536, got 2147483648"),
    ({"mini_vocab": 10**400}, "data.mini_vocab: must be at most 2147483647, got a number of 401 digits"),
    ({"context_length": 2**31}, "data.context_length: must be at most 1048576, got 2147483648"),
    ({"held_out_seed": 2**32}, "data.held_out_seed: must be at most 4294967295, got 4294967296"),
    ({"sizes": "largst"}, "data.sizes: unknown value 'largst'; did you mean \"largest\"?"),
    ({"pads": "skip"}, "data.pads: unknown value 'skip'"),
  )
  def test_what_cannot_be_is_one_line(self, changes, message):
    with self.assertRaises(ConfigError) as caught:
      DepoConfig(**changes)
    self.assertIn(message, str(caught.exception))
    self.assertNotIn("\n", str(caught.exception))

  @parameterized.parameters(
    (80, "model.window: must divide data.context_length = 300"),
    (50, "model.window: must hold the 60 tokens of the questions (data.query_length), got 50"),
  )
  def test_windows_that_do_not_fit(self, window, message):
    with self.assertRaisesRegex(ConfigError, message.replace("(", r"\(").replace(")", r"\)")):
      depo.check_window(DepoConfig(), window)
    depo.check_window(DepoConfig(), 75)

  def test_a_question_outside_the_trained_range(self):
    with self.assertRaisesRegex(ConfigError, r"hops: must lie in 1..16 \(data.max_hops\), got 17"):
      depo.batch(DepoConfig(), jax.random.key(0), jnp.int32(0), 1, hops=17)
