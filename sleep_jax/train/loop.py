"""The training loop: a device that is never waited for, a run that is never lost.

The device runs `steps_per_dispatch` steps a call, data included, and the host reads what the call
before measured. Rerunning the same command resumes: the state is restored, and the data are a
function of the step.
"""

import contextlib
import functools
import math
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils

from sleep_jax import model, optim
from sleep_jax.config import Config
from sleep_jax.runtime import checkpoint, metrics, processes, progress, workdir
from sleep_jax.runtime.files import LostError
from sleep_jax.runtime.signals import stop_signals
from sleep_jax.train.check import check_fits
from sleep_jax.train.profiler import Profiler
from sleep_jax.train.recorder import Load, Recorder
from sleep_jax.train.step import first_state, init_state, optimization
from sleep_jax.train.task import Row, Task


class NotFiniteError(RuntimeError):
  """The loss or the gradient is NaN or infinite."""


class PreemptedError(RuntimeError):
  """The run was asked to stop; its state is saved."""


def train(
  cfg: Config,
  task: Task,
  run: workdir.Workdir,
  *,
  report: Callable[[str], Any] = progress.say,
  on_row: Callable[[Row], None] | None = None,
  profile_steps: int = 0,
  tensorboard: bool = True,
) -> Row:
  """Trains, or goes on training, in a prepared workdir.

  Of several processes, which all call this with the same arguments, the first one writes and reports.

  Args:
    cfg: of the run.
    task: what is learnt, from data that the device makes or that the host feeds.
    run: where everything is written.
    report: takes lines for the user.
    on_row: takes every row of metrics.jsonl, as it is written: for loggers of your own.
    profile_steps: steps that are traced into the folder `profile` of the workdir; see `profiler.Profiler`.
    tensorboard: whether the numbers of metrics.jsonl are also written for TensorBoard, into the folder `tb`.

  Returns:
    The last evaluation's row.

  Raises:
    NotFiniteError: naming the step; checkpoints before it stay.
    PreemptedError: after SIGTERM or Ctrl-C, when the state is saved.
    ConfigError: where fields do not fit each other or the devices.
    CheckpointError: if the workdir's checkpoints cannot be restored or saved.
    LostError: if the workdir was deleted, moved or replaced meanwhile; it says what could be saved.
  """
  mesh = check_fits(cfg, task)
  if not processes.primary():
    report = _say_nothing
  declared, tx, one_step = optimization(cfg)
  with contextlib.ExitStack() as stack:
    if mesh.size > 1:
      stack.enter_context(jax.set_mesh(mesh))
    stopped_at = stack.enter_context(_asked_to_stop(report))
    checkpoints = stack.enter_context(
      checkpoint.Checkpoints(
        run.checkpoints, keep=cfg.train.keep_checkpoints, config=run.config, report=report
      )
    )
    start = functools.partial(init_state, cfg, tx)
    restored = checkpoints.restore(jax.eval_shape(start))
    state = first_state(cfg, tx) if restored is None else restored[1]
    optim.check_partition(state.opt_state, declared)
    done = int(state.step)
    if done:
      report(f"resuming at step {done} of {cfg.train.steps}")
    else:
      report(f"weights and their optimizers:\n{optim.partition_table(declared, every=logging.vlog_is_on(1))}")
    writer = metrics.Silent()
    if processes.primary():
      writer = metrics.Writer(run.path, tensorboard=tensorboard, report=report)
    writer = stack.enter_context(writer)
    writer.truncate_after(-1 if restored is None else done, with_done=("cost", "sleep"))
    steps = stack.enter_context(task.steps(cfg, one_step, mesh))
    tokens = steps.tokens_before(done, writer.last())
    recorder = Recorder(cfg, writer, mesh.size, tokens=tokens, on_row=on_row)
    evaluation = steps.evaluation()
    profiler = stack.enter_context(Profiler(run.path / "profile", profile_steps, report))

    def evaluate(step: int, weights: model.Params) -> Row:
      row = recorder.evaluated(step, lambda: evaluation(weights))
      report(f"eval step {step}: {task.score(row)}")
      return row

    row = evaluate(0, state.tested) if done == 0 else {}
    if done < cfg.train.steps:
      steps.start(state, recorder.clock, report)
      if stopped := stopped_at(0):
        raise PreemptedError(f"stopped by {stopped} before step {done + 1}; rerun the same command to go on")
    pending = None  # what the call before measured: read while the device runs the next one
    while done < cfg.train.steps:
      profiler.before_call()
      state, measured, loads = steps(state)
      profiler.after_call(len(loads), state)
      done += len(loads)
      _read(pending, recorder, checkpoints)
      pending = (done, measured, loads)
      last = done == cfg.train.steps
      lost = _lost(run, writer, checkpoints)
      stopped = stopped_at(done // len(loads)) or lost  # what comes later is answered after the next dispatch
      saves, tests = (last or done % every == 0 for every in (cfg.train.save_every, cfg.train.eval_every))
      if saves or tests or stopped:
        _read(pending, recorder, checkpoints)
        pending = None
      if tests:
        row = evaluate(done, state.tested)
      if saves or stopped:
        steps.saved(done, recorder)
        with recorder.clock.paused():
          if lost:
            rescued = "nothing more is saved" if run.taken else checkpoints.rescue(done, state)
            raise LostError(f"{lost}; {rescued}")
          checkpoints.save(done, state)
      _say_saved(checkpoints, report)
      if stopped and not last:
        checkpoints.wait()
        raise PreemptedError(f"stopped by {stopped}; saved step {done}, rerun the same command to go on")
    checkpoints.wait()
    _say_saved(checkpoints, report)
    row = row or evaluation(state.tested)
    recorder.finished(done, state.tested, *steps.sample())
    if lost := _lost(run, writer, checkpoints):
      raise LostError(f"{lost}; step {done} was the last")
    return row


def _read(
  pending: tuple[int, dict[str, jax.Array], list[Load]] | None,
  recorder: Recorder,
  checkpoints: checkpoint.Checkpoints,
) -> None:
  """Waits for what a dispatch measured, step by step, and records it.

  Args:
    pending: the step that the dispatch ended with, its measurements, stacked, and the
      load of each step. None: nothing.

  Raises:
    NotFiniteError: at the first step whose loss or gradient is not finite.
  """
  if pending is None:
    return
  end, measured, loads = pending[0], jax.device_get(pending[1]), pending[2]
  count = len(measured["loss"])
  for i in range(count):
    step, values = end - count + 1 + i, {name: float(x[i]) for name, x in measured.items()}
    if not all(map(math.isfinite, values.values())):
      with contextlib.suppress(checkpoint.CheckpointError):
        checkpoints.wait()  # for the save in flight, which counts
      saved = checkpoints.latest_step
      left = (
        "no checkpoint was saved before" if saved is None else f"the last good checkpoint is step {saved}"
      )
      raise NotFiniteError(
        f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; stopped; {left};"
        " a smaller optim.muon_lr or more optim.warmup_steps usually helps"
      )
    recorder.trained(step, values, loads[i])


def _say_saved(checkpoints: checkpoint.Checkpoints, report: Callable[[str], None]) -> None:
  for step in checkpoints.poll():
    report(f"saved step {step}")


def _lost(
  run: workdir.Workdir, writer: metrics.Writer | metrics.Silent, checkpoints: checkpoint.Checkpoints
) -> str | None:
  """What became of the workdir, if it is no longer this run's: one process decides that for itself alone.

  Several processes learn it when they next save together.
  """
  return None if jax.process_count() > 1 else run.lost() or writer.lost() or checkpoints.lost()


def _say_nothing(line: str) -> None:
  del line


@contextlib.contextmanager
def _asked_to_stop(report: Callable[[str], None]) -> Iterator[Callable[[int], str | None]]:
  """Whether to save and stop after the dispatch of a number: the name of the signal that asks for it.

  Of several processes a signal to one is enough: JAX's coordination service hears SIGTERM (the others are
  passed on as that) and finds a dispatch that no process has passed.
  """
  several = jax.process_count() > 1
  with stop_signals(report, forward=signal.SIGTERM if several else None) as received:
    if several:
      reached = multihost_utils.reached_preemption_sync_point
      yield lambda dispatch: (received or ["SIGTERM"])[0] if reached(dispatch) else None
    else:
      yield lambda dispatch: received[0] if received else None
