"""One pass over the blocks: (h, state) -> (h, state).

A block is a mixer and an MLP, each behind an RMSNorm and added to the residual stream; with sandwich norms
through a second RMSNorm. The mixer is attention (`attn`; `swa` to the last few tokens only) or a fast-weight
layer, named by its rule. A block in `without_mlp` is a mixer behind its norm, whatever the others are.
"""

import functools
from typing import Any

import jax

from sleep_jax import attention, fast_weights, layers, params
from sleep_jax.config import ATTENTION, ConfigError, ModelConfig, nearest

# What a pass starts from and leaves, by block; attention has some under sliding eviction only.
State = dict[str, fast_weights.FastWeights | attention.Kept]
Cache = dict[str, attention.KVCache]


def declare(cfg: ModelConfig) -> dict[str, Any]:
  """The weights of all blocks, by number.

  Raises:
    ConfigError: for a block that is neither `attn` nor a known rule.
  """
  known = (*ATTENTION, *fast_weights.RULES)
  d, hidden = cfg.embed_dim, cfg.mlp_dim or 2 * cfg.embed_dim
  declared = {}
  for i, kind in enumerate(cfg.blocks):
    if kind not in known:
      raise ConfigError(f"model.blocks[{i}]: unknown block {kind!r}; {nearest(kind, known)}")
    mixer = attention.declare(cfg) if kind in ATTENTION else fast_weights.declare(cfg, kind)
    declared[str(i)] = {"norm": params.scale(d), "mixer": mixer}
    if i in cfg.without_mlp:
      continue
    declared[str(i)] |= {
      "mlp_norm": params.scale(d),
      "mlp": {
        "gate": params.matrix(d, hidden, axes=("w_embed", "mlp")),
        "up": params.matrix(d, hidden, axes=("w_embed", "mlp")),
        "down": params.matrix(hidden, d, axes=("mlp", "w_embed")),
      },
    }
    if cfg.mlp_bias:
      for name, width, axis in (("gate", hidden, "mlp"), ("up", hidden, "mlp"), ("down", d, None)):
        declared[str(i)]["mlp"][f"{name}_bias"] = params.bias(width, axes=(axis,))
    if cfg.norm_placement == "sandwich":
      declared[str(i)] |= {"post_norm": params.scale(d), "mlp_post_norm": params.scale(d)}
  return declared


def init_state(cfg: ModelConfig, batch: int) -> State:
  """Fast weights of every fast-weight block at the start of a sequence."""
  kinds = [(i, kind) for i, kind in enumerate(cfg.blocks) if kind not in ATTENTION]
  return {str(i): fast_weights.init_state(cfg, batch, kind) for i, kind in kinds}


def attention_blocks(cfg: ModelConfig) -> list[str]:
  """Names of the blocks whose memory is a cache."""
  return [str(i) for i, kind in enumerate(cfg.blocks) if kind in ATTENTION]


def init_kept(cfg: ModelConfig, batch: int) -> State:
  """What every attention block is left with before the first window, under sliding eviction; else nothing."""
  if cfg.eviction != "sliding":
    return {}
  return {i: attention.init_kept(cfg, batch) for i in attention_blocks(cfg)}


def init_cache(cfg: ModelConfig, batch: int, state: State | None = None) -> Cache:
  """A window of which nothing is read yet, for every attention block; behind what `state` kept.

  There is one for every pass awake that has a cache of its own.
  """
  kept = {i: s for i, s in (state or {}).items() if isinstance(s, attention.Kept)}
  passes = cfg.predict_passes if cfg.pass_cache == "own" else 1
  size = len(cfg.blocks)
  return {
    str(u * size + int(i)): attention.init_cache(cfg, batch, kept.get(i))
    for u in range(passes)
    for i in attention_blocks(cfg)
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
  norm = functools.partial(layers.rms_norm, eps=cfg.norm_eps, cast=cfg.norm_cast)
  for i, kind in list(enumerate(cfg.blocks))[first:last]:
    name = str(i)

    def block(weights, h, memory, kind=kind):
      x = norm(h, weights["norm"])
      if kind in ATTENTION:
        near = cfg.attention.swa_window if kind == "swa" else None
        mixed, memory = attention.attention(weights["mixer"], x, cfg, valid=valid, cache=memory, near=near)
      else:
        rule, squash = fast_weights.RULES[kind], fast_weights.SQUASH.get(kind, jax.nn.silu)
        mixed, memory = fast_weights.fast_weights(
          weights["mixer"], x, memory, cfg, rule, valid=valid, squash=squash
        )
      h = h + (norm(mixed, weights["post_norm"]) if "post_norm" in weights else mixed)
      if "mlp" in weights:
        out = layers.swiglu(weights["mlp"], norm(h, weights["mlp_norm"]))
        h = h + (norm(out, weights["mlp_post_norm"]) if "mlp_post_norm" in weights else out)
      return h, memory

    if remat:
      block = jax.checkpoint(block)
    if kind in ATTENTION and cache is not None:
      h, cache[name] = block(weights[name], h, cache[name])
    elif name in state:
      h, state[name] = block(weights[name], h, state[name])
    else:
      h, _ = block(weights[name], h, None)
  return h, state, cache
