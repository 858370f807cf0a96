"""The config of a test of memory, and what follows from it: words, sizes and the sets of an evaluation."""

import dataclasses
import functools
from typing import Annotated, ClassVar, Literal, get_args

from sleep_jax.config import Bounds, Seed, check, check_fields, shown
from sleep_jax.data import limits
from sleep_jax.data.memory import babi, counting, lookup
from sleep_jax.data.memory.story import Shape, Test, Words

MOST_WORDS = 1 << 16  # of a kind: words are drawn from a table of all of them
MOST_SETS = 32  # pairs of a depth and a length: each is traced by itself
Task = Literal[
  "needle", "recall", "overwriting", "tracking", "common", "frequent",
  "babi1", "babi2", "babi3", "babi4", "babi5",
]  # fmt: skip
TESTS: dict[str, Test] = {
  "needle": lookup.NEEDLE,
  "recall": lookup.RECALL,
  "overwriting": lookup.OVERWRITING,
  "tracking": lookup.TRACKING,
  "common": counting.COMMON,
  "frequent": counting.FREQUENT,
  **babi.BABI,
}
assert tuple(TESTS) == get_args(Task)
Size = Annotated[int, Bounds(least=1), Bounds(most=MOST_WORDS)]
Few = Annotated[int, Bounds(least=1), Bounds(most=1024)]


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
  """The test. Fields from `values` on mean something to some tasks only, and are refused with the others.

  Attributes:
    task: which test; docs/memory.md says what each asks.
    depths: how hard, one or several: needle: keys; recall: pairs; overwriting: times that each key is
      written; tracking: copies between the number and the last variable; common, frequent: words to name;
      babi1 to
      babi5: facts. Training draws one of them evenly; the evaluation has a set for each.
    lengths: tokens of the context, one or several, drawn and tested likewise. Shorter contexts are padded on
      the left; no token attends to a pad and it leaves S unchanged.
    queries: questions at the end of a sequence.
    words: different words of each kind.
    fillers: different words of the filler, drawn evenly.
    held_out_seed: seed of the evaluation sets, which are the same for every run.
    values: needle: values of each key, all to be named.
    keys: overwriting: keys that are written.
    chains: tracking: chains of copies side by side.
    asked: tracking: `variables`: those that got a number, from the first on; `value`: the number of the last.
    often: common: times that each word to be named occurs.
    seldom: common: times that each other word occurs.
    persons: babi1, 2, 3 and 5: persons of the world.
    places: babi1 to babi4: its places.
    objects: babi2, 3 and 5: its objects.
  """

  PATH: ClassVar[str] = "data"

  task: Task = "recall"
  depths: tuple[int, ...] = (4,)
  lengths: tuple[int, ...] = (24,)
  queries: Few = 1
  words: Size = 16
  fillers: Size = 8
  held_out_seed: Seed = 1_000_003
  values: Size = 1
  keys: Size = 4
  chains: Size = 1
  asked: Literal["variables", "value"] = "variables"
  often: Size = 30
  seldom: Size = 3
  persons: Few = 4
  places: Few = 6
  objects: Few = 3

  def __post_init__(self):
    check_fields(self)
    self._check_own_fields()
    self._check_sets()
    for depth, length in self.sets:
      self._check_set(depth, length)

  def _check_own_fields(self) -> None:
    usual = {field.name: field.default for field in dataclasses.fields(self)}
    for name in sorted({name for test in TESTS.values() for name in test.fields} - set(self.test.fields)):
      check(
        getattr(self, name) == usual[name],
        f"data.{name}",
        f"means nothing to data.task = {self.task}; leave it at {usual[name]}, got {getattr(self, name)}",
      )

  def _check_sets(self) -> None:
    for name, values, least, most in (
      ("depths", self.depths, self.test.least, MOST_WORDS),
      ("lengths", self.lengths, 1, limits.LENGTH),
    ):
      check(len(values) > 0, f"data.{name}", "must name at least one")
      check(len(set(values)) == len(values), f"data.{name}", f"names one twice: {shown(values)}")
      for value in values:
        check(least <= value <= most, f"data.{name}", f"must lie in {least}..{most}, got {shown(value)}")
    count = len(self.depths) * len(self.lengths)
    check(
      count <= MOST_SETS,
      "data.depths",
      f"and data.lengths make {count} sets, at most {MOST_SETS} can be tested at once",
    )

  def _check_set(self, depth: int, length: int) -> None:
    for kind, count in self.test.needs(self, depth, length).items():
      field = self.test.kinds[kind]
      check(
        count <= getattr(self, field),
        f"data.{field}",
        f"must be at least {count}, the different {kind}s of a sequence with {depth} {self.test.depth},"
        f" got {getattr(self, field)}",
      )
    most, because = self.test.most_queries(self, depth)
    check(self.queries <= most, "data.queries", f"must be at most {most}, {because}, got {self.queries}")
    tokens = self.shape(depth, length).statements * self.shape(depth, length).words
    check(
      tokens <= length,
      "data.lengths",
      f"must hold the {tokens} tokens of {depth} {self.test.depth}, got {length}",
    )
    check(
      self.length <= limits.LENGTH,
      "data.queries",
      f"and answers make sequences of {self.length} tokens, at most {limits.LENGTH}",
    )

  @property
  def test(self) -> Test:
    """What the task is."""
    return TESTS[self.task]

  @property
  def sets(self) -> list[tuple[int, int]]:
    """(depth, length) of each held-out set, in order."""
    return [(depth, length) for depth in self.depths for length in self.lengths]

  def shape(self, depth: int, length: int) -> Shape:
    """Sizes of the stories of one set."""
    return self.test.shape(self, depth, length)

  @property
  def context(self) -> int:
    """Tokens before the questions."""
    return max(self.lengths)

  @property
  def question(self) -> int:
    """P, tokens of a question."""
    return max(self.shape(*of).question for of in self.sets)

  @property
  def answer(self) -> int:
    """A, tokens of the longest answer."""
    return max(self.shape(*of).answer for of in self.sets)

  @property
  def asking(self) -> int:
    """Tokens of all questions and answers."""
    return self.queries * (self.question + self.answer)

  @property
  def length(self) -> int:
    """T, tokens of a sequence."""
    return self.context + self.asking

  @property
  def padded(self) -> bool:
    """Whether any sequence has pads."""
    shapes = {(self.shape(*of).question, self.shape(*of).answer) for of in self.sets}
    return len(set(self.lengths)) > 1 or len(shapes) > 1 or self.test.blanks

  @property
  def vocabulary(self) -> Words:
    """The token ids of this config."""
    return _vocabulary(self)

  @property
  def vocab_size(self) -> int:
    """PAD, marks, filler and words."""
    return self.vocabulary.count

  def chance(self, depth: int, length: int) -> float:
    """How often the best guess at one question of a set is right, whatever the text says."""
    return self.test.chance(self, depth, length)


@functools.lru_cache(maxsize=64)
def _vocabulary(cfg: MemoryConfig) -> Words:
  test = cfg.test
  marks = {name: i for i, name in enumerate(test.marks, 1)}
  kinds, start = {}, 1 + len(marks)
  for kind, field in {"filler": "fillers", **test.kinds}.items():
    kinds[kind] = range(start, start + getattr(cfg, field))
    start = kinds[kind].stop
  return Words(marks, kinds)
