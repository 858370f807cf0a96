"""What a run learns, and the steps that it takes: two protocols, whoever makes the data.

`device_steps.DeviceTask` makes its batches on the device, `host_steps.HostTask` on the host. The loop knows
neither.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol, Self

import jax

from sleep_jax import model, windows
from sleep_jax.config import Config
from sleep_jax.runtime import heap, progress, signals
from sleep_jax.train.recorder import Load, Recorder

Row = dict[str, Any]
Measured = dict[str, jax.Array]
# One optimizer step: (state, batch, segments=plan of the batch) -> (state, what it measured).
OneStep = Callable[..., tuple[Any, Measured]]


class Steps(Protocol):
  """The optimizer steps of one run. A context manager: what it started ends with it."""

  def __enter__(self) -> Self: ...

  def __exit__(self, *exception: object) -> None: ...

  def tokens_before(self, step: int, last_row: Row | None) -> int:
    """Tokens read before `step`.

    Args:
      last_row: the last row of metrics.jsonl up to `step`. None: there is none.
    """
    ...

  def start(self, state: Any, clock: progress.Clock, report: Callable[[str], None]) -> None:
    """Prepares for the first call: compiles, or begins to make batches.

    Args:
      clock: stands while a step is compiled.
      report: takes lines for the user about what is compiled.
    """
    ...

  def __call__(self, state: Any) -> tuple[Any, Measured, list[Load]]:
    """Takes one step or several, and returns before the device has finished.

    Returns:
      The next state, what the steps measured, stacked, and the load of each.
    """
    ...

  def saved(self, step: int, recorder: Recorder) -> None:
    """A checkpoint of `step` is about to be made: writes down what `tokens_before` will need."""
    ...

  def evaluation(self) -> Callable[[model.Params], Row]:
    """weights -> row, with at least `loss` and `exact`; called with the run's mesh set."""
    ...

  def sample(self) -> tuple[windows.Plan, Callable[[], windows.Batch]]:
    """A plan, and held-out sequences of it, made when they are asked for."""
    ...


class Task(Protocol):
  """What is learnt."""

  def check(self, cfg: Config) -> None:
    """Raises `ConfigError` where the config does not fit the task; nothing is written yet."""
    ...

  def steps(self, cfg: Config, one_step: OneStep, mesh: jax.sharding.Mesh) -> Steps:
    """The steps of a run."""
    ...

  def score(self, row: Row) -> str:
    """One line about an evaluation: its score beside what needs no reading."""
    ...


def compile_step(
  step: jax.stages.Wrapped, args: tuple, what: str, clock: progress.Clock, report: Callable[[str], None]
) -> jax.stages.Compiled:
  """Compiles a step for its arguments, and says so before and behind; the clock stands meanwhile.

  On a CPU the process from then on keeps the memory that such a step takes, if its command line asked for
  that (`runtime.heap`).
  """
  report(f"compiling {what} (usually 20 s, longer for large models)")
  begun = time.monotonic()
  with clock.paused(), signals.until(f"{what} is compiled"):
    compiled = step.lower(*args).compile()
  report(f"compiled {what} in {progress.duration(time.monotonic() - begun)}")
  need = compiled.memory_analysis()
  if need is not None and jax.default_backend() == "cpu":
    heap.keep(need.temp_size_in_bytes)
  return compiled


def against_constant(row: Row) -> str:
  """`exact 47.3 % (best constant 27.5 %)`, of a row with `exact` and, if it was counted, `const_exact`."""
  constant = row.get("const_exact")
  beside = "" if constant is None else f" (best constant {100 * constant:.1f} %)"
  return f"exact {100 * row['exact']:.1f} %{beside}"
