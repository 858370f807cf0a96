"""Training: the task, one step, the steps of a run, the loop around them."""

from sleep_jax.train.check import check_fits
from sleep_jax.train.device_steps import Steps, make_dispatch
from sleep_jax.train.loop import NotFiniteError, PreemptedError, train
from sleep_jax.train.step import TrainState, first_state, init_state, shard, train_step
from sleep_jax.train.task import Task

__all__ = [
  "NotFiniteError", "PreemptedError", "Steps", "Task", "TrainState", "check_fits", "first_state",
  "init_state", "make_dispatch", "shard", "train", "train_step"
]  # fmt: skip
