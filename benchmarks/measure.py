"""What the benchmarks share: configs from presets, fixed threads, and times that can be compared.

On a shared machine one wall time means little. Contenders therefore take turns within one process, so that
a disturbance meets all of them; medians over the rounds are compared, and CPU time stands beside wall time.
"""

import contextlib
import dataclasses
import functools
import math
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing import connection
from typing import Any

import jax
import jax.numpy as jnp

from sleep_jax import config, train
from sleep_jax.data import rule110
from sleep_jax.experiments.configs import rule110 as presets
from sleep_jax.runtime import heap
from sleep_jax.runtime.files import RunFailedError

# What is not timed is compiled in a quarter of the time, and computes the same.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

LEAST_S = 0.4  # of work in one turn, so that the clock's grain and the first call's cold caches do not count


def pin(threads: int | None) -> int:
  """Keeps this process on the first `threads` of its cores (None: all); call it before any computation.

  Returns:
    The number of cores, which is that of XLA's threads.

  Raises:
    ConfigError: if there are not so many.
  """
  cores = (
    sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
  )
  if threads is None or threads == len(cores):
    return len(cores)
  config.check(1 <= threads <= len(cores), "--threads", f"must lie in 1..{len(cores)}, got {threads}")
  config.check(
    hasattr(os, "sched_setaffinity"), "--threads", "this system cannot keep a process on some cores"
  )
  os.sched_setaffinity(0, cores[:threads])
  return threads


def rule110_config(preset: str, **changes: Any) -> tuple[config.Config, train.DeviceTask]:
  """A preset of Rule 110 and its task. Its learning rate is constant: what is raced has no schedule.

  Args:
    preset: of experiments/configs/rule110.py.
    changes: nested, as in `config.replace`.
  """
  values = presets.get_config(preset).to_dict()
  values["optim"] |= {"warmup_share": 0.0, "decay_share": 0.0}
  data = config.from_dict(rule110.Rule110Config, values["data"], "data.")
  cfg = config.replace(config.from_dict(config.Config, values | {"data": data}), **changes)
  rule110.check_window(cfg.data, cfg.model.window)
  batch = functools.partial(rule110.batch, cfg.data)
  return cfg, train.DeviceTask(rule110.layout(cfg.data), batch, cfg.data.held_out_seed)


@dataclasses.dataclass(frozen=True)
class Times:
  """Seconds a call, one entry a round.

  Attributes:
    wall: by the clock.
    cpu: of the whole process, all threads, waiting in a spinning thread included.
  """

  wall: tuple[float, ...]
  cpu: tuple[float, ...]

  def median(self, clock: str) -> float:
    """Median over the rounds, of `wall` or `cpu`."""
    return statistics.median(getattr(self, clock))

  def least(self, clock: str) -> float:
    """Minimum over the rounds, of `wall` or `cpu`."""
    return min(getattr(self, clock))


def interleave(
  contenders: Mapping[str, Callable[[], Any]], rounds: int, *, least_s: float = LEAST_S
) -> dict[str, Times]:
  """Times contenders in turns.

  Args:
    contenders: name -> a call that returns when its work is done. It was called before, so that
      nothing is left to compile.
    rounds: turns of each; every round begins with another contender.
    least_s: a turn repeats its call until about so much time is filled, after one call that is not timed.

  Raises:
    RunFailedError: where one fails in a process of its own; it says which.
  """
  calls = {name: max(1, math.ceil(least_s / _turn(name, call, 1)[0])) for name, call in contenders.items()}
  wall: dict[str, list[float]] = {name: [] for name in contenders}
  cpu: dict[str, list[float]] = {name: [] for name in contenders}
  order = list(contenders)
  for i in range(rounds):
    for name in order[i % len(order) :] + order[: i % len(order)]:
      _turn(name, contenders[name], 1)
      spent = _turn(name, contenders[name], calls[name])
      wall[name].append(spent[0])
      cpu[name].append(spent[1])
  return {name: Times(tuple(wall[name]), tuple(cpu[name])) for name in contenders}


def _turn(name: str, call: Callable[[], Any], calls: int) -> tuple[float, float]:
  """`_timed`, and whose failure it was."""
  try:
    return _timed(call, calls)
  except RunFailedError as e:
    raise RunFailedError(f"{name}: {e}") from None


def _timed(call: Callable[[], Any], calls: int) -> tuple[float, float]:
  """Wall and CPU seconds a call: of the process in which it is made."""
  if isinstance(call, Elsewhere):
    return call.timed(calls)
  wall_0, cpu_0 = time.perf_counter(), time.process_time()
  for _ in range(calls):
    call()
  return max((time.perf_counter() - wall_0) / calls, 1e-6), (time.process_time() - cpu_0) / calls


class Elsewhere:
  """A contender in a process of its own, whose heap no other one takes apart. It waits until it is called.

  Args:
    make: of a module; (*args) -> the call that is timed. It is called once in that process.
    args: that can be pickled.

  Raises:
    RunFailedError: where that process fails, here or later.
  """

  def __init__(self, make: Callable[..., Callable[[], Any]], *args: Any):
    context = multiprocessing.get_context("spawn")
    self._pipe, theirs = context.Pipe()
    self._process = context.Process(target=_serve, args=(theirs, make, args), daemon=True)
    self._process.start()
    theirs.close()
    self._answer()

  def __call__(self) -> None:
    """One call that nobody times."""
    self.timed(1)

  def timed(self, calls: int) -> tuple[float, float]:
    """Wall and CPU seconds a call, of that process."""
    with contextlib.suppress(BrokenPipeError):  # it ended while it waited, which `_answer` says
      self._pipe.send(calls)
    return self._answer()

  def close(self) -> None:
    """Ends the process."""
    self._process.kill()
    self._process.join()
    self._pipe.close()

  def _answer(self) -> Any:
    try:
      failed, answer = self._pipe.recv()
    except (EOFError, ConnectionResetError):
      self._process.join()
      code = self._process.exitcode
      killed = " (killed, as Linux does where memory ends)" if code == -signal.SIGKILL else ""
      raise RunFailedError(f"its process ended with code {code}{killed}") from None
    if failed:
      raise RunFailedError(f"it failed: {answer}")
    return answer


def _serve(pipe: connection.Connection, make: Callable[..., Callable[[], Any]], args: tuple) -> None:
  """What the process of `Elsewhere` does: it makes the call, then times as many as it is asked for.

  It keeps the memory that it frees, whoever the contender is, as a process of an experiment does.
  """
  heap.share_arena()
  heap.keep(0)
  try:
    call = make(*args)
    call()
    pipe.send((False, None))
    while True:
      pipe.send((False, _timed(call, pipe.recv())))
  except (EOFError, BrokenPipeError):
    return  # nobody asks any more
  except Exception as e:
    pipe.send((True, f"{type(e).__name__}: {e}"))


def matrix_product(size: int) -> tuple[Callable[[], Any], float]:
  """One large float32 product by XLA, the most that this machine computes; and its FLOPs."""
  x = jax.random.normal(jax.random.key(0), (size, size), jnp.float32)
  product = jax.jit(lambda a, b: jax.lax.dot(a, b, precision=jax.lax.Precision.HIGHEST))
  return lambda: product(x, x).block_until_ready(), 2.0 * size**3
