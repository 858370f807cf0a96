"""Training on rows of one shape that the host holds: a row is a function of its index, a batch of the step.

Every process reads its own rows of a batch. Position = step, as in `host_steps`, whose thread puts the next
batches on the device.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import jax
import numpy as np

from sleep_jax import model, sharding, windows
from sleep_jax.config import Config, check
from sleep_jax.cost import flops, need
from sleep_jax.data import batching
from sleep_jax.runtime import progress
from sleep_jax.train.host_steps import AHEAD, TRACED_SEQUENCES, Prefetch
from sleep_jax.train.recorder import Load, Recorder
from sleep_jax.train.task import Measured, OneStep, Row, compile_step


@dataclasses.dataclass(frozen=True)
class RowTask:
  """What is learnt, from rows of one length with a loss anywhere. A `task.Task`.

  Attributes:
    rows: training rows of one epoch, index -> arrays [T] by the names of `windows.Batch`.
    held_out: rows that are not trained on, for what is measured at the end.
    length: T.
    evaluation: (cfg, mesh) -> (weights -> row). The row must contain `loss` and `exact`.
    describe: row -> the line about an evaluation.
  """

  rows: Any
  held_out: Any
  length: int
  evaluation: Callable[[Config, jax.sharding.Mesh], Callable[[model.Params], Row]]
  describe: Callable[[Row], str]

  def check(self, cfg: Config) -> None:
    """See `task.Task`."""
    check_size(cfg, self.length)

  def steps(self, cfg: Config, one_step: OneStep, mesh: jax.sharding.Mesh) -> "RowSteps":
    """See `task.Task`."""
    return RowSteps(cfg, self, one_step, mesh)

  def score(self, row: Row) -> str:
    """See `task.Task`."""
    return self.describe(row)


def check_size(cfg: Config, length: int) -> None:
  """Refuses what a run on such rows cannot do, before anything is written.

  Raises:
    ConfigError: where the device is to run several steps a call, the processes cannot share the batch, or the
      run needs more memory than there is.
  """
  check(
    cfg.train.steps_per_dispatch == 1,
    "train.steps_per_dispatch",
    f"must be 1 where the host makes the batches, got {cfg.train.steps_per_dispatch}",
  )
  for name in ("batch_size", "eval_batch_size"):
    size, hosts = getattr(cfg.train, name), jax.process_count()
    check(size % hosts == 0, f"train.{name}", f"must be a multiple of {hosts} hosts, got {size}")
  need.check(cfg, length)


def stack(rows: Sequence[dict[str, np.ndarray]]) -> windows.Batch:
  """Rows as a batch of NumPy arrays."""
  columns: dict[str, Any] = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  return windows.Batch(**columns)


class RowSteps:
  """Optimizer steps on rows, one a call. A `task.Steps`."""

  def __init__(self, cfg: Config, task: RowTask, one_step: OneStep, mesh: jax.sharding.Mesh):
    """Compiles nothing yet."""
    self._cfg, self._task, self._one_step, self._mesh = cfg, task, one_step, mesh
    self._batches: Prefetch | None = None
    self._source: Any = batching.Epochs(task.rows, cfg.train.steps * cfg.train.batch_size, cfg.seed)
    self._segments = windows.plan(np.ones(task.length, bool), cfg.model.window, cfg.sleep)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    if self._batches is not None:
      self._batches.close()

  def tokens_before(self, step: int, last_row: Row | None) -> int:
    """See `task.Steps`. `saved` wrote them down when the checkpoint was made."""
    return last_row["tokens"] if step and last_row else 0

  def start(self, state: Any, clock: progress.Clock, report: Callable[[str], None]) -> None:
    """See `task.Steps`. Compiles the step, and begins to make the batches of the state's step and on."""
    self._clock, self._before = clock, clock.wall_s
    self._batches = Prefetch(self._made(int(state.step)), AHEAD)
    first, _ = self._placed(0)
    step = jax.jit(lambda s, b: self._one_step(s, b, segments=self._segments), donate_argnums=0)
    self._compiled = compile_step(step, (state, first), "the step", clock, report)

  def __call__(self, state: Any) -> tuple[Any, Measured, list[Load]]:
    """See `task.Steps`. Takes one step."""
    assert self._batches is not None, "start comes first"
    begin = self._clock.wall_s
    batch, tokens = next(self._batches)
    now = self._clock.wall_s
    load = Load(
      tokens=tokens,
      work=flops.per_sequence(self._segments, self._cfg.model, self._cfg.sleep) * self._cfg.train.batch_size,
      positions=self._cfg.train.batch_size * self._task.length,
      waited_s=now - begin,
      took_s=now - self._before,
    )
    self._before = now
    state, measured = self._compiled(state, batch)
    return state, jax.tree.map(lambda x: x[None], measured), [load]

  def saved(self, step: int, recorder: Recorder) -> None:
    """See `task.Steps`."""
    recorder.saved(step)

  def evaluation(self) -> Callable[[model.Params], Row]:
    """See `task.Steps`."""
    return self._task.evaluation(self._cfg, self._mesh)

  def sample(self) -> tuple[windows.Plan, Callable[[], windows.Batch]]:
    """See `task.Steps`."""
    count = min(len(self._task.held_out), TRACED_SEQUENCES)
    return self._segments, lambda: stack([self._task.held_out[i] for i in range(count)])

  def _made(self, start: int) -> Iterator[tuple[windows.Batch, int]]:
    for step in range(start, self._cfg.train.steps):
      yield self._placed(step)

  def _placed(self, step: int) -> tuple[windows.Batch, int]:
    """The batch of a step on the devices, this process's rows of it, and how many tokens all of it has."""
    size, host, hosts = self._cfg.train.batch_size, jax.process_index(), jax.process_count()
    rows = [self._source[step * size + i] for i in range(size)]
    tokens = sum(int(row["valid"].sum()) for row in rows)
    mine = rows[host * size // hosts : (host + 1) * size // hosts]
    return sharding.put(stack(mine), self._mesh), tokens
