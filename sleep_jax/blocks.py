"""One pass over the blocks: (h, state) -> (h, state).

A block is a mixer and an MLP, each behind an RMSNorm and added to the residual stream. The mixer
is attention (`attn`) or a fast-weight layer, named by its rule.
"""

from typing import Any

import jax

from sleep_jax import attention, fast_weights, layers, params
from sleep_jax.config import ConfigError, ModelConfig, nearest

# What a pass starts from and leaves, by block; attention has some under sliding eviction only.
State = dict[str, fast_weights.FastWeights | attention.Kept]
Cache = dict[str, attention.KVCache]


def declare(cfg: ModelConfig) -> dict[str, Any]:
  """The weights of all blocks, by number.

  Raises:
    ConfigError: for a block that is neither `attn` nor a known rule.
  """
  known = ("attn", *fast_weights.RULES)
  d, hidden = cfg.embed_dim, cfg.mlp_dim or 2 * cfg.embed_dim
  declared = {}
  for i, kind in enumerate(cfg.blocks):
    if kind not in known:
      raise ConfigError(f"model.blocks[{i}]: unknown block {kind!r}; {nearest(kind, known)}")
    declared[str(i)] = {
      "norm": params.scale(d),
      "mixer": attention.declare(cfg) if kind == "attn" else fast_weights.declare(cfg),
      "mlp_norm": params.scale(d),
      "mlp": {
        "gate": params.matrix(d, hidden, axes=("w_embed", "mlp")),
        "up": params.matrix(d, hidden, axes=("w_embed", "mlp")),
        "down": params.matrix(hidden, d, axes=("mlp", "w_embed")),
      },
    }
  return declared


def init_state(cfg: ModelConfig, batch: int) -> State:
  """Fast weights of every fast-weight block at the start of a sequence."""
  return {str(i): fast_weights.init_state(cfg, batch) for i, kind in enumerate(cfg.blocks) if kind != "attn"}


def init_kept(cfg: ModelConfig, batch: int) -> State:
  """What every attention block is left with before the first window, under sliding eviction; else nothing."""
  if cfg.eviction != "sliding":
    return {}
  return {str(i): attention.init_kept(cfg, batch) for i, kind in enumerate(cfg.blocks) if kind == "attn"}


def init_cache(cfg: ModelConfig, batch: int, state: State | None = None) -> Cache:
  """A window of which nothing is read yet, for every attention block; behind what `state` kept."""
  kept = {i: s for i, s in (state or {}).items() if isinstance(s, attention.Kept)}
  return {
    str(i): attention.init_cache(cfg, batch, kept.get(str(i)))
    for i, kind in enumerate(cfg.blocks)
    if kind == "attn"
  }


def open_window(state: State, cfg: ModelConfig) -> State:
  """The state with which a new window begins."""
  return {
    i: s if isinstance(s, attention.Kept) else fast_weights.open_window(s, cfg) for i, s in state.items()
  }


def reopen(state: State, start: State) -> State:
  """S of `state` at the beginning of the window that `start` opened; what was kept is that of `start`."""
  return {
    i: start[i] if isinstance(s, attention.Kept) else fast_weights.reopen(s, start[i])
    for i, s in state.items()
  }


def run(
  weights: dict[str, Any],
  h: jax.Array,
  state: State,
  cfg: ModelConfig,
  *,
  first: int = 0,
  last: int | None = None,
  valid: jax.Array | None = None,
  cache: Cache | None = None,
  remat: bool = False,
) -> tuple[jax.Array, State, Cache | None]:
  """One pass over blocks `first` .. `last` - 1.

  Args:
    weights: as declared.
    h: hidden states [B, T, D], in the activation dtype.
    state: of all fast-weight blocks and, under sliding eviction, what attention kept; blocks that do not run
      keep theirs.
    first, last: which blocks run. None: up to the end.
    valid: [B, T] bool, False for pads. None: all valid.
    cache: earlier tokens of the same window, for decoding; None if h is the whole window.
    remat: keep only each block's input for the way back.

  Returns:
    h, state and cache (None if none came in) after the pass.
  """
  state, cache = dict(state), None if cache is None else dict(cache)
  for i, kind in list(enumerate(cfg.blocks))[first:last]:
    name = str(i)

    def block(weights, h, memory, kind=kind):
      x = layers.rms_norm(h, weights["norm"], cfg.norm_eps)
      if kind == "attn":
        mixed, memory = attention.attention(weights["mixer"], x, cfg, valid=valid, cache=memory)
      else:
        rule = fast_weights.RULES[kind]
        mixed, memory = fast_weights.fast_weights(weights["mixer"], x, memory, cfg, rule, valid=valid)
      h = h + mixed
      h = h + layers.swiglu(weights["mlp"], layers.rms_norm(h, weights["mlp_norm"], cfg.norm_eps))
      return h, memory

    if remat:
      block = jax.checkpoint(block)
    if kind == "attn" and cache is not None:
      h, cache[name] = block(weights[name], h, cache[name])
    elif name in state:
      h, state[name] = block(weights[name], h, state[name])
    else:
      h, _ = block(weights[name], h, None)
  return h, state, cache
