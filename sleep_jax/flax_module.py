"""A face for Flax users: an `nnx.Module` that holds the weights and calls the pure functions.

    module = SleepingHybrid(cfg, sleep_cfg, jax.random.key(0))
    optimizer = nnx.Optimizer(module, optax.adamw(1e-4), wrt=nnx.Param)
    loss, grads = nnx.value_and_grad(lambda m: m.loss(batch, segments))(module)
    optimizer.update(module, grads)

    session = module.read(prompt, module.start(batch=1))
    for token, session in module.generate(session, count=100, key=jax.random.key(0)):
      ...

The trainer of this package does not use it.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from sleep_jax import generate, model, windows
from sleep_jax.config import ModelConfig, SleepConfig


class SleepingHybrid(nnx.Module):
  """A model of this package as a Flax module. Its state between windows is passed and returned, never held.

  Attributes:
    cfg, sleep_cfg: the model, and how it sleeps; what is recomputed on the way back is `sleep_cfg.remat`.
    weights: nested `nnx.Dict` of `nnx.Param`, named as in `model.declare`.
  """

  def __init__(
    self,
    cfg: ModelConfig,
    sleep_cfg: SleepConfig,
    key: jax.Array | None = None,
    *,
    weights: model.Params | None = None,
  ):
    """Draws the weights from `key`, or holds `weights` (of a pretrained model, say).

    Raises:
      ValueError: unless exactly one of the two is given.
    """
    self.cfg, self.sleep_cfg = cfg, sleep_cfg
    if key is not None and weights is None:
      self.weights = _held(model.init(cfg, key))
    elif weights is not None and key is None:
      self.weights = _held(weights)
    else:
      raise ValueError("give a key or weights")

  def tree(self) -> model.Params:
    """The weights as the nested dict of arrays that the rest of this package takes."""
    return nnx.to_pure_dict(nnx.state(self, nnx.Param))["weights"]

  def init_state(self, batch: int) -> model.State:
    """See `model.init_state`."""
    return model.init_state(self.cfg, batch, self.sleep_cfg)

  def consolidate(
    self, tokens: jax.Array, state: model.State, *, valid: jax.Array | None = None
  ) -> model.State:
    """See `model.consolidate`."""
    return model.consolidate(self.tree(), tokens, state, self.cfg, self.sleep_cfg, valid=valid)

  def predict(
    self, tokens: jax.Array, state: model.State, *, valid: jax.Array | None = None
  ) -> tuple[jax.Array, model.State]:
    """See `model.predict`."""
    remat = self.sleep_cfg.remat != "none"
    return model.predict(self.tree(), tokens, state, self.cfg, valid=valid, remat=remat)

  def __call__(self, batch: windows.Batch, segments: windows.Plan) -> tuple[jax.Array, model.State]:
    """See `model.forward`."""
    return model.forward(self.tree(), batch, segments, self.cfg, self.sleep_cfg)

  def loss(self, batch: windows.Batch, segments: windows.Plan) -> jax.Array:
    """See `model.loss`; the scalar alone."""
    return model.loss(self.tree(), batch, segments, self.cfg, self.sleep_cfg)[0]

  def start(self, batch: int = 1) -> generate.Session:
    """See `generate.start`."""
    return generate.start(self.cfg, self.sleep_cfg, batch)

  def read(
    self, tokens: np.ndarray, session: generate.Session, *, valid: np.ndarray | None = None
  ) -> generate.Session:
    """See `generate.read`."""
    return generate.read(self.tree(), tokens, session, self.cfg, self.sleep_cfg, valid=valid)

  def generate(
    self, session: generate.Session, *, count: int, key: jax.Array, **how: Any
  ) -> Iterator[tuple[np.ndarray, generate.Session]]:
    """See `generate.generate`."""
    return generate.generate(self.tree(), session, self.cfg, self.sleep_cfg, count=count, key=key, **how)


def _held(tree: model.Params) -> nnx.Dict:
  return nnx.Dict({k: _held(v) if isinstance(v, dict) else nnx.Param(v) for k, v in tree.items()})
