"""One optimizer step, and the state that it changes."""

import functools
from typing import Any

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
  batch: windows.Batch,
  *,
  cfg: Config,
  tx: optax.GradientTransformation,
  segments: windows.Plan,
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


def shard(batch: windows.Batch) -> windows.Batch:
  """The batch split over the mesh axis of `batch`; itself without a mesh."""
  return jax.tree.map(lambda x: sharding.constrain(x, ("batch", "seq")), batch)
