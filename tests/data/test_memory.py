"""Tests of memory: every answer as a reader of the tokens finds it, the laws of places, sizes and answers."""

import collections
import functools
import math

import jax
import numpy as np
import pytest

from sleep_jax import windows
from sleep_jax.config import ConfigError
from sleep_jax.data import memory
from sleep_jax.data.memory import MemoryConfig, counting
from tests import hybrids
from tests.data import memory_reader as reader

CONFIGS = {
  "needle": MemoryConfig(task="needle", depths=(1, 3), lengths=(12, 20), values=2, words=7, fillers=3),
  "recall": MemoryConfig(task="recall", depths=(4, 6), lengths=(12, 20), queries=3, words=9),
  "overwriting": MemoryConfig(
    task="overwriting", depths=(1, 3), lengths=(18, 24), keys=3, queries=2, words=10
  ),
  "tracking": MemoryConfig(task="tracking", depths=(0, 3), lengths=(16, 22), chains=2, queries=2, words=9),
  "hops": MemoryConfig(
    task="tracking", depths=(0, 3), lengths=(16, 22), chains=2, queries=2, words=9, asked="value"
  ),
  "common": MemoryConfig(task="common", depths=(1, 2), lengths=(20, 30), often=5, seldom=2, words=8),
  "frequent": MemoryConfig(task="frequent", depths=(1, 3), lengths=(36, 60), words=7),
  "babi1": MemoryConfig(task="babi1", depths=(1, 6), lengths=(12, 20), persons=3, places=4, queries=3),
  "babi2": MemoryConfig(task="babi2", depths=(2, 9), lengths=(27, 30), persons=3, places=4, queries=2),
  "babi3": MemoryConfig(task="babi3", depths=(3, 12), lengths=(36, 40), persons=2, places=3, queries=3),
  "babi4": MemoryConfig(task="babi4", depths=(2, 5), lengths=(15, 20), places=6, queries=2),
  "babi5": MemoryConfig(
    task="babi5", depths=(2, 8), lengths=(24, 30), persons=3, objects=2, queries=2
  ),
}  # fmt: skip
SIZE = 512

compiled = hybrids.jit(memory.batch, static_argnums=(0, 3, 4))


@functools.cache
def draw(name, seed=0, size=SIZE, step=0, of=None):
  """A batch of sequences as arrays."""
  return jax.tree.map(np.asarray, compiled(CONFIGS[name], jax.random.key(seed), step, size, of))


@functools.cache
def read(name):
  """The sequences of a batch as the reader finds them."""
  return [reader.read(CONFIGS[name], row) for row in draw(name).inputs]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_answer_is_what_the_text_says(name):
  cfg = CONFIGS[name]
  for found in read(name):
    for question, answer in found.asked:
      solved = reader.solve(cfg, found.context, question)
      assert answer == solved[: len(answer)], (found, question, answer)
      assert len(answer) == len(solved) or cfg.task == "frequent"  # which names no more than it is asked for
    assert len({question for question, _ in found.asked}) == len(found.asked)  # none twice


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_labels_and_windows(name):
  cfg, made = CONFIGS[name], draw(name)
  assert made.inputs.shape == (SIZE, cfg.length) and made.inputs.max() < cfg.vocab_size
  layout = memory.layout(cfg)
  assert layout.sum() == cfg.queries * cfg.answer and not layout[-1]
  drawn = collections.Counter()
  for row, found in enumerate(read(name)):
    depth, length = depth_of(cfg, found), len(found.context)
    drawn[depth, length] += 1
    shape = cfg.shape(depth, length)
    told = shape.statements * shape.words
    assert found.pads == max(cfg.lengths) - length
    assert sum(w[0] == "filler" for w in found.context) == length - told
    labels = np.flatnonzero(made.loss_mask[row])
    assert layout[labels].all()
    assert len(labels) == sum(len(answer) for _, answer in found.asked) > 0
    np.testing.assert_array_equal(made.targets[row][labels], made.inputs[row][labels + 1])
    said = [reader.word(cfg, t) for t in made.targets[row][labels]]
    assert said == [w for _, answer in found.asked for w in answer]
  assert set(drawn) == set(cfg.sets)
  for count in drawn.values():  # each set as often, in training
    assert abs(count / SIZE - 1 / len(cfg.sets)) < 4.5 * math.sqrt(0.25 * 0.75 / SIZE)
  np.testing.assert_array_equal(made.valid, made.inputs != 0)
  window = math.gcd(*cfg.lengths)
  if window >= cfg.asking:
    memory.check_window(cfg, window)
    plan = windows.plan(layout, window)
    assert plan[-1].start == cfg.context and plan[-1].count == 1
    np.testing.assert_array_equal(windows.answer_positions(plan), np.flatnonzero(layout))


def depth_of(cfg, found):
  """The depth of a sequence, from its context."""
  facts = reader.told(cfg, found.context)
  if cfg.task == "common":
    return len(found.asked[0][1])
  if cfg.task == "frequent":
    return len(found.asked[0][1])
  each = {"needle": cfg.values, "overwriting": cfg.keys, "tracking": cfg.chains}.get(cfg.task, 1)
  return len(facts) // each - (cfg.task == "tracking")


@pytest.mark.parametrize("name", CONFIGS)
def test_which_question_a_target_answers(name):
  cfg, made = CONFIGS[name], draw(name)
  where = memory.layout(cfg)
  got = np.asarray(memory.answer_of(cfg, made.targets[:, where], made.loss_mask[:, where]))
  for found, ids, targets in list(zip(read(name), got, made.targets[:, where], strict=True))[:50]:
    names = [tuple(reader.word(cfg, t) for t in targets[ids == q]) for q in range(cfg.queries)]
    assert [x for x in names if x] == [answer for _, answer in found.asked]


def guess(cfg, question, depth):
  """An answer that the question allows, whatever the text says; all such are equally good."""
  words = {w for w in question if isinstance(w, tuple)}
  free = lambda kind: ((kind, i) for i in range(99) if (kind, i) not in words)  # noqa: E731
  some = lambda kind, count: tuple(x for _, x in zip(range(count), free(kind), strict=False))  # noqa: E731
  if cfg.task == "needle":
    return some("value", cfg.values)
  if cfg.task in ("recall", "overwriting"):
    return some("value", 1)
  if cfg.task == "tracking":
    return some("number", 1) if cfg.asked == "value" else some("variable", depth + 1)
  if cfg.task in ("common", "frequent"):
    return some("word", depth)
  if cfg.task == "babi5":
    kind = {"to_whom": "person", "by_whom": "person", "what": "object"}.get(question[0], "person")
    return some(kind, 1)
  return some("place", 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_guess_is_right_as_often_as_it_says(name):
  """The first question alone: of the others a part is known, since some answers have been given."""
  cfg, right, asked = CONFIGS[name], collections.Counter(), collections.Counter()
  for found in read(name):
    if found.asked:
      question, answer = found.asked[0]
      of = depth_of(cfg, found), len(found.context)
      asked[of] += 1
      right[of] += guess(cfg, question, of[0]) == answer
  wanted = sum(n * cfg.chance(*of) for of, n in asked.items())
  spread = math.sqrt(sum(n * cfg.chance(*of) * (1 - cfg.chance(*of)) for of, n in asked.items()))
  assert abs(sum(right.values()) - wanted) < 4.5 * spread + 1e-9, (right, asked)


@pytest.mark.parametrize("name", CONFIGS)
def test_answers_are_even_over_the_words(name):
  counts = collections.Counter(w for found in read(name) for w in (found.asked[0][1] if found.asked else ()))
  for kind in {kind for kind, _ in counts}:
    size = len(CONFIGS[name].vocabulary.kinds[kind])
    members = [counts[kind, i] for i in range(size)]
    mean = sum(members) / size
    chi_squared = sum((n - mean) ** 2 for n in members) / mean
    assert chi_squared < size - 1 + 6 * math.sqrt(2 * size) + 8, (kind, members)


def test_statements_lie_anywhere_and_keep_their_order():
  cfg, made = MemoryConfig(task="needle", depths=(1,), lengths=(10,), words=4), 4096
  inputs = np.asarray(compiled(cfg, jax.random.key(5), 0, made, None).inputs)
  first = (np.isin(inputs[:, :10], cfg.vocabulary.kinds["key"])).argmax(axis=1)
  counts = np.bincount(first, minlength=9)
  assert len(counts) == 9  # the last place would part the needle
  assert np.abs(counts / made - 1 / 9).max() < 4.5 * math.sqrt(1 / 9 * 8 / 9 / made)
  # associative recall has its pairs first
  assert all(w[0] != "filler" for found in read("recall") for w in found.context[:8])
  assert any(found.context[0][0] == "filler" for found in read("babi1"))
  filler = collections.Counter(w for found in read("recall") for w in found.context if w[0] == "filler")
  total = sum(filler.values())
  assert set(filler) == {("filler", i) for i in range(8)}
  assert max(abs(n / total - 1 / 8) for n in filler.values()) < 4.5 * math.sqrt(1 / 8 * 7 / 8 / total)


def test_the_facts_are_the_same_at_every_length():
  cfg = CONFIGS["babi2"]
  short, long = ([reader.read(cfg, row) for row in draw("babi2", of=of, size=32).inputs] for of in (2, 3))
  assert [cfg.sets[of] for of in (2, 3)] == [(9, 27), (9, 30)]
  for a, b in zip(short, long, strict=True):
    assert (len(a.context), len(b.context)) == (27, 30)
    assert reader.told(cfg, a.context) == reader.told(cfg, b.context) and a.asked == b.asked


@pytest.mark.parametrize("name", ["recall", "babi3"])
def test_a_sequence_depends_on_seed_and_index_alone(name):
  parts = [draw(name, size=SIZE // 2, step=i).inputs for i in range(2)]
  np.testing.assert_array_equal(np.concatenate(parts), draw(name).inputs)


@pytest.mark.slow
def test_it_is_the_same_whether_compiled_or_not():
  eager = memory.batch(CONFIGS["recall"], jax.random.key(0), 1, 3)
  np.testing.assert_array_equal(eager.inputs, draw("recall").inputs[3:6])


def test_streams_of_different_seeds_share_nothing():
  seeds = (0, 1, MemoryConfig().held_out_seed)
  rows = [{tuple(row) for row in draw("recall", seed=seed, size=256).inputs} for seed in seeds]
  assert len(set.union(*rows)) == 3 * 256


def test_worlds_hold_all_kinds_of_events():
  verbs = collections.Counter(
    f[1] for found in read("babi3") for f in reader.told(CONFIGS["babi3"], found.context)
  )
  assert set(verbs) == {"move", "get", "drop"} and min(verbs.values()) > 300
  sides = collections.Counter(
    f[1] for found in read("babi4") for f in reader.told(CONFIGS["babi4"], found.context)
  )
  total = sum(sides.values())
  assert max(abs(n / total - 1 / 4) for n in sides.values()) < 0.05  # two sides are drawn for a whole walk
  marks = collections.Counter(q[0] for found in read("babi5") for q, _ in found.asked[:1])
  assert set(marks) == set(CONFIGS["babi5"].test.marks)
  more = [len(found.asked) for found in read("babi1")]
  assert {1, 2, 3} == set(more)  # as many persons as were named, three at most


def test_words_that_are_frequent_follow_the_law():
  n, words = 1000, 50
  counts = counting.occurrences(n, words)
  zeta = sum(k**-2.0 for k in range(1, 200_000))
  assert counts.tolist() == [c for k in range(1, words + 2) if (c := int(n / zeta / k**2))]
  cfg = CONFIGS["frequent"]
  for found in read("frequent")[:20]:
    told = collections.Counter(w for (w,) in reader.told(cfg, found.context))
    expected = counting.occurrences(len(found.context), cfg.words).tolist()
    assert sorted(told.values(), reverse=True) == expected[1:]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_vocabulary_is_parted_among_its_words(name):
  words = CONFIGS[name].vocabulary
  tokens = [*words.marks.values(), *(t for kind in words.kinds.values() for t in kind)]
  assert sorted(tokens) == list(range(1, CONFIGS[name].vocab_size))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"task": "needel"}, "data.task: unknown value 'needel'; did you mean \"needle\"?"),
    ({"task": "babi6"}, "data.task: unknown value 'babi6'; did you mean"),
    ({"depths": ()}, "data.depths: must name at least one"),
    ({"depths": (0,)}, "data.depths: must lie in 1..65536, got 0"),
    ({"depths": (2, 2)}, "data.depths: names one twice: (2, 2)"),
    ({"depths": (17,), "lengths": (99,)}, "data.words: must be at least 17, the different keys of a"),
    ({"depths": (13,)}, "data.lengths: must hold the 26 tokens of 13 pairs, got 24"),
    ({"lengths": (24, 7)}, "data.lengths: must hold the 8 tokens of 4 pairs, got 7"),
    ({"lengths": (2**21,)}, "data.lengths: must lie in 1..1048576, got 2097152"),
    ({"queries": 5}, "data.queries: must be at most 4, the least of data.depths, got 5"),
    ({"values": 2}, "data.values: means nothing to data.task = recall; leave it at 1, got 2"),
    ({"task": "needle", "values": 5}, "data.words: must be at least 20, the different values"),
    ({"task": "overwriting", "queries": 5}, "data.queries: must be at most 4, data.keys, got 5"),
    ({"task": "tracking", "depths": (16,), "lengths": (40,)}, "data.words: must be at least 17"),
    ({"task": "common"}, "data.lengths: must hold 4 words 30 times and others 3 times, at least 123 tokens"),
    ({"task": "common", "often": 3}, "data.often: must be above data.seldom = 3"),
    ({"task": "frequent", "queries": 2, "depths": (1,), "lengths": (60,)}, "data.queries: must be at most 1"),
    ({"task": "frequent", "depths": (3,)}, "data.lengths: must be longer for the 3 commonest words"),
    ({"task": "frequent", "depths": (20,)}, "data.words: must be at least 20"),
    ({"task": "babi2", "depths": (1,)}, "data.depths: must lie in 2..65536, got 1"),
    ({"task": "babi2", "persons": 1}, "data.persons: must be at least 2"),
    ({"task": "babi4", "depths": (6,)}, "data.places: must be at least 7"),
    ({"task": "babi5", "depths": (9,)}, "data.lengths: must hold the 27 tokens of 9 facts"),
    ({"depths": tuple(range(1, 12)), "lengths": (22, 23, 24)}, "data.depths: and data.lengths make 33 sets"),
  ],
)
def test_what_cannot_be_is_one_line(changes, message):
  with pytest.raises(ConfigError) as caught:
    MemoryConfig(**changes)
  assert message in str(caught.value) and "\n" not in str(caught.value)


def test_windows_that_do_not_fit():
  cfg = MemoryConfig(depths=(4,), lengths=(24,), queries=4)
  with pytest.raises(ConfigError, match="^model.window: must divide 24, the longest of data.lengths"):
    memory.check_window(cfg, 10)
  with pytest.raises(ConfigError, match="^model.window: must hold the 8 tokens of the questions"):
    memory.check_window(cfg, 6)
  memory.check_window(cfg, 8)
