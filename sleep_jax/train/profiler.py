"""A trace of some training steps, for XProf, TensorBoard's profiler or Perfetto."""

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax


class Profiler(contextlib.AbstractContextManager):
  """Traces the steps of a run behind its first call, which may still compile or wait for data.

  Blocks, passes and windows have their names in the trace (`jax.named_scope`).
  """

  def __init__(self, folder: pathlib.Path, steps: int, report: Callable[[str], None]):
    """
    Args:
      folder: where the trace is written to.
      steps: optimizer steps, as whole calls of the device. 0: no trace.
      report: takes a line when it is written.
    """
    self._folder, self._left, self._report = folder, steps, report
    self._running = False
    self._calls = 0

  def before_call(self) -> None:
    """A call of the device is about to be made."""
    self._calls += 1
    if self._left > 0 and self._calls == 2:
      jax.profiler.start_trace(self._folder)
      self._running = True

  def after_call(self, steps: int, state: Any) -> None:
    """A call of `steps` steps was made, whose result is `state`."""
    if not self._running:
      return
    self._left -= steps
    if self._left <= 0:
      jax.block_until_ready(state)
      self._stop()

  def __exit__(self, *exception: object) -> None:
    if self._running:
      self._stop()

  def _stop(self) -> None:
    self._running = False
    jax.profiler.stop_trace()
    self._report(f"profile written to {self._folder}")
