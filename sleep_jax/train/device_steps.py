"""Training on data that the device makes: several optimizer steps a call."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import optax

from sleep_jax import model, windows
from sleep_jax.config import Config
from sleep_jax.cost import flops
from sleep_jax.runtime import progress
from sleep_jax.scoring import by_position
from sleep_jax.train.recorder import Load
from sleep_jax.train.step import TrainState, shard, train_step
from sleep_jax.train.task import Task

TRACED_SEQUENCES = 64  # held-out sequences on which the work of sleep is recorded at the end


def make_dispatch(
  cfg: Config, task: Task, tx: optax.GradientTransformation, segments: windows.Plan
) -> Callable[[TrainState], tuple[TrainState, dict[str, jax.Array]]]:
  """`steps_per_dispatch` steps as one device call that donates its state; measurements are stacked."""

  def step(state, _):
    batch = shard(task.batch(state.key, state.step, cfg.train.batch_size))
    return train_step(state, batch, cfg=cfg, tx=tx, segments=segments)

  count = cfg.train.steps_per_dispatch

  def dispatch(state):
    if count > 1:
      return jax.lax.scan(step, state, length=count)
    state, measured = step(state, None)
    return state, jax.tree.map(lambda x: x[None], measured)

  return jax.jit(dispatch, donate_argnums=0)


class Steps(contextlib.nullcontext):
  """Optimizer steps on data that the device makes, several a call; `feeding.Steps` is its peer."""

  def __init__(self, cfg: Config, task: Task, tx: optax.GradientTransformation):
    super().__init__(self)
    self._cfg, self._task, self._tx = cfg, task, tx
    self._segments = windows.plan(task.layout, cfg.model.window)
    work = flops.per_sequence(self._segments, cfg.model, cfg.sleep) * cfg.train.batch_size
    self._load = Load(cfg.train.batch_size * len(task.layout), work)

  def tokens_before(self, step: int, last_row: dict[str, Any] | None) -> int:
    """Tokens read before `step`: every step reads as many."""
    del last_row
    return step * self._load.tokens

  def start(self, state: TrainState, clock: progress.Clock) -> None:
    """Compiles, while the clock stands."""
    with clock.paused():
      traced = make_dispatch(self._cfg, self._task, self._tx, self._segments)
      self._dispatch = traced.lower(state).compile()

  def __call__(self, state: TrainState) -> tuple[TrainState, dict[str, jax.Array], list[Load]]:
    """The next state, what each step measured, stacked, and what each took."""
    return *self._dispatch(state), [self._load] * self._cfg.train.steps_per_dispatch

  def test(self) -> Callable[[model.Params], dict[str, Any]]:
    """The evaluation; of a task that says nothing else, on its own stream, from another key."""
    cfg, task = self._cfg, self._task
    if task.test:
      return task.test(cfg)
    key, size = jax.random.key(task.held_out_seed), cfg.train.eval_batch_size
    return by_position.make_evaluate(
      lambda i: shard(task.batch(key, i, size)),
      cfg.train.eval_sequences // size,
      self._segments,
      cfg.model,
      cfg.sleep,
    )

  def sample(self) -> tuple[windows.Plan, Callable[[], windows.Batch]]:
    """Held-out sequences, made when they are asked for, and their plan."""
    key = jax.random.key(self._task.held_out_seed)
    made = jax.jit(lambda key: self._task.batch(key, 0, TRACED_SEQUENCES))
    return self._segments, lambda: made(key)
