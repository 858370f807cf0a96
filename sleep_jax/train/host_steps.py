"""Training on batches that the host makes: one compiled step a shape, the next batches already on the device.

A thread takes planned batches from `batching.feed` and puts them where the mesh wants them, while the device
runs the step before. Position = step: a run that resumes asks for its next step's batch, and nothing else of
the data is remembered.
"""

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np

from sleep_jax import model, sharding, windows
from sleep_jax.config import Config, check
from sleep_jax.cost import flops, need
from sleep_jax.data import batching
from sleep_jax.runtime import progress
from sleep_jax.scoring import by_group
from sleep_jax.train.recorder import Load, Recorder
from sleep_jax.train.task import Measured, OneStep, Row, against_constant, compile_step

AHEAD = 2  # batches on the device that no step has taken yet
TRACED_SEQUENCES = 16  # held-out sequences on which the work of sleep is recorded at the end


@dataclasses.dataclass(frozen=True)
class HostTask:
  """What is learnt, from examples of unequal length that the host makes. A `task.Task`.

  Attributes:
    source: training examples, as many as the run takes.
    cut: their shapes.
    held_out: sets of the evaluation, by name. The first is the run's score; the rows' keys of the others
      begin with their names.
    groups: names of the groups that answers are scored in; `Example.group` is an index of it.
    threads, workers: that make examples, as in `batching.feed`.
    describe: row -> the line about an evaluation.
  """

  source: batching.Source
  cut: batching.CutConfig
  held_out: Mapping[str, batching.HeldOut]
  groups: Sequence[str]
  threads: int = 1
  workers: int = 0
  describe: Callable[[Row], str] = against_constant

  def check(self, cfg: Config) -> None:
    """See `task.Task`."""
    check_fits(cfg, self.cut)
    check_size(cfg, self.cut)

  def steps(self, cfg: Config, one_step: OneStep, mesh: jax.sharding.Mesh) -> "HostSteps":
    """See `task.Task`."""
    return HostSteps(cfg, self, one_step, mesh)

  def score(self, row: Row) -> str:
    """See `task.Task`."""
    return self.describe(row)


def check_fits(cfg: Config, cut: batching.CutConfig) -> None:
  """Refuses what only a host-fed run refuses; to be called before a workdir is made.

  Raises:
    ConfigError: where the window is longer than any sequence, a tail or an answer does not fit into it, or
      the device is to run several steps a call.
  """
  batching.check_window(cut, cfg.model.window)
  check(
    cfg.train.steps_per_dispatch == 1,
    "train.steps_per_dispatch",
    f"must be 1 where the host makes the batches, got {cfg.train.steps_per_dispatch}",
  )


def check_size(cfg: Config, cut: batching.CutConfig) -> None:
  """Raises `ConfigError` where the longest sequences need more memory than there is."""
  need.check(cfg, cut.max_tokens, grouped=cut.bucket_batches)


def check_tokens(cfg: Config, *tokens: np.ndarray) -> None:
  """Refuses tokens that the vocabulary lacks: on a device a look-up would take another row without a word.

  Raises:
    ConfigError: naming the least and the largest token.
  """
  low, high = min(int(x.min()) for x in tokens), max(int(x.max()) for x in tokens)
  check(
    0 <= low and high < cfg.model.vocab_size,
    "model.vocab_size",
    f"is {cfg.model.vocab_size}, but the data has tokens {low}..{high}",
  )


class Prefetch:
  """Items made ahead in a thread. A context manager; what the thread raises is raised by `next`.

  Args:
    items: consumed in the thread.
    ahead: items that wait at most.
  """

  def __init__(self, items: Iterable[Any], ahead: int):
    self._queue: queue.Queue = queue.Queue(ahead)
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._fill, args=(iter(items),), daemon=True)
    self._thread.start()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def __iter__(self) -> Iterator[Any]:
    return self

  def __next__(self) -> Any:
    item, error = self._queue.get()
    if error is not None:
      self._offer((None, error))  # whoever asks again hears it again
      raise error
    return item

  def close(self) -> None:
    """Ends the thread after the item that it is making."""
    self._stop.set()
    self._thread.join()

  def _fill(self, items: Iterator[Any]) -> None:
    error: BaseException = StopIteration()
    try:
      for item in items:
        if not self._offer((item, None)):
          return
    except BaseException as e:  # of any kind: it belongs to the thread that waits
      error = e
    self._offer((None, error))

  def _offer(self, item: Any) -> bool:
    """Waits for a place in the queue; False if it was closed meanwhile."""
    while not self._stop.is_set():
      try:
        self._queue.put(item, timeout=0.1)
        return True
      except queue.Full:
        pass
    return False


class HostSteps:
  """Optimizer steps on batches that the host makes, one a call. A `task.Steps`."""

  def __init__(
    self,
    cfg: Config,
    task: HostTask,
    one_step: OneStep,
    mesh: jax.sharding.Mesh,
  ):
    """Compiles nothing yet; `one_step` is traced once a shape of batch."""
    self._cfg, self._task, self._one_step, self._mesh = cfg, task, one_step, mesh
    self._compiled: dict[batching.Bucket, Callable] = {}
    self._batches: Prefetch | None = None
    self._plan = batching.BatchPlan(
      task.source,
      task.cut,
      window=cfg.model.window,
      batch_size=cfg.train.batch_size,
      steps=cfg.train.steps,
      seed=cfg.seed,
      host=jax.process_index(),
      hosts=jax.process_count(),
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    if self._batches is not None:
      self._batches.close()

  def tokens_before(self, step: int, last_row: Row | None) -> int:
    """See `task.Steps`. `saved` wrote them down when the checkpoint was made."""
    return last_row["tokens"] if step and last_row else 0

  def start(self, state: Any, clock: progress.Clock, report: Callable[[str], None]) -> None:
    """See `task.Steps`. Begins to make the batches of the state's step and on."""
    self._clock, self._before, self._report = clock, clock.wall_s, report
    self._batches = Prefetch(self._placed(int(state.step)), AHEAD)

  def __call__(self, state: Any) -> tuple[Any, Measured, list[Load]]:
    """See `task.Steps`. Takes one step."""
    assert self._batches is not None, "start comes first"
    begin = self._clock.wall_s
    planned, batch = next(self._batches)
    now = self._clock.wall_s
    segments = self._segments(planned.bucket)
    positions = self._cfg.train.batch_size * (
      planned.bucket.windows * self._cfg.model.window + planned.bucket.tail
    )
    load = Load(
      tokens=round(positions * (1 - planned.padding)),
      work=flops.per_sequence(segments, self._cfg.model, self._cfg.sleep) * self._cfg.train.batch_size,
      positions=positions,
      waited_s=now - begin,
      took_s=now - self._before,
    )
    self._before = now
    if planned.bucket not in self._compiled:
      shape = f"the step for {segments[-1].start + segments[-1].length * segments[-1].count} tokens"
      step = jax.jit(lambda s, b: self._one_step(s, b, segments=segments), donate_argnums=0)
      self._compiled[planned.bucket] = compile_step(step, (state, batch), shape, self._clock, self._report)
    state, measured = self._compiled[planned.bucket](state, batch)
    return state, jax.tree.map(lambda x: x[None], measured), [load]

  def saved(self, step: int, recorder: Recorder) -> None:
    """See `task.Steps`."""
    recorder.saved(step)

  def evaluation(self) -> Callable[[model.Params], Row]:
    """See `task.Steps`."""
    task, cfg = self._task, self._cfg
    size = cfg.train.eval_batch_size
    return by_group.make_host_evaluate(
      task.held_out, task.groups, task.cut, size, cfg.model, cfg.sleep, self._mesh
    )

  def sample(self) -> tuple[windows.Plan, Callable[[], windows.Batch]]:
    """See `task.Steps`. Of the shape that most held-out sequences share."""
    cut, window = self._task.cut, self._cfg.model.window
    held = next(iter(self._task.held_out.values())).examples
    own = [batching.bucket_of(example, cut, window) for example in held]
    bucket = max(sorted(set(own)), key=own.count)
    chosen = [e for e, b in zip(held, own, strict=True) if b == bucket][:TRACED_SEQUENCES]
    batch, _ = by_group.stack(chosen, bucket, cut, window)
    return self._segments(bucket), lambda: batch

  def _segments(self, bucket: batching.Bucket) -> windows.Plan:
    window = self._cfg.model.window
    return windows.plan(batching.layout(bucket, self._task.cut, window), window, self._cfg.sleep)

  def _placed(self, start: int) -> Iterator[tuple[batching.Planned, windows.Batch]]:
    task = self._task
    for planned in batching.feed(self._plan, task.cut, start, threads=task.threads, workers=task.workers):
      rows: dict[str, Any] = {name: x for name, x in planned.rows.items() if name != "group"}
      check_tokens(self._cfg, rows["inputs"], rows["targets"])
      yield planned, sharding.put(windows.Batch(**rows), self._mesh)
