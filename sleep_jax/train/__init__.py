"""Training: the task, one step, the steps of a run, the loop around them."""

from sleep_jax.train.check import check_fits
from sleep_jax.train.device_steps import DeviceTask, make_dispatch
from sleep_jax.train.host_steps import HostTask
from sleep_jax.train.loop import NotFiniteError, PreemptedError, train
from sleep_jax.train.step import TrainState, first_state, init_state, optimization, shard, train_step
from sleep_jax.train.task import Steps, Task, against_constant

__all__ = [
  "DeviceTask", "HostTask", "NotFiniteError", "PreemptedError", "Steps", "Task", "TrainState",
  "against_constant", "check_fits", "first_state", "init_state", "make_dispatch",
  "optimization", "shard", "train", "train_step"
]  # fmt: skip
