"""The whole model: windows, eviction, consolidation, prediction and loss. Algorithm 1 of arXiv 2605.26099.

A sequence is cut into windows of L tokens. A window without a loss is slept on and forgotten; what
it left lies in the fast weights. A window with a loss is read awake, in one pass. Which is which is
planned from the static layout of the loss before anything is traced.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import blocks, carry, layers, looped, params, sharding
from sleep_jax.config import ModelConfig, SleepConfig
from sleep_jax.sleep import loop, sleep
from sleep_jax.windows import Batch, Plan, Segment, answer_positions

Params = dict[str, Any]
State = carry.State


def declare(cfg: ModelConfig) -> dict[str, Any]:
  """All slow weights of the model, as a nested dict of `params.Weight`."""
  d, vocab = cfg.embed_dim, cfg.vocab_size
  declared = {
    "embed": params.Weight((vocab, d), ("vocab", None), params.normal(cfg.embed_std)),
    "blocks": blocks.declare(cfg),
    "final_norm": params.scale(d),
  }
  if not cfg.tied_embeddings:
    declared["head"] = params.Weight((d, vocab), ("w_embed", "vocab"), params.normal(d**-0.5))
  if cfg.exit_gate:
    gate = params.Weight((d, 1), ("w_embed", None), params.normal(d**-0.5))
    declared["exit_gate"] = {"w": gate, "b": params.bias(1, axes=(None,))}
  return declared


def init(cfg: ModelConfig, key: jax.Array) -> Params:
  """Draws the slow weights, float32."""
  return params.init(declare(cfg), key)


def init_state(cfg: ModelConfig, batch: int, sleep_cfg: SleepConfig | None = None) -> State:
  """The state at the start of a sequence: fast weights zero and, under sliding eviction, caches empty.

  Args:
    sleep_cfg: how the sequence will be slept on; matters with `kept` = `each`, which needs N caches. None:
      the default.
  """
  return carry.init_state(cfg, batch, sleep_cfg or SleepConfig())


def embed(weights: Params, tokens: jax.Array, cfg: ModelConfig) -> jax.Array:
  """Token embeddings [B, T, D] in the activation dtype."""
  layout = sharding.spec(("batch", "seq", "embed"), (*tokens.shape, cfg.embed_dim))
  return weights["embed"].at[tokens].get(out_sharding=layout).astype(cfg.dtype)


def logits_of(weights: Params, h: jax.Array, cfg: ModelConfig) -> jax.Array:
  """Logits [B, T, vocab] of the last hidden states, float32."""
  head = weights["embed"].T if cfg.tied_embeddings else weights["head"]
  h = looped.normed(weights, h, cfg)
  return layers.dense(h, head, ("batch", "seq", "vocab")).astype(jnp.float32)


def consolidate(
  weights: Params,
  tokens: jax.Array,
  state: State,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
  *,
  valid: jax.Array | None = None,
) -> State:
  """Sleeps on one window; its hidden states are dropped, and of its attention cache all that is not kept.

  Args:
    tokens: [B, L] or shorter.
    state: fast weights on entry, and what was kept.
    valid: [B, L] bool, False for pads. None: all valid.

  Returns:
    The state after N passes.
  """
  first, last = sleep_cfg.first_block, sleep_cfg.last_block or len(cfg.blocks)
  unroll, remat = sleep_cfg.loops == "unroll", sleep_cfg.remat
  start = blocks.open_window(carry.of_first_pass(state), cfg)
  own = carry.of_each_pass(state, sleep_cfg.num_passes)

  def run(h, state, **which):
    h, state, _ = blocks.run(weights["blocks"], h, state, cfg, valid=valid, remat=remat != "none", **which)
    return h, state

  def one_pass(h, looped, own):
    before = {} if sleep_cfg.state == "reset" else blocks.reopen(looped, start)
    h, after = run(h, start | before | own, first=first, last=last)
    if cfg.loop_norm:
      h = looped.normed(weights, h, cfg)
    return h, {i: after[i] for i in looped}, {i: after[i] for i in own}

  h, after = run(embed(weights, tokens, cfg), start, last=first)
  h, looped, own = sleep(
    one_pass,
    h,
    {i: s for i, s in after.items() if first <= int(i) < last and i not in own},
    num_passes=sleep_cfg.num_passes,
    backprop_passes=sleep_cfg.backprop_passes,
    remat=remat in ("pass", "window"),
    unroll=unroll,
    own=own,
  )
  _, after = run(h, after | looped, first=last)
  return carry.left(state, after, own)


def predict(
  weights: Params,
  tokens: jax.Array,
  state: State,
  cfg: ModelConfig,
  *,
  reads: Sequence[int] | None = None,
  valid: jax.Array | None = None,
  remat: bool = False,
) -> tuple[jax.Array, State]:
  """Reads one window awake, in a single pass (`predict_passes` for a model that was trained looped).

  Args:
    tokens: [B, L] or shorter.
    state: fast weights on entry, and what was kept.
    reads: positions whose logits are wanted. None: all.
    valid: [B, L] bool, False for pads. None: all valid.
    remat: keep only each block's input for the way back.

  Returns:
    Logits [B, M, vocab] float32 at `reads`, and the state after the window.
  """
  start = blocks.open_window(carry.of_first_pass(state), cfg)
  h = embed(weights, tokens, cfg)
  outs, after, _ = looped.read(weights, h, start, cfg, valid=valid, remat=remat)
  outs = _at(outs, reads)
  return logits_of(weights, looped.leave(weights, outs, cfg), cfg), carry.left(state, after)


def _at(outs: list[jax.Array], reads: Sequence[int] | None) -> list[jax.Array]:
  """Each [B, T, D] at the positions `reads`; as it is where those are all."""
  if reads is None or tuple(reads) == tuple(range(outs[0].shape[1])):
    return outs
  return [h[:, np.asarray(reads)] for h in outs]


def open_window(state: State, cfg: ModelConfig, batch: int) -> tuple[blocks.State, blocks.Cache]:
  """What `decode` needs to read the next window awake: its fast weights, and a cache behind what was kept."""
  start = blocks.open_window(carry.of_first_pass(state), cfg)
  cache = blocks.init_cache(cfg, batch, start)
  return {i: s for i, s in start.items() if i not in cache}, cache


def decode(
  weights: Params,
  tokens: jax.Array,
  state: blocks.State,
  cache: blocks.Cache,
  cfg: ModelConfig,
  *,
  reads: Sequence[int] | None = None,
  valid: jax.Array | None = None,
) -> tuple[jax.Array, blocks.State, blocks.Cache]:
  """Reads the next tokens of a window that is already open, awake: one at a time equals all at once.

  Args:
    tokens: [B, T], T >= 1; together with the cache at most L.
    state, cache: as the tokens before left them; from `open_window` at first.
    reads: positions among the T whose logits are wanted. None: all.
    valid: [B, T] bool, False for pads. None: all valid.

  Returns:
    Logits [B, M, vocab] float32 at `reads`, state and cache.
  """
  h = embed(weights, tokens, cfg)
  outs, state, cache = looped.read(weights, h, state, cfg, valid=valid, cache=cache)
  outs = _at(outs, reads)
  return logits_of(weights, looped.leave(weights, outs, cfg), cfg), state, cache


def forward(
  weights: Params, batch: Batch, segments: Plan, cfg: ModelConfig, sleep_cfg: SleepConfig
) -> tuple[jax.Array, State]:
  """Reads whole sequences: sleeps on windows without a loss, answers in those with one.

  Args:
    batch: B sequences of T tokens.
    segments: from `plan`, for the same T.

  Returns:
    Logits [B, M, vocab] float32 at `answer_positions(segments)`, and the state at the end.
  """
  if batch.inputs.shape[1] != (planned := segments[-1].start + segments[-1].length * segments[-1].count):
    raise ValueError(f"the plan is for {planned} tokens, the batch has {batch.inputs.shape[1]}")
  state, logits = init_state(cfg, batch.inputs.shape[0], sleep_cfg), []
  for segment in segments:

    def windows(x: jax.Array | None, s: Segment = segment) -> jax.Array | None:
      if x is None:
        return None
      part = x[:, s.start : s.start + s.length * s.count]
      return jnp.moveaxis(part.reshape(x.shape[0], s.count, s.length), 1, 0)

    def one_window(state, xs, s: Segment = segment):
      tokens, valid = xs
      if not s.reads:
        return consolidate(weights, tokens, state, cfg, sleep_cfg, valid=valid), ()
      out, state = predict(
        weights, tokens, state, cfg, reads=s.reads, valid=valid, remat=sleep_cfg.remat != "none"
      )
      return state, out

    unroll = sleep_cfg.loops == "unroll" or segment.count == 1
    if sleep_cfg.remat == "window":
      one_window = jax.checkpoint(one_window, prevent_cse=unroll)
    xs = (windows(batch.inputs), windows(batch.valid))
    state, out = loop(one_window, state, xs, length=segment.count, unroll=unroll)
    if segment.reads:  # [W, B, M/W, vocab] -> [B, M, vocab]
      logits.append(jnp.moveaxis(out, 0, 1).reshape(out.shape[1], -1, out.shape[-1]))
  return jnp.concatenate(logits, axis=1), state


def loss(
  weights: Params, batch: Batch, segments: Plan, cfg: ModelConfig, sleep_cfg: SleepConfig
) -> tuple[jax.Array, jax.Array]:
  """Masked cross-entropy in nats a target.

  Returns:
    The mean over all targets of the batch (scalar float32), and the logits [B, M, vocab].
  """
  logits, _ = forward(weights, batch, segments, cfg, sleep_cfg)
  where = answer_positions(segments)
  return cross_entropy(logits, batch.targets[:, where], batch.loss_mask[:, where]), logits


def cross_entropy(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
  """sum(mask * -log softmax(logits)[targets]) / sum(mask); scalar float32, 0 if nothing counts."""
  chosen = jax.nn.one_hot(
    targets, logits.shape[-1], dtype=logits.dtype
  )  # no gather: the vocabulary may be split
  nats = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(chosen * logits, axis=-1)
  mask = mask.astype(jnp.float32)
  return jnp.sum(nats * mask) / jnp.maximum(jnp.sum(mask), 1.0)
