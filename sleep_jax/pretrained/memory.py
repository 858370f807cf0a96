"""A memory for a model that has none: fast-weight layers inserted into any attention-only model."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sleep_jax import fast_weights, model, params
from sleep_jax.config import ATTENTION, FastConfig, ModelConfig, at_least, check, one_of

# Six of these add 9.9 % to Ouro-1.4B; every published size of a JetBlock would add more than a tenth.
MEMORY = FastConfig(num_heads=16, key_dim=128, value_dim=128)


def places(count: int, num_layers: int) -> tuple[int, ...]:
  """Before which of `count` blocks each new layer goes: the middle of `num_layers` equal stretches."""
  return tuple((2 * j + 1) * count // (2 * num_layers) for j in range(num_layers))


def memory_config(
  cfg: ModelConfig, *, num_layers: int = 6, kind: str = "jet", fast: FastConfig = MEMORY
) -> ModelConfig:
  """The config of a model with memory.

  Args:
    cfg: attention alone.
    num_layers: fast-weight layers, spread evenly; each a mixer behind its norm, without an MLP.
    kind: of these layers, a key of `fast_weights.RULES`.
    fast: their sizes.

  Raises:
    ConfigError: if the model has fast weights already, or `num_layers` is not in 1..blocks.
  """
  check(set(cfg.blocks) <= set(ATTENTION), "model.blocks", "a memory is added to attention-only models")
  at_least(num_layers, 1, "num_layers")
  check(num_layers <= len(cfg.blocks), "num_layers", f"must be at most {len(cfg.blocks)}, got {num_layers}")
  one_of(kind, fast_weights.RULES, "kind")
  blocks, added = list(cfg.blocks), []
  for j, place in enumerate(places(len(cfg.blocks), num_layers)):
    blocks.insert(place + j, kind)
    added.append(place + j)
  return dataclasses.replace(
    cfg, blocks=tuple(blocks), without_mlp=tuple(added), fast=fast, predict_passes=1, exit_threshold=None
  )


def memory_weights(cfg: ModelConfig) -> tuple[str, ...]:
  """Patterns of the names of inserted layers' weights, for `optim.trained`: stage 1 trains these alone."""
  return tuple(f"blocks/{i}/*" for i in cfg.without_mlp)


def add_memory(
  cfg: ModelConfig,
  weights: model.Params,
  key: jax.Array,
  *,
  num_layers: int = 6,
  kind: str = "jet",
  fast: FastConfig = MEMORY,
) -> tuple[ModelConfig, model.Params]:
  """Inserts fast-weight layers that change nothing yet: their output projections are zero.

  Logits of one pass awake stay equal to the bit. The first gradient step moves the output projections, the
  second everything else in the new layers.

  Args:
    cfg, weights: of an attention-only model. A looped one (Ouro) reads awake in one pass from now on.
    key: typed PRNG key for the new weights.
    num_layers, kind, fast: as for `memory_config`.

  Returns:
    The new config, and weights that share every array with the old ones. `without_mlp` has their numbers.
  """
  new = memory_config(cfg, num_layers=num_layers, kind=kind, fast=fast)
  declared = model.declare(new)["blocks"]
  added = [str(i) for i in new.without_mlp]
  drawn = jax.jit(lambda key: params.init({"blocks": {i: declared[i] for i in added}}, key))(key)["blocks"]
  old = iter(weights["blocks"][str(i)] for i in range(len(cfg.blocks)))
  blocks: dict[str, Any] = {}
  for i in map(str, range(len(new.blocks))):
    if i in added:
      blocks[i] = drawn[i] | {"mixer": drawn[i]["mixer"] | {"o": jnp.zeros_like(drawn[i]["mixer"]["o"])}}
    else:
      blocks[i] = next(old)
  return new, weights | {"blocks": blocks}
