"""From examples of unequal length to batches of few static shapes: a pure function of the step.

Algorithm 1 cuts a sequence from its start into windows of L tokens. Only the last window, which answers, is
shorter. It alone is padded, on its left, to one of a few lengths.

    windows   prompt[0:L] | prompt[L:2L] | PAD ... rest of the prompt, answer[:-1], PAD to `answer_tokens`

The last token of the prompt stands at a fixed place, `answer_tokens` from the end, and predicts the first
token of the answer. A shorter answer has pads behind it, which count nowhere; pads in front are as if they
were not there. If a regular cut would part the prompt's last token from its answer, the cut is made before
that token instead, and the window before it is padded on its left.

Batches are made globally. The examples of `bucket_batches` batches form a group: they are sorted by length,
cut into batches, and these are put in an order drawn from the seed. Every host computes the same plan and
takes its rows, so nothing depends on how many processes take part.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol

import grain
import numpy as np

from sleep_jax.config import Bounds, Count, at_least, check, check_fields
from sleep_jax.data import limits

PAD = 0


class Example(NamedTuple):
  """Prompt [p >= 1] and answer [a >= 1] as token ids, and the index of the group it is scored in."""

  prompt: np.ndarray
  answer: np.ndarray
  group: int = 0


class HeldOut(NamedTuple):
  """Examples of an evaluation, and baselines: name -> whether the baseline is right, one bool an example."""

  examples: Sequence[Example]
  guesses: Mapping[str, Sequence[bool]] = MappingProxyType({})


class Source(Protocol):
  """Random access to examples, the same in every process. Worker processes get a pickled copy."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class Epochs:
  """Reads a source again and again, each time as a whole and in another order.

  Attributes:
    source: the examples of one epoch.
    num: examples in all; the last epoch may be cut short.
    seed: names the orders. The first epoch keeps the source's order.
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
  """Shapes of batches.

  Attributes:
    max_tokens: the longest prompt and answer together.
    answer_tokens: the longest answer.
    tails: lengths that the last window may be padded to, besides L; each holds an answer. More lengths waste
      less padding and take longer to compile.
    bucket_batches: batches in a group, whose examples are sorted by length together.
  """

  PATH: ClassVar[str] = "data.cut"

  max_tokens: Annotated[int, Bounds(most=limits.LENGTH)]
  answer_tokens: Count = 8
  tails: tuple[int, ...] = ()
  bucket_batches: Annotated[int, Bounds(least=1), Bounds(most=limits.GROUPED)] = 8

  def __post_init__(self):
    check_fields(self)
    at_least(self.max_tokens, self.answer_tokens + 1, "data.cut.max_tokens")
    for tail in self.tails:
      at_least(tail, self.answer_tokens, "data.cut.tails")


class Bucket(NamedTuple):
  """A static shape: so many full windows, then one of `tail` tokens."""

  windows: int
  tail: int


class Planned(NamedTuple):
  """A batch of one bucket.

  Attributes:
    bucket: its shape.
    rows: `inputs`, `targets`, `loss_mask`, `valid` [rows, T] and `group` [rows] of this host.
    padding: share of positions of the *global* batch that hold no token.
  """

  bucket: Bucket
  rows: dict[str, np.ndarray]
  padding: float


def tail_lengths(cut: CutConfig, window: int) -> tuple[int, ...]:
  """Returns the lengths that a last window may have, ascending.

  Raises:
    ConfigError: if one of them, or an answer, is longer than the window.
  """
  at_least(window, cut.answer_tokens, "model.window")
  for tail in cut.tails:
    check(tail <= window, "data.cut.tails", f"must be at most model.window = {window}, got {tail}")
  return tuple(sorted({*cut.tails, window}))


def check_window(cut: CutConfig, window: int) -> None:
  """Raises `ConfigError` unless windows of this length fit the sequences, and tails and answers fit them."""
  check(
    window <= cut.max_tokens,
    "model.window",
    f"must be at most data.cut.max_tokens = {cut.max_tokens}, the longest sequence, got {window}",
  )
  tail_lengths(cut, window)


def bucket_of(example: Example, cut: CutConfig, window: int) -> Bucket:
  """Returns the smallest shape that holds an example.

  Raises:
    ValueError: if the example is too long, or has no prompt or answer.
  """
  p, a = len(example.prompt), len(example.answer)
  if not (p and 1 <= a <= cut.answer_tokens and p + a <= cut.max_tokens):
    raise ValueError(
      f"an example needs a prompt, 1 to {cut.answer_tokens} answer tokens and at most {cut.max_tokens} tokens"
      f" in all; got {p} + {a}"
    )
  windows, rest = divmod(p - 1, window)
  needed = rest + cut.answer_tokens
  if needed > window:  # the answer does not fit behind the rest of the prompt: it gets a window to itself
    windows, needed = windows + 1, cut.answer_tokens
  return Bucket(windows, next(tail for tail in tail_lengths(cut, window) if tail >= needed))


def layout(bucket: Bucket, cut: CutConfig, window: int) -> np.ndarray:
  """Returns where the loss may be: [T] bool, the last `answer_tokens` positions."""
  length = bucket.windows * window + bucket.tail
  return np.arange(length) >= length - cut.answer_tokens


def place(example: Example, bucket: Bucket, cut: CutConfig, window: int) -> dict[str, np.ndarray]:
  """Returns one row of a batch: an example in a bucket that holds it."""
  context, answer_length = np.asarray(example.prompt[:-1], np.int32), len(example.answer)
  length = bucket.windows * window + bucket.tail
  answer_start = length - cut.answer_tokens
  inputs, targets = (np.full(length, PAD, np.int32) for _ in range(2))
  valid, mask = np.zeros(length, bool), np.zeros(length, np.float32)

  full = bucket_of(example, cut, window).windows  # the example's own windows before the last one
  skipped = bucket.windows - full  # in a batch of longer examples the first windows are empty
  parts = [
    (context[: full * window][i * window : (i + 1) * window], (skipped + i + 1) * window) for i in range(full)
  ]
  parts.append((context[full * window :], answer_start))
  for part, end in parts:
    inputs[end - len(part) : end] = part
    valid[end - len(part) : end] = True

  answered = slice(answer_start, answer_start + answer_length)
  inputs[answered], valid[answered] = [example.prompt[-1], *example.answer[:-1]], True
  targets[answered], mask[answered] = example.answer, 1.0
  return {
    "inputs": inputs,
    "targets": targets,
    "loss_mask": mask,
    "valid": valid,
    "group": np.asarray(example.group, np.int32),
  }


class BatchPlan:
  """The batches of a run, in groups: item g holds those of the steps from g * bucket_batches on.

  Random access without hidden state, so that a run resumes at any step and any process can make any group.
  """

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
      source: examples in training order.
      cut: shapes of the batches.
      window: L.
      batch_size: rows of all hosts together.
      steps: batches of the run; the last group is made whole.
      seed: of the order of the batches in a group.
      host, hosts: index of this process, and how many there are.

    Raises:
      ConfigError: if window, batch size or number of examples do not fit.
    """
    tail_lengths(cut, window)
    check(
      batch_size % hosts == 0, "train.batch_size", f"must be a multiple of {hosts} hosts, got {batch_size}"
    )
    self._source, self._cut, self._window, self._batch = source, cut, window, batch_size
    self._num_groups, self._seed = -(-steps // cut.bucket_batches), seed
    self._rows = slice(host * batch_size // hosts, (host + 1) * batch_size // hosts)
    needed = self._num_groups * cut.bucket_batches * batch_size
    check(len(source) >= needed, "train.steps", f"needs {needed} examples, the source has {len(source)}")

  def __len__(self) -> int:
    return self._num_groups

  def __getitem__(self, group: int) -> list[Planned]:
    if not 0 <= group < self._num_groups:
      raise IndexError(f"group {group} of {self._num_groups}")
    count, size = self._cut.bucket_batches, self._batch
    examples = [self._source[i] for i in range(group * count * size, (group + 1) * count * size)]
    if count > 1:
      examples.sort(key=lambda example: bucket_of(example, self._cut, self._window))
    rng = np.random.default_rng((self._seed, group))
    return [self._planned(examples[i * size : (i + 1) * size]) for i in rng.permutation(count)]

  def _planned(self, examples: list[Example]) -> Planned:
    buckets = [bucket_of(example, self._cut, self._window) for example in examples]
    bucket = Bucket(max(b.windows for b in buckets), max(b.tail for b in buckets))
    rows = [place(example, bucket, self._cut, self._window) for example in examples[self._rows]]
    tokens = sum(len(e.prompt) + len(e.answer) - 1 for e in examples)
    positions = len(examples) * (bucket.windows * self._window + bucket.tail)
    return Planned(
      bucket, {name: np.stack([r[name] for r in rows]) for name in rows[0]}, 1 - tokens / positions
    )


class WorkerError(RuntimeError):
  """A worker process ended before its work did."""


def feed(
  plan: BatchPlan, cut: CutConfig, start: int, *, threads: int = 1, workers: int = 0
) -> Iterator[Planned]:
  """Yields the batches from step `start` on, made ahead in threads or worker processes.

  The batches are the same whoever makes them. Nothing before the group of step `start` is made. Worker
  processes need parsed absl flags (`FLAGS.mark_as_parsed()` outside `app.run`); closing the iterator ends
  them.

  Args:
    plan: of the run.
    cut: that of the plan.
    start: first step.
    threads: that make groups, where there are no workers.
    workers: processes that make groups; 0 for none.

  Raises:
    WorkerError: if a worker process is killed or dies. An exception of a source in a worker is raised
      unchanged.
  """
  first, skip = divmod(start, cut.bucket_batches)
  groups: Any = _BoxedGroups(plan)  # has what grain asks of a source
  data: Any = grain.MapDataset.source(groups)[first:].to_iter_dataset(
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
  """A group that grain passes on as one opaque object.

  Grain would move each array of a tree through shared memory. A container has little of it, and a worker
  that is killed leaves its share behind.
  """

  batches: list[Planned]


@dataclasses.dataclass(frozen=True)
class _BoxedGroups:
  plan: BatchPlan

  def __len__(self) -> int:
    return len(self.plan)

  def __getitem__(self, group: int) -> _Box:
    return _Box(self.plan[group])
