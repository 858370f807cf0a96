"""The whole model: windows, eviction, consolidation, prediction and loss. Algorithm 1 of arXiv 2605.26099.

A sequence is cut into windows of L tokens. A window without a loss is slept on and forgotten; what
it left lies in the fast weights. A window with a loss is read awake, in one pass; with `sleep.when` =
`always` it is then slept on too, and that reading is the first pass of its sleep, as in generation. Which is
which is planned from the static layout of the loss before anything is traced.
"""

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import (
  blocks,
  carry,
  consolidation,
  fast_weights,
  flat,
  layers,
  looped,
  params,
  products,
  sharding,
)
from sleep_jax.config import ModelConfig, SleepConfig, check_sleep
from sleep_jax.sleep import loop, read_and_sleep, sleep
from sleep_jax.windows import Batch, Plan, Segment, answer_positions, check_plan, with_whole_windows

Params = dict[str, Any]
State = carry.State
Arranged = consolidation.Arranged
arrange = consolidation.arrange


def declare(cfg: ModelConfig) -> dict[str, Any]:
  """All slow weights of the model, as a nested dict of `params.Weight`."""
  d, vocab = cfg.embed_dim, cfg.vocab_size
  declared = {
    "embed": params.Weight((vocab, d), ("vocab", None), params.normal(cfg.embed_std)),
    "blocks": blocks.declare(cfg),
    "final_norm": params.scale(d, zero=cfg.norm_zero_centered),
  }
  if cfg.embed_norm:
    declared["embed_norm"] = params.scale(d, zero=cfg.norm_zero_centered)
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


def embed(weights: Params, tokens: jax.Array, cfg: ModelConfig, valid: jax.Array | None = None) -> jax.Array:
  """Token embeddings [B, T, D] in the activation dtype; 0 where `valid` [B, T] is False, a pad."""
  layout = sharding.spec(("batch", "seq", "embed"), (*tokens.shape, cfg.embed_dim))
  h = weights["embed"].at[tokens].get(out_sharding=layout).astype(cfg.dtype)
  if cfg.embed_norm:
    h = layers.norm(h, weights["embed_norm"], cfg)
  return layers.without_pads(h, valid)


def logits_of(weights: Params, h: jax.Array, cfg: ModelConfig) -> jax.Array:
  """Logits [B, T, vocab] of the last hidden states, float32."""
  head = weights["embed"] if cfg.tied_embeddings else weights["head"]
  h = looped.final_norm(weights, h, cfg)
  axes, rounded = ("batch", "seq", "vocab"), cfg.rounded if h.shape[1] > 1 else None
  return products.dense(h, head, axes, turned=cfg.tied_embeddings, rounded=rounded).astype(jnp.float32)


def consolidate(
  weights: Params,
  tokens: jax.Array,
  state: State,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
  *,
  valid: jax.Array | None = None,
  arranged: Arranged | None = None,
) -> State:
  """Sleeps on one window. Its hidden states are dropped, and so is the attention cache, but for what is kept.

  Args:
    tokens: [B, T] int32, 1 <= T <= L.
    state: fast weights on entry, and what was kept.
    valid: [B, T] bool, False for pads. None: all valid.
    arranged: from `arrange`, if that was done before.

  Returns:
    The state after N passes.

  Raises:
    ValueError: if the tokens are no window.
    AssertionError: if `valid` has another shape.
  """
  _check_window(tokens, valid, cfg)
  arranged = arranged or arrange(weights, cfg, sleep_cfg)
  return _consolidate(weights, arranged, tokens, state, cfg, sleep_cfg, (), valid)[1]


def _consolidate(
  weights: Params,
  arranged: Arranged,
  tokens: jax.Array,
  state: State,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
  reads: Sequence[int],
  valid: jax.Array | None,
) -> tuple[jax.Array | tuple[()], State]:
  """Logits [B, M, vocab] at `reads`, read awake in the first pass, and the state after the last one.

  The blocks behind the repeated ones (coda) run twice where something is read: after the first pass for the
  logits, and what they write then is dropped; after the last pass for the memory.
  """
  parts = consolidation.parts(weights, arranged, state, cfg, sleep_cfg, valid)

  def one_pass(*before):
    h, repeated, kept = parts.repeat(*before)
    return parts.between(h), repeated, kept

  def awake(*before):
    h, repeated, kept = parts.repeat(*before)
    return (parts.between(h), repeated, kept), (h, repeated)

  with jax.named_scope("asleep"):
    begun = parts.fall(embed(weights, tokens, cfg, valid))
    given = begun.h, begun.repeated, begun.kept
    how: Any = {
      "num_passes": sleep_cfg.num_passes,
      "backprop_passes": sleep_cfg.backprop_passes,
      "remat": sleep_cfg.remat in ("pass", "window", "offload"),
      "unroll": sleep_cfg.loops == "unroll",
    }
    logits = ()
    if reads:
      (h, repeated), *asleep = read_and_sleep(awake, one_pass, *given, **how)
      with jax.named_scope("awake"):
        h, _ = parts.coda(h, begun.prelude, repeated)
        (h,) = _at([h], reads)
        logits = logits_of(weights, h, cfg)
    else:
      asleep = sleep(one_pass, *given, **how)
    h, repeated, kept = asleep
    return logits, parts.wake(consolidation.Asleep(h, begun.prelude, repeated, kept))


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
    tokens: [B, T] int32, 1 <= T <= L.
    state: fast weights on entry, and what was kept.
    reads: positions whose logits are wanted. None: all.
    valid: [B, T] bool, False for pads. None: all valid.
    remat: keep only each block's input for the way back.

  Returns:
    Logits [B, M, vocab] float32 at `reads`, and the state after the window.

  Raises:
    ValueError: if the tokens are no window.
    AssertionError: if `valid` has another shape.
  """
  _check_window(tokens, valid, cfg)
  return _predict(weights, blocks.arrange(weights["blocks"], cfg), tokens, state, cfg, reads, valid, remat)


def _predict(
  weights: Params,
  groups: tuple[blocks.Group, ...],
  tokens: jax.Array,
  state: State,
  cfg: ModelConfig,
  reads: Sequence[int] | None,
  valid: jax.Array | None,
  remat: bool,
) -> tuple[jax.Array, State]:
  with jax.named_scope("awake"):
    start = carry.open_window(carry.first_pass(state), cfg)
    h = embed(weights, tokens, cfg, valid)
    outs, after, _ = looped.read(weights, groups, h, start, cfg, valid=valid, remat=remat)
    h = looped.exit_hidden(weights, _at(outs, reads), cfg)
    return logits_of(weights, h, cfg), carry.after_window(state, after)


def _check_window(tokens: jax.Array, valid: jax.Array | None, cfg: ModelConfig) -> None:
  """Raises if tokens [B, T] are no window of at most L, or `valid` is of another shape."""
  if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= cfg.window:
    raise ValueError(
      f"tokens: a window is [B, T] with T in 1..{cfg.window} (model.window), got {tokens.shape}"
    )
  if valid is not None:
    chex.assert_shape(valid, tokens.shape)


def _at(outs: list[jax.Array], reads: Sequence[int] | None) -> list[jax.Array]:
  """Selects the positions `reads` of each [B, T, D]; unchanged if that is every position."""
  if reads is None or tuple(reads) == tuple(range(outs[0].shape[1])):
    return outs
  return [h[:, np.asarray(reads, int)] for h in outs]


def open_window(
  state: State, cfg: ModelConfig, batch: int, *, room: int = 0, pads: jax.Array | None = None
) -> tuple[dict[str, fast_weights.FastWeights], looped.Cache]:
  """What `decode` needs to read the next window awake: its fast weights, and a cache behind what was kept.

  Args:
    room, pads: as for `attention.init_cache`.
  """
  start = carry.open_window(carry.first_pass(state), cfg)
  return start.fast, looped.init_cache(cfg, batch, start, room=room, pads=pads)


def decode(
  weights: Params,
  tokens: jax.Array,
  fast: dict[str, fast_weights.FastWeights],
  cache: looped.Cache,
  cfg: ModelConfig,
  *,
  reads: Sequence[int] | None = None,
  valid: jax.Array | None = None,
  scan: bool = False,
) -> tuple[jax.Array, dict[str, fast_weights.FastWeights], looped.Cache]:
  """Reads the next tokens of a window that is already open, awake: one at a time equals all at once.

  Args:
    tokens: [B, T] int32, 1 <= T <= L; the cache must have room for them.
    fast, cache: as the tokens before left them; from `open_window` at first.
    reads: positions among the T whose logits are wanted. None: all.
    valid: [B, T] bool, False for pads. None: all valid.
    scan: as for `blocks.arrange`.

  Returns:
    Logits [B, M, vocab] float32 at `reads`, fast weights and cache.

  Raises:
    ValueError: if the tokens do not fit a window.
    AssertionError: if `valid` has another shape.
  """
  _check_window(tokens, valid, cfg)
  with jax.named_scope("awake"):
    groups, h = blocks.arrange(weights["blocks"], cfg, scan=scan), embed(weights, tokens, cfg, valid)
    outs, after, filled = looped.read(weights, groups, h, State(fast, {}), cfg, valid=valid, cache=cache)
    assert filled is not None  # as a cache was given
    h = looped.exit_hidden(weights, _at(outs, reads), cfg)
    return logits_of(weights, h, cfg), after.fast, filled


def forward(
  weights: Params,
  batch: Batch,
  segments: Plan,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
  *,
  arranged: Arranged | None = None,
) -> tuple[jax.Array, State]:
  """Reads whole sequences: answers in windows with a loss, sleeps on those that the plan names.

  Args:
    batch: B sequences of T tokens.
    segments: from `windows.plan`, for the same T.
    arranged: from `arrange`, if that was done before.

  Returns:
    Logits [B, M, vocab] float32 at `answer_positions(segments)`, and the state at the end.

  Raises:
    ValueError: if the plan is for another length, for longer windows than the model's, or for another
      `sleep.when`.
    AssertionError: if arrays of the batch differ in shape.
  """
  chex.assert_rank(batch.inputs, 2)
  given = [x for x in (batch.targets, batch.loss_mask, batch.valid, batch.begins) if x is not None]
  chex.assert_shape(given, batch.inputs.shape)
  if batch.inputs.shape[1] != (planned := segments[-1].start + segments[-1].length * segments[-1].count):
    raise ValueError(f"the plan is for {planned} tokens, the batch has {batch.inputs.shape[1]}")
  if (longest := max(s.length for s in segments)) > cfg.window:
    raise ValueError(f"the plan has windows of {longest} tokens, model.window is {cfg.window}")
  check_plan(segments, sleep_cfg)
  arranged = arranged or arrange(weights, cfg, sleep_cfg)
  state = init_state(cfg, batch.inputs.shape[0], sleep_cfg)
  if sleep_cfg.flat:
    check_sleep(sleep_cfg, cfg)
    batch, segments = with_whole_windows(batch, segments)
    parts = lambda state, valid: consolidation.parts(weights, arranged, state, cfg, sleep_cfg, valid)  # noqa: E731
    h, state = flat.read(parts, lambda *x: embed(weights, x[0], cfg, x[1]), batch, segments, state, sleep_cfg)
    return logits_of(weights, h, cfg), state
  logits: list[Any] = []
  for segment in segments:
    state, out = _read_segment(weights, arranged, batch, state, segment, cfg, sleep_cfg)
    if segment.reads:
      logits.append(out)
  return jnp.concatenate(logits, axis=1), state


def _read_segment(
  weights: Params,
  arranged: Arranged,
  batch: Batch,
  state: State,
  segment: Segment,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
) -> tuple[State, jax.Array | tuple[()]]:
  """The state after the windows of a segment, and their logits [B, M, vocab]; () if nothing is read."""

  def one_window(state: State, xs: Any) -> tuple[State, Any]:
    tokens, valid, begins = xs
    with jax.named_scope("window"):
      if begins is not None:
        state = carry.begin(state, begins[:, 0])
      if segment.asleep:
        out, state = _consolidate(weights, arranged, tokens, state, cfg, sleep_cfg, segment.reads, valid)
        return state, out
      remat = sleep_cfg.remat != "none"
      out, state = _predict(weights, arranged.all, tokens, state, cfg, segment.reads, valid, remat)
      return state, out

  given = (batch.inputs, batch.valid, batch.begins)
  xs = tuple(None if x is None else flat.cut(x, (segment,)) for x in given)
  unroll = sleep_cfg.loops == "unroll" or segment.count == 1
  if sleep_cfg.remat == "window":
    one_window = jax.checkpoint(one_window, prevent_cse=unroll)
  state, out = loop(one_window, state, xs, length=segment.count, unroll=unroll)
  return state, _joined(out) if segment.reads else out


def _joined(x: jax.Array) -> jax.Array:
  """What each window gave, one behind the other: [W, B, M, ...] -> [B, W M, ...]."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def loss(
  weights: Params,
  batch: Batch,
  segments: Plan,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
  *,
  arranged: Arranged | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Masked cross-entropy in nats a target; `arranged` as for `forward`.

  Returns:
    The mean over all targets of the batch (scalar float32), and the logits [B, M, vocab].
  """
  logits, _ = forward(weights, batch, segments, cfg, sleep_cfg, arranged=arranged)
  where = answer_positions(segments)
  return cross_entropy(logits, batch.targets[:, where], batch.loss_mask[:, where]), logits


def cross_entropy(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
  """sum(mask * -log softmax(logits)[targets]) / sum(mask); scalar float32, 0 if nothing counts."""
  mask = mask.astype(jnp.float32)
  return jnp.sum(nats(logits, targets) * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def nats(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """-log softmax(logits)[targets], [B, M] float32."""
  chosen = jax.nn.one_hot(
    targets, logits.shape[-1], dtype=logits.dtype
  )  # no gather: the vocabulary may be split
  return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(chosen * logits, axis=-1)
