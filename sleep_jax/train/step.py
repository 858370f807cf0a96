"""One optimizer step, and the state that it changes."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from sleep_jax import model, optim, pretrained, sharding, windows
from sleep_jax.config import Config

# For what runs once: on a CPU it compiles in a quarter of the time.
_QUICK = {"xla_backend_optimization_level": 0}


@flax.struct.dataclass
class TrainState:
  """All that a checkpoint holds; at a batch boundary no sequence is in flight.

  Attributes:
    step: optimizer steps done, int32 scalar; also the position in the data.
    key: of the data's stream.
    params: slow weights, float32.
    opt_state: the optimizer's.
    average: of the slow weights over the steps (`optim.average`). None: there is none.
  """

  step: jax.Array
  key: jax.Array
  params: model.Params
  opt_state: Any
  average: model.Params | None = None

  @property
  def tested(self) -> model.Params:
    """The weights that are evaluated: their average, where there is one."""
    return self.params if self.average is None else self.average


def init_state(cfg: Config, tx: optax.GradientTransformation) -> TrainState:
  """The state before the first step; a function of `cfg.seed`."""
  init_key, data_key = jax.random.split(jax.random.key(cfg.seed))
  weights = model.init(cfg.model, init_key)
  return _at_start(cfg, tx, data_key, weights)


def _at_start(
  cfg: Config, tx: optax.GradientTransformation, key: jax.Array, weights: model.Params
) -> TrainState:
  average = weights if cfg.optim.average else None
  return TrainState(jnp.zeros((), jnp.int32), key, weights, tx.init(weights), average)


def first_state(cfg: Config, tx: optax.GradientTransformation) -> TrainState:
  """`init_state`, on the device, with the weights of `cfg.train.init_from` where that is given.

  Raises:
    ConfigError: if the checkpoint cannot be read or is another model.
  """
  if cfg.train.init_from is None:
    return jax.jit(functools.partial(init_state, cfg, tx), compiler_options=_QUICK)()
  init_key, data_key = jax.random.split(jax.random.key(cfg.seed))
  weights = pretrained.start_weights(cfg.model, cfg.train.init_from, init_key, ignore=cfg.train.init_ignore)
  put = functools.partial(_at_start, cfg, tx, data_key)
  return jax.jit(put, compiler_options=_QUICK, donate_argnums=0)(weights)


class Optimization(NamedTuple):
  """What a run decides once about its weights.

  Attributes:
    declared: every weight as `params.Weight`; those that stay as they are in the group `frozen`.
    tx: the optimizer.
    one_step: `train_step` with both, (state, batch, segments=) -> (state, measured).
  """

  declared: Any
  tx: optax.GradientTransformation
  one_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]


def optimization(cfg: Config) -> Optimization:
  """Declares the weights of a run and makes its optimizer.

  Raises:
    ConfigError: if `optim.trained` has a pattern that names no weight.
  """
  declared = optim.freeze(cfg.optim, model.declare(cfg.model))
  tx = optim.make(cfg.optim, declared, cfg.train.steps)
  return Optimization(declared, tx, functools.partial(train_step, cfg=cfg, tx=tx, declared=declared))


def train_step(
  state: TrainState,
  batch: windows.Batch,
  *,
  cfg: Config,
  tx: optax.GradientTransformation,
  declared: Any,
  segments: windows.Plan,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One optimizer step: backpropagation through the answers and, through S alone, through every sleep.

  Args:
    cfg, tx: of the run; `tx` from `optim.make`.
    declared: all weights as `params.Weight`, from `optim.freeze`.
    segments: plan of the batch.

  Returns:
    The next state, and the loss (nats a target) and the global gradient norm before clipping, of the weights
    that are trained.
  """

  def loss_of(weights, batch):
    return model.loss(optim.hold(declared, weights), batch, segments, cfg.model, cfg.sleep)[0]

  loss, grads = gradients(loss_of, state.params, batch, cfg.train.microbatches)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  measured = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
  weights: Any = optax.apply_updates(state.params, updates)
  average = state.average
  if average is not None:
    average = optim.moved(average, weights, cfg.optim.average, state.step + 1)
  return TrainState(state.step + 1, state.key, weights, opt_state, average), measured


def gradients(
  loss_of: Callable[[Any, Any], jax.Array], weights: Any, batch: Any, microbatches: int
) -> tuple[jax.Array, Any]:
  """Loss and gradients of a batch, of one part of it after the other.

  Args:
    loss_of: mean over the targets of a batch.
    weights: of the model.
    batch: a `windows.Batch` of B sequences. Part i is rows i, i + microbatches, ..., some of every device.
    microbatches: divides B.

  Returns:
    The mean over all targets of the batch, and its gradients; both as of the whole batch, but for rounding.
  """
  value_and_grad = jax.value_and_grad(loss_of)
  if microbatches == 1:
    return value_and_grad(weights, batch)
  parts = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)
  targets = jnp.maximum(jnp.sum(batch.loss_mask), 1.0)

  def add(total, part):
    share = jnp.sum(part.loss_mask) / targets
    of_part = value_and_grad(weights, part)
    return jax.tree.map(lambda x, y: x + share * y, total, of_part), None

  zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, weights))
  return jax.lax.scan(add, zero, parts)[0]


def shard(batch: windows.Batch) -> windows.Batch:
  """The batch split over the mesh axis of `batch`; itself without a mesh."""
  return jax.tree.map(lambda x: sharding.constrain(x, ("batch", "seq")), batch)
