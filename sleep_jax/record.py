"""What one run writes down: a row per logged step and per evaluation, and what it all came to."""

import contextlib
from collections.abc import Callable

import jax

from sleep_jax import evaluate, flops, metrics, model, optim
from sleep_jax.config import Config


class Recorder:
  """Rows of metrics.jsonl and progress lines of one run, with the clocks that they carry."""

  def __init__(
    self, cfg: Config, segments: model.Plan, length: int, writer: metrics.Writer, num_devices: int
  ):
    """Goes on where the rows of `writer` end.

    Args:
      length: T, tokens of a sequence.
      num_devices: that the work is spread over.
    """
    self._cfg, self._segments, self._writer = cfg, segments, writer
    self._tokens_a_step = cfg.train.batch_size * length
    self._work = flops.per_sequence(segments, cfg.model, cfg.sleep)
    peak = metrics.peak_flops(jax.devices()[0])
    self._tokens_at_peak = peak and peak * num_devices / (self._work.train / length)
    self._schedule = optim.schedule(cfg.optim, cfg.train.steps)
    self._progress = metrics.Progress(cfg.train.steps)
    self.clock = metrics.Clock(writer.last())

  def trained(self, step: int, measured: dict[str, float]) -> None:
    """One optimizer step, if its turn to be logged has come: a row and a progress line."""
    if step % self._cfg.train.log_every and step != self._cfg.train.steps:
      return
    self._progress.update(step, step * self._tokens_a_step)
    speed = self._progress.tokens_per_s
    mfu = speed / self._tokens_at_peak if speed and self._tokens_at_peak else None
    self._progress.line(
      step, step * self._tokens_a_step, measured["loss"], mfu=mfu, sleep=self._work.asleep_share
    )
    rate = self._cfg.optim.muon_lr * float(self._schedule(step - 1))
    known = {name: x for name, x in (("tokens_per_s", speed), ("mfu", mfu)) if x is not None}
    self._write("train", step, **measured, learning_rate=rate, **known, **self.clock.times())

  def evaluated(self, step: int, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Runs an evaluation outside the clocks and writes it; its row."""
    times = self.clock.times()
    with self.clock.paused():
      row = measure()
    self._write("eval", step, **times, **row)
    return row

  def finished(self, step: int, weights: model.Params, batch: Callable[[], model.Batch]) -> None:
    """Writes what an answer costs, what sleep did to the fast weights, and that the run is done.

    Args:
      weights: on any devices; measured on the first one.
      batch: makes held-out sequences; its key may lie on the mesh.
    """
    cfg, times = self._cfg, self.clock.times()
    weights = jax.device_put(jax.device_get(weights), jax.devices()[0])
    with contextlib.nullcontext() if jax.sharding.get_mesh().empty else jax.set_mesh(None):
      alone = jax.device_put(jax.device_get(batch()), jax.devices()[0])
      change = evaluate.sleep_changes(weights, alone, self._segments, cfg.model, cfg.sleep)
      cost = evaluate.cost(weights, cfg.model, cfg.sleep)
    self._writer.write({"kind": "cost", "step": step, **cost})
    windows, passes = len(next(iter(change.values()), [])), cfg.sleep.num_passes
    self._writer.write(
      {"kind": "sleep", "step": step, "windows": windows, "passes": passes, "change": change}
    )
    self._write("done", step, **times)

  def _write(self, kind: str, step: int, **values: float) -> None:
    self._writer.write({"kind": kind, "step": step, "tokens": step * self._tokens_a_step, **values})
