"""Training on data that the device makes: several optimizer steps a call."""

import contextlib
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import model, windows
from sleep_jax.config import Config, check
from sleep_jax.cost import flops, need
from sleep_jax.data import limits
from sleep_jax.runtime import progress
from sleep_jax.scoring import by_position
from sleep_jax.train.recorder import Load, Recorder
from sleep_jax.train.step import TrainState, shard
from sleep_jax.train.task import Measured, OneStep, Row, against_constant, compile_step

TRACED_SEQUENCES = 64  # held-out sequences on which the work of sleep is recorded at the end


@dataclasses.dataclass(frozen=True)
class DeviceTask:
  """What is learnt, from sequences of one length that the device makes. A `task.Task`.

  Attributes:
    layout: [T] bool, positions that may have a loss.
    batch: (key, index, size) -> `windows.Batch`; pure and traced. `index` is the optimizer step.
    held_out_seed: key of the evaluation's stream.
    held_out: the same for the evaluation, where training has a curriculum. None: `batch`.
    test: cfg -> (weights -> row). The row must contain `loss` and `exact`. Called with the mesh set. None:
      `by_position.make_evaluate` on `held_out` with the key of `held_out_seed`.
    describe: row -> the line about an evaluation.
  """

  layout: np.ndarray
  batch: Callable[[jax.Array, jax.Array, int], windows.Batch]
  held_out_seed: int
  held_out: Callable[[jax.Array, jax.Array, int], windows.Batch] | None = None
  test: Callable[[Config], Callable[[model.Params], Row]] | None = None
  describe: Callable[[Row], str] = against_constant

  def check(self, cfg: Config) -> None:
    """See `task.Task`. The index of a sequence is an int32, so that a longer stream would repeat itself."""
    need.check(cfg, len(self.layout))
    sequences = cfg.train.steps * cfg.train.batch_size
    check(
      sequences <= limits.STREAM,
      "train.steps",
      f"times train.batch_size must be at most {limits.STREAM} sequences, got {sequences}",
    )

  def steps(self, cfg: Config, one_step: OneStep, mesh: jax.sharding.Mesh) -> "DeviceSteps":
    """See `task.Task`."""
    del mesh  # it is set, and batches are made on it
    return DeviceSteps(cfg, self, one_step)

  def score(self, row: Row) -> str:
    """See `task.Task`."""
    return self.describe(row)


def make_dispatch(
  cfg: Config, task: DeviceTask, one_step: OneStep, segments: windows.Plan
) -> jax.stages.Wrapped:
  """`steps_per_dispatch` steps as one device call that donates its state; measurements are stacked.

  It maps a TrainState to a TrainState and Measured.
  """

  def step(state, _):
    batch = shard(task.batch(state.key, state.step, cfg.train.batch_size))
    return one_step(state, batch, segments=segments)

  count = cfg.train.steps_per_dispatch

  def dispatch(state):
    if count > 1:
      return jax.lax.scan(step, state, length=count)
    state, measured = step(state, None)
    return state, jax.tree.map(lambda x: x[None], measured)

  return jax.jit(dispatch, donate_argnums=0)


class DeviceSteps(contextlib.nullcontext):
  """Optimizer steps on data that the device makes, several a call. A `task.Steps`."""

  def __init__(self, cfg: Config, task: DeviceTask, one_step: OneStep):
    super().__init__(self)
    self._cfg, self._task, self._one_step = cfg, task, one_step
    self._segments = windows.plan(task.layout, cfg.model.window, cfg.sleep)
    work = flops.per_sequence(self._segments, cfg.model, cfg.sleep) * cfg.train.batch_size
    self._load = Load(cfg.train.batch_size * len(task.layout), work)

  def tokens_before(self, step: int, last_row: Row | None) -> int:
    """See `task.Steps`. Every step reads as many."""
    del last_row
    return step * self._load.tokens

  def start(self, state: TrainState, clock: progress.Clock, report: Callable[[str], None]) -> None:
    """See `task.Steps`."""
    dispatch = make_dispatch(self._cfg, self._task, self._one_step, self._segments)
    self._dispatch = compile_step(dispatch, (state,), "the step", clock, report)

  def __call__(self, state: TrainState) -> tuple[TrainState, Measured, list[Load]]:
    """See `task.Steps`."""
    return *self._dispatch(state), [self._load] * self._cfg.train.steps_per_dispatch

  def saved(self, step: int, recorder: Recorder) -> None:
    """See `task.Steps`. Nothing has to be written down."""
    del step, recorder

  def evaluation(self) -> Callable[[model.Params], Row]:
    """See `task.Steps`. By default on the task's own stream, from another key."""
    cfg, task = self._cfg, self._task
    if task.test:
      return task.test(cfg)
    key, size, batch = (
      jax.random.key(task.held_out_seed),
      cfg.train.eval_batch_size,
      task.held_out or task.batch,
    )
    return by_position.make_evaluate(
      lambda i: shard(batch(key, i, size)),
      cfg.train.eval_sequences // size,
      self._segments,
      cfg.model,
      cfg.sleep,
    )

  def sample(self) -> tuple[windows.Plan, Callable[[], windows.Batch]]:
    """See `task.Steps`."""
    key, batch = jax.random.key(self._task.held_out_seed), self._task.held_out or self._task.batch
    made = jax.jit(lambda key: batch(key, jnp.int32(0), TRACED_SEQUENCES))
    return self._segments, lambda: made(key)
