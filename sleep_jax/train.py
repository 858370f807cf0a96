"""The training loop: a device that is never waited for, a run that is never lost.

The device runs `steps_per_dispatch` steps a call, data included, and the host reads what the call
before measured. Rerunning the same command resumes: the state is restored, and the data are a
function of the step.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from kernels import dispatch as kernels
from sleep_jax import (
  checkpoint,
  evaluate,
  feeding,
  flops,
  metrics,
  model,
  optim,
  pretrained,
  processes,
  progress,
  record,
  sharding,
  workdir,
)
from sleep_jax.config import Config, check, one_of
from sleep_jax.signals import stop_signals

# For what runs once: on a CPU it compiles in a quarter of the time.
_QUICK = {"xla_backend_optimization_level": 0}
TRACED_SEQUENCES = 64  # held-out sequences on which the work of sleep is recorded at the end


class NotFiniteError(RuntimeError):
  """The loss or the gradient is NaN or infinite."""


class PreemptedError(RuntimeError):
  """The run was asked to stop; its state is saved."""


@dataclasses.dataclass(frozen=True)
class Task:
  """What is learnt.

  Attributes:
    layout: [T] bool, positions that may have a loss.
    batch: (key, index, size) -> `model.Batch`; pure and traced, so that the device makes its own data.
    held_out_seed: key of the evaluation's stream.
    test: makes the evaluation, weights -> row (with `loss` and `exact`), of a run; called with its mesh set.
      None: `evaluate.make_evaluate` on `batch` with the key of `held_out_seed`.
  """

  layout: np.ndarray
  batch: Callable[[jax.Array, jax.Array, int], model.Batch]
  held_out_seed: int
  test: Callable[[Config], Callable[[model.Params], dict[str, Any]]] | None = None


@flax.struct.dataclass
class TrainState:
  """All that a checkpoint holds; at a batch boundary no sequence is in flight.

  Attributes:
    step: optimizer steps done, int32 scalar; also the position in the data.
    key: of the data's stream.
    params: slow weights, float32.
    opt_state: the optimizer's.
  """

  step: jax.Array
  key: jax.Array
  params: model.Params
  opt_state: Any


def init_state(cfg: Config, tx: optax.GradientTransformation) -> TrainState:
  """The state before the first step; a function of `cfg.seed`."""
  init_key, data_key = jax.random.split(jax.random.key(cfg.seed))
  weights = model.init(cfg.model, init_key)
  return TrainState(step=jnp.zeros((), jnp.int32), key=data_key, params=weights, opt_state=tx.init(weights))


def first_state(cfg: Config, tx: optax.GradientTransformation) -> TrainState:
  """`init_state`, on the device, with the weights of `cfg.train.init_from` where that is given.

  Raises:
    ConfigError: if the checkpoint cannot be read or is another model.
  """
  start = functools.partial(init_state, cfg, tx)
  if cfg.train.init_from is None:
    return jax.jit(start, compiler_options=_QUICK)()
  init_key, _ = jax.random.split(jax.random.key(cfg.seed))
  weights = pretrained.start_weights(cfg.model, cfg.train.init_from, init_key, ignore=cfg.train.init_ignore)

  def put(weights):
    return start().replace(params=weights, opt_state=tx.init(weights))  # what was drawn is never computed

  return jax.jit(put, compiler_options=_QUICK, donate_argnums=0)(weights)


def train_step(
  state: TrainState,
  batch: model.Batch,
  *,
  cfg: Config,
  tx: optax.GradientTransformation,
  segments: model.Plan,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One optimizer step: backpropagation through the answers and, through S alone, through every sleep.

  Returns:
    The next state, and the loss (nats a target) and the global gradient norm before clipping, of the weights
    that are trained.
  """
  declared = optim.freeze(cfg.optim, model.declare(cfg.model))

  def loss_of(weights, batch):
    return model.loss(optim.hold(declared, weights), batch, segments, cfg.model, cfg.sleep)[0]

  loss, grads = optim.gradients(loss_of, state.params, batch, cfg.train.microbatches)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  measured = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
  weights = optax.apply_updates(state.params, updates)
  return state.replace(step=state.step + 1, params=weights, opt_state=opt_state), measured


def make_dispatch(
  cfg: Config, task: Task, tx: optax.GradientTransformation, segments: model.Plan
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


def shard(batch: model.Batch) -> model.Batch:
  """The batch split over the mesh axis of `batch`; itself without a mesh."""
  return jax.tree.map(lambda x: sharding.constrain(x, ("batch", "seq")), batch)


def check_fits(cfg: Config) -> jax.sharding.Mesh:
  """The mesh of a run. To be called before its workdir is made: a mistake then leaves nothing behind.

  Raises:
    ConfigError: where fields do not fit each other or the devices.
  """
  count = cfg.train.steps_per_dispatch
  for name in ("steps", "eval_every", "save_every"):
    value = getattr(cfg.train, name)
    check(
      value % count == 0,
      f"train.{name}",
      f"must be a multiple of train.steps_per_dispatch = {count}, got {value}",
    )
  if cfg.model.fast.kernel is not None:
    known = kernels.ORDER.get(jax.default_backend(), kernels.ORDER["cpu"])
    one_of(cfg.model.fast.kernel, known, "model.fast.kernel")
  optim.freeze(cfg.optim, model.declare(cfg.model))
  if cfg.train.init_from is not None:
    pretrained.check_start(cfg.model, cfg.train.init_from, ignore=cfg.train.init_ignore)
  mesh = sharding.make_mesh(cfg.mesh)
  size, hosts = mesh.shape["data"], jax.process_count()
  check(
    hosts == 1 or (mesh.size == jax.device_count() and size % hosts == 0),
    "mesh",
    f"of {hosts} processes must take all {jax.device_count()} devices, and mesh.data be a multiple of"
    f" {hosts}, got {size} x {mesh.shape['model']}",
  )
  for name in ("batch_size", "eval_batch_size"):
    value = getattr(cfg.train, name)
    check(value % size == 0, f"train.{name}", f"must be a multiple of mesh.data = {size}, got {value}")
  part = cfg.train.batch_size // cfg.train.microbatches
  check(
    part % size == 0,
    "train.microbatches",
    f"must leave a part a multiple of mesh.data = {size} sequences, got parts of {part}",
  )
  return mesh


def train(
  cfg: Config,
  task: Task | feeding.FedTask,
  run: workdir.Workdir,
  *,
  report: Callable[[str], None] = print,
) -> dict[str, float]:
  """Trains, or goes on training, in a prepared workdir.

  Of several processes, which all call this with the same arguments, the first one writes and reports.

  Args:
    cfg: of the run.
    task: what is learnt, from data that the device makes or that the host feeds.
    run: where everything is written.
    report: takes lines for the user.

  Returns:
    The last evaluation's row.

  Raises:
    NotFiniteError: naming the step; checkpoints before it stay.
    PreemptedError: after SIGTERM or Ctrl-C, when the state is saved.
    ConfigError: where fields do not fit each other or the devices.
    CheckpointError: if the workdir's checkpoints cannot be restored or saved.
  """
  mesh = check_fits(cfg)
  if not processes.primary():
    report = _say_nothing
  declared = model.declare(cfg.model)
  tx = optim.make(cfg.optim, declared, cfg.train.steps)
  with contextlib.ExitStack() as stack:
    if mesh.size > 1:
      stack.enter_context(jax.set_mesh(mesh))
    stopped_at = stack.enter_context(_asked_to_stop(report))
    checkpoints = stack.enter_context(
      checkpoint.Checkpoints(run.checkpoints, keep=cfg.train.keep_checkpoints, report=report)
    )
    start = functools.partial(init_state, cfg, tx)
    restored = checkpoints.restore(jax.eval_shape(start))
    state = first_state(cfg, tx) if restored is None else restored[1]
    declared = optim.freeze(cfg.optim, declared)
    optim.check_partition(state.opt_state, declared)
    done = int(state.step)
    if done:
      report(f"resuming at step {done} of {cfg.train.steps}")
    else:
      report(f"weights and their optimizers:\n{optim.partition_table(declared)}")
    writer = stack.enter_context(metrics.Writer(run.path) if processes.primary() else metrics.Silent())
    writer.truncate_after(done)
    fed = isinstance(task, feeding.FedTask)
    one_step = functools.partial(train_step, cfg=cfg, tx=tx)
    steps = feeding.Steps(cfg, task, one_step, mesh) if fed else Steps(cfg, task, tx)
    steps = stack.enter_context(steps)
    tokens = steps.tokens_before(done, writer.last())
    recorder = record.Recorder(cfg, writer, mesh.size, tokens=tokens)
    test = steps.test()

    row = recorder.evaluated(0, lambda: test(state.params)) if done == 0 else {}
    if done < cfg.train.steps:
      steps.start(state, recorder.clock)
    pending = None  # what the call before measured: read while the device runs the next one
    while done < cfg.train.steps:
      state, measured, loads = steps(state)
      done += len(loads)
      _read(pending, recorder, checkpoints)
      pending = (done, measured, loads)
      last = done == cfg.train.steps
      stopped = stopped_at(done // len(loads))  # a signal from here on is answered after the next dispatch
      saves, tests = (last or done % every == 0 for every in (cfg.train.save_every, cfg.train.eval_every))
      if saves or tests or stopped:
        _read(pending, recorder, checkpoints)
        pending = None
      if tests:
        row = recorder.evaluated(done, lambda weights=state.params: test(weights))
      if saves or stopped:
        if fed:
          recorder.saved(done)
        with recorder.clock.paused():
          checkpoints.save(done, state)
      _say_saved(checkpoints, report)
      if stopped and not last:
        checkpoints.wait()
        raise PreemptedError(f"stopped by {stopped}; saved step {done}, rerun the same command to go on")
    checkpoints.wait()
    _say_saved(checkpoints, report)
    row = row or test(state.params)
    recorder.finished(done, state.params, *steps.sample())
    return row


class Steps(contextlib.nullcontext):
  """Optimizer steps on data that the device makes, several a call; `feeding.Steps` is its peer."""

  def __init__(self, cfg: Config, task: Task, tx: optax.GradientTransformation):
    super().__init__(self)
    self._cfg, self._task, self._tx = cfg, task, tx
    self._segments = model.plan(task.layout, cfg.model.window)
    work = flops.per_sequence(self._segments, cfg.model, cfg.sleep) * cfg.train.batch_size
    self._load = record.Load(cfg.train.batch_size * len(task.layout), work)

  def tokens_before(self, step: int, last_row: dict[str, Any] | None) -> int:
    """Tokens read before `step`: every step reads as many."""
    del last_row
    return step * self._load.tokens

  def start(self, state: TrainState, clock: progress.Clock) -> None:
    """Compiles, while the clock stands."""
    with clock.paused():
      traced = make_dispatch(self._cfg, self._task, self._tx, self._segments)
      self._dispatch = traced.lower(state).compile()

  def __call__(self, state: TrainState) -> tuple[TrainState, dict[str, jax.Array], list[record.Load]]:
    """The next state, what each step measured, stacked, and what each took."""
    return *self._dispatch(state), [self._load] * self._cfg.train.steps_per_dispatch

  def test(self) -> Callable[[model.Params], dict[str, Any]]:
    """The evaluation; of a task that says nothing else, on its own stream, from another key."""
    cfg, task = self._cfg, self._task
    if task.test:
      return task.test(cfg)
    key, size = jax.random.key(task.held_out_seed), cfg.train.eval_batch_size
    return evaluate.make_evaluate(
      lambda i: shard(task.batch(key, i, size)),
      cfg.train.eval_sequences // size,
      self._segments,
      cfg.model,
      cfg.sleep,
    )

  def sample(self) -> tuple[model.Plan, Callable[[], model.Batch]]:
    """Held-out sequences, made when they are asked for, and their plan."""
    key = jax.random.key(self._task.held_out_seed)
    made = jax.jit(lambda key: self._task.batch(key, 0, TRACED_SEQUENCES))
    return self._segments, lambda: made(key)


def _read(
  pending: tuple[int, dict[str, jax.Array], list[record.Load]] | None,
  recorder: record.Recorder,
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


def _say_nothing(line: str) -> None:
  del line


@contextlib.contextmanager
def _asked_to_stop(report: Callable[[str], None]) -> Iterator[Callable[[int], str | None]]:
  """Whether to save and stop after the dispatch of a number: the name of the signal that asks for it.

  Of several processes SIGTERM to one is enough: JAX's coordination service finds a dispatch that none of
  them has passed.
  """
  if jax.process_count() > 1:
    reached = multihost_utils.reached_preemption_sync_point
    yield lambda dispatch: "SIGTERM" if reached(dispatch) else None
    return
  with stop_signals(report) as received:
    yield lambda dispatch: received[0] if received else None
