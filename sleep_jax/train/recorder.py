"""What one run writes down: a row per logged step and per evaluation, and what it all came to."""

import contextlib
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from sleep_jax import model, optim, windows
from sleep_jax.config import Config
from sleep_jax.cost import flops, measured
from sleep_jax.runtime import metrics, processes, progress
from sleep_jax.scoring import sleep_changes


class Load(NamedTuple):
  """What one optimizer step read and computed, over all devices.

  Attributes:
    tokens: that are no pads.
    work: FLOPs of its sequences, pads included.
    positions: places of the batch, pads included. None: there are no pads.
    waited_s: seconds the loop waited for this batch; an upper bound on the time that the device was idle,
      since a step may still have been running. None: the device makes its own data.
    took_s: from the batch of the step before to this one, in seconds.
  """

  tokens: int
  work: flops.Flops
  positions: int | None = None
  waited_s: float | None = None
  took_s: float | None = None


class Recorder:
  """Rows of metrics.jsonl and progress lines of one run, with the clocks that they carry."""

  def __init__(
    self,
    cfg: Config,
    writer: metrics.Writer | metrics.Silent,
    num_devices: int,
    *,
    tokens: int,
    on_row: Callable[[dict[str, Any]], None] | None = None,
  ):
    """Goes on where the rows of `writer` end.

    Args:
      num_devices: that the work is spread over.
      tokens: read before this start.
      on_row: takes every row, as it is written.
    """
    self._cfg, self._writer, self._tokens, self._on_row = cfg, writer, tokens, on_row
    peak = flops.peak_flops(jax.devices()[0])
    self._peak = peak and peak * num_devices
    self._schedule: Callable[[int], Any] = optim.schedule(cfg.optim, cfg.train.steps)
    self._progress = progress.Progress(cfg.train.steps)
    self._loads: list[Load] = []  # since the last row
    self.clock = progress.Clock(writer.last())

  def trained(self, step: int, measured: dict[str, float], load: Load) -> None:
    """One optimizer step; if its turn to be logged has come, a row and a progress line.

    When the host makes the data, rows also have `padding` (share of positions that are pads) and `data_wait`
    (share of time waiting for batches), both since the previous row.
    """
    self._tokens += load.tokens
    self._loads.append(load)
    if step % self._cfg.train.log_every and step != self._cfg.train.steps:
      return
    loads, self._loads = self._loads, []
    work, tokens = functools.reduce(operator.add, (x.work for x in loads)), sum(x.tokens for x in loads)
    self._progress.update(step, self._tokens)
    speed = self._progress.tokens_per_s
    mfu = speed * work.train / tokens / self._peak if speed and self._peak else None
    if processes.primary():
      self._progress.line(step, self._tokens, measured["loss"], mfu=mfu, sleep=work.asleep_share)
    rate = self._cfg.optim.muon_lr * float(self._schedule(step - 1))
    known = {name: x for name, x in (("tokens_per_s", speed), ("mfu", mfu)) if x is not None}
    if load.positions is not None:
      known["padding"] = 1 - tokens / sum(x.positions or 0 for x in loads)
      known["data_wait"] = sum(x.waited_s or 0.0 for x in loads) / sum(x.took_s or 0.0 for x in loads)
    self._write("train", step, **measured, learning_rate=rate, **known, **self.clock.times())

  def saved(self, step: int) -> None:
    """Writes down how far a checkpoint is: `HostSteps.tokens_before` reads it when the run resumes there."""
    self._write("saved", step, **self.clock.times())

  def evaluated(self, step: int, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Runs an evaluation outside the clocks and writes it; its row."""
    times = self.clock.times()
    with self.clock.paused():
      row = measure()
    self._write("eval", step, **times, **row)
    return row

  def finished(
    self, step: int, weights: model.Params, segments: windows.Plan, batch: Callable[[], windows.Batch]
  ) -> None:
    """Writes what an answer costs, what sleep did to the fast weights, and that the run is done.

    Args:
      weights: on any devices; measured on the first one of the first process.
      segments: plan of the sequences.
      batch: makes held-out sequences; its key may lie on the mesh.
    """
    cfg, times = self._cfg, self.clock.times()
    whole = processes.gather((weights, batch()))
    if not processes.primary():
      return
    with contextlib.nullcontext() if jax.sharding.get_mesh().empty else jax.set_mesh(None):
      weights, alone = jax.device_put(whole, jax.local_devices()[0])
      change = sleep_changes.sleep_changes(weights, alone, segments, cfg.model, cfg.sleep)
      cost = measured.cost(weights, cfg.model, cfg.sleep)
    self._put({"kind": "cost", "step": step, **cost})
    slept, passes = len(next(iter(change.values()), [])), cfg.sleep.num_passes
    self._put({"kind": "sleep", "step": step, "windows": slept, "passes": passes, "change": change})
    self._write("done", step, **times)

  def _write(self, kind: str, step: int, **values: float) -> None:
    self._put({"kind": kind, "step": step, "tokens": self._tokens, **values})

  def _put(self, row: dict[str, Any]) -> None:
    self._writer.write(row)
    if self._on_row is not None and processes.primary():
      self._on_row(row)
