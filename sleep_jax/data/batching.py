"""From examples of unequal length to batches of few static shapes: a pure function of the step.

Algorithm 1 cuts a sequence from its start into windows of L tokens. Only the last window, which answers, is
shorter; it alone is padded, on its own left, to one of a few lengths (`align = "start"`). `align = "end"`
pads the whole sequence on the left instead, which moves every cut.

    windows   prompt[0:L] | prompt[L:2L] | PAD ... rest of the prompt, answer[:-1], PAD to `answer_tokens`

The last token of the prompt stands at a fixed place, `answer_tokens` from the end, and predicts the first
token of the answer; a shorter answer has pads behind it, which count nowhere. Where a regular cut would
part the prompt's last token from its answer, the cut is made before that token, and the window before it is
padded on its left.

Batches are made globally: `bucket_batches` batches together are sorted by length, cut, and put in an order
drawn from the seed. Every host finds the same plan and takes its rows. Nothing depends on how many
processes take part.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import grain
import numpy as np

from sleep_jax.config import Count, at_least, check, check_fields

PAD = 0


class Example(NamedTuple):
  """Prompt [p >= 1] and answer [a >= 1] in token ids, and the group that the answer is scored in."""

  prompt: np.ndarray
  answer: np.ndarray
  group: int = 0


class HeldOut(NamedTuple):
  """A set of examples that an evaluation asks, and baselines: name -> whether it is right, one an example."""

  examples: Sequence[Example]
  guesses: Mapping[str, Sequence[bool]] = MappingProxyType({})


class Source(Protocol):
  """Any example at once, in any process; pickled to the workers."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class Epochs:
  """A source read again and again, each time as a whole, in an order of its own.

  Attributes:
    source: of one epoch.
    num: examples in all; the last epoch may be cut short.
    seed: of the orders. The first epoch is in the source's own.
  """

  source: Source
  num: int
  seed: int

  def __len__(self) -> int:
    return self.num

  def __getitem__(self, index: int) -> Example:
    if not 0 <= index < self.num:
      raise IndexError(f"example {index} of {self.num}")
    epoch, i = divmod(int(index), len(self.source))
    return self.source[i if epoch == 0 else int(_order(len(self.source), self.seed, epoch)[i])]


@functools.lru_cache(maxsize=4)
def _order(size: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.default_rng((seed, epoch)).permutation(size)


@dataclasses.dataclass(frozen=True)
class CutConfig:
  """Shapes.

  Attributes:
    max_tokens: the most that prompt and answer together may have.
    answer_tokens: the most that an answer may have.
    tails: lengths that the last window may be padded to, besides L; each holds an answer. More of them
      waste less and compile longer.
    align: which end of a sequence the windows are cut from, `start` or `end`.
    bucket_batches: batches that are sorted by length together.
  """

  PATH: ClassVar[str] = "data.cut"

  max_tokens: int
  answer_tokens: Count = 8
  tails: tuple[int, ...] = ()
  align: Literal["start", "end"] = "start"
  bucket_batches: Count = 8

  def __post_init__(self):
    check_fields(self)
    at_least(self.max_tokens, self.answer_tokens + 1, "data.cut.max_tokens")
    for tail in self.tails:
      at_least(tail, self.answer_tokens, "data.cut.tails")


class Bucket(NamedTuple):
  """A static shape: full windows, then one of `tail` tokens."""

  windows: int
  tail: int


class Planned(NamedTuple):
  """A batch of one bucket: rows of `inputs`, `targets`, `loss_mask`, `valid` and `group`; and its padding.

  `padding` is the share of positions of the *global* batch that hold no token.
  """

  bucket: Bucket
  rows: dict[str, np.ndarray]
  padding: float


def tails(cut: CutConfig, window: int) -> tuple[int, ...]:
  """Lengths of a last window, ascending.

  Raises:
    ConfigError: if one is longer than the window, or an answer is.
  """
  at_least(window, cut.answer_tokens, "model.window")
  for tail in cut.tails:
    check(tail <= window, "data.cut.tails", f"must be at most model.window = {window}, got {tail}")
  return tuple(sorted({*cut.tails, window}))


def bucket_of(example: Example, cut: CutConfig, window: int) -> Bucket:
  """The smallest shape that holds an example.

  Raises:
    ValueError: if it is too long, or has no prompt or answer.
  """
  p, a = len(example.prompt), len(example.answer)
  if not (p and 1 <= a <= cut.answer_tokens and p + a <= cut.max_tokens):
    raise ValueError(
      f"an example needs a prompt, 1 to {cut.answer_tokens} answer tokens and at most {cut.max_tokens} tokens"
      f" in all; got {p} + {a}"
    )
  windows, rest = divmod(p - 1, window)
  needed = rest + cut.answer_tokens
  if needed > window:  # the answer would not fit behind the rest: it gets a window of its own
    windows, needed = windows + 1, cut.answer_tokens
  return Bucket(windows, next(t for t in tails(cut, window) if t >= needed))


def layout(bucket: Bucket, cut: CutConfig, window: int) -> np.ndarray:
  """Where the loss may be: [T] bool, the last `answer_tokens` positions."""
  length = bucket.windows * window + bucket.tail
  return np.arange(length) >= length - cut.answer_tokens


def place(example: Example, bucket: Bucket, cut: CutConfig, window: int) -> dict[str, np.ndarray]:
  """One row of a batch: an example in a bucket that holds it."""
  context, A, a = np.asarray(example.prompt[:-1], np.int32), cut.answer_tokens, len(example.answer)
  full = bucket.windows * window
  length = full + bucket.tail
  room = length - A
  inputs, targets = (np.full(length, PAD, np.int32) for _ in range(2))
  valid, mask = np.zeros(length, bool), np.zeros(length, np.float32)
  own = bucket_of(example, cut, window).windows  # windows before the last one, by the example's own cut
  if cut.align == "end":
    parts = [(context, room)]
  else:
    parts = [(context[: own * window][i * window : (i + 1) * window], None) for i in range(own)]
    skip = bucket.windows - own  # in a batch of longer ones its first windows are empty
    parts = [(part, (skip + i + 1) * window) for i, (part, _) in enumerate(parts)]
    parts.append((context[own * window :], room))
  for part, end in parts:
    inputs[end - len(part) : end] = part
    valid[end - len(part) : end] = True
  answered = [example.prompt[-1], *example.answer[:-1]]
  inputs[room : room + a], valid[room : room + a] = answered, True
  targets[room : room + a], mask[room : room + a] = example.answer, 1.0
  return {
    "inputs": inputs,
    "targets": targets,
    "loss_mask": mask,
    "valid": valid,
    "group": np.int32(example.group),
  }


class Blocks:
  """Blocks of planned batches: item b holds steps b * bucket_batches and on. Random access, no state."""

  def __init__(
    self,
    source: Source,
    cut: CutConfig,
    *,
    window: int,
    batch_size: int,
    steps: int,
    seed: int,
    host: int = 0,
    hosts: int = 1,
  ):
    """Checks that everything fits.

    Args:
      batch_size: of all hosts together.
      steps: of the run; the last block is made whole.
      host, hosts: this process, and how many there are.
    """
    tails(cut, window)
    check(
      batch_size % hosts == 0, "train.batch_size", f"must be a multiple of {hosts} hosts, got {batch_size}"
    )
    self._source, self._cut, self._window, self._batch = source, cut, window, batch_size
    self._count, self._seed = -(-steps // cut.bucket_batches), seed
    self._rows = slice(host * batch_size // hosts, (host + 1) * batch_size // hosts)
    needed = self._count * cut.bucket_batches * batch_size
    check(len(source) >= needed, "train.steps", f"needs {needed} examples, the source has {len(source)}")

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, block: int) -> list[Planned]:
    if not 0 <= block < self._count:
      raise IndexError(f"block {block} of {self._count}")
    M, B, cut, window = self._cut.bucket_batches, self._batch, self._cut, self._window
    examples = [self._source[i] for i in range(block * M * B, (block + 1) * M * B)]
    own = [bucket_of(example, cut, window) for example in examples]
    order = sorted(range(M * B), key=lambda i: own[i]) if M > 1 else range(B)
    batches = [list(order)[i * B : (i + 1) * B] for i in range(M)]
    rng = np.random.default_rng((self._seed, block))
    return [self._planned([examples[i] for i in batches[m]]) for m in rng.permutation(M)]

  def _planned(self, examples: list[Example]) -> Planned:
    own = [bucket_of(example, self._cut, self._window) for example in examples]
    bucket = Bucket(max(b.windows for b in own), max(b.tail for b in own))
    rows = [place(example, bucket, self._cut, self._window) for example in examples[self._rows]]
    tokens = sum(len(e.prompt) + len(e.answer) - 1 for e in examples)
    size = len(examples) * (bucket.windows * self._window + bucket.tail)
    return Planned(bucket, {name: np.stack([r[name] for r in rows]) for name in rows[0]}, 1 - tokens / size)


class WorkerError(RuntimeError):
  """A worker process ended before its work did."""


def feed(
  blocks: Blocks, cut: CutConfig, start: int, *, threads: int = 1, workers: int = 0
) -> Iterator[Planned]:
  """Planned batches from step `start` on, made ahead in threads or worker processes; the same in any case.

  Nothing before the block of step `start` is made. Worker processes need parsed absl flags
  (`FLAGS.mark_as_parsed()` outside `app.run`); closing the iterator ends them.

  Raises:
    WorkerError: if a worker process is killed or dies; what a source raises in a worker is raised as it is.
  """
  first, skip = divmod(start, cut.bucket_batches)
  data: Any = grain.MapDataset.source(_Boxed(blocks))[first:].to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, 1))
  )
  if workers:
    data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1))
  made = iter(data)
  try:
    for box in made:
      yield from box.batches[skip:]
      skip = 0
  except RuntimeError as e:
    died = _DIED.match(str(e))
    if not died:
      raise
    raise WorkerError(
      f"data.workers: a worker process that makes batches died (exit code {died[1]}: killed, or out of"
      " memory?); the same command goes on from the last checkpoint"
    ) from None
  finally:
    made.close()


_DIED = re.compile(r"Worker process was terminated unexpectedly with exit code (-?\d+)")  # grain's words


@dataclasses.dataclass(frozen=True)
class _Box:
  """A block that grain takes for one thing.

  It would move each array of a tree through shared memory, of which a container has little, and which a
  worker that is killed leaves behind.
  """

  batches: list[Planned]


@dataclasses.dataclass(frozen=True)
class _Boxed:
  blocks: Blocks

  def __len__(self) -> int:
    return len(self.blocks)

  def __getitem__(self, block: int) -> _Box:
    return _Box(self.blocks[block])
