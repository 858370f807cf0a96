"""Awake decoding that falls asleep when its window is full.

A session is all that is left of what was read, however much that was: the state at the beginning of the open
window, the window's tokens (at most L), and what reading them awake has left so far. When the window is full
and the logits of its last token are given, the model sleeps on it: N passes, from the state with which the
window *began*, as in training. What was read awake is dropped. How the tokens came in, one by one or all at
once, therefore matters to nothing that outlives the window, to the bit, and awake rounding never adds up.

    session = start(cfg, sleep_cfg, batch=1)
    session = read(weights, prompt, session, cfg, sleep_cfg)
    for token, session in generate(weights, session, cfg, sleep_cfg, count=100, key=jax.random.key(0)):
      ...
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Annotated, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import config, looped, model, sharding
from sleep_jax.config import ConfigError, ModelConfig, SleepConfig
from sleep_jax.fast_weights import FastWeights


@flax.struct.dataclass
class Session:
  """B sequences in the middle of being read; a value: reading gives a new one.

  Attributes:
    start: the state with which the open window began, what sleep starts from.
    fast: fast weights after the window's tokens so far, awake.
    cache: attention's, of the window's tokens so far; under sliding eviction behind what was kept.
    logits: [B, vocab] float32, of the token after the last one read; zero before the first.
    tokens: [B, L] int32, the open window; from `filled` on not set yet. On the host.
    valid: [B, L] bool, False for pads and what is not set. On the host.
    filled: tokens in the open window, 0..L - 1.
    windows: windows slept on.
  """

  start: model.State
  fast: dict[str, FastWeights]
  cache: looped.Cache
  logits: jax.Array
  tokens: np.ndarray
  valid: np.ndarray
  filled: int = flax.struct.field(pytree_node=False)
  windows: int = flax.struct.field(pytree_node=False)

  @property
  def tokens_read(self) -> int:
    """Tokens read in all, pads included."""
    return self.windows * self.tokens.shape[1] + self.filled


# What was done (`awake` or `asleep`), the session after it, and the seconds that it took.
Watch = Callable[[str, Session, float], None]


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How the next token is drawn.

  Attributes:
    temperature: logits are divided by it; 0: the likeliest token always.
    top_k: only the k likeliest tokens are drawn. None: all.
    top_p: only the likeliest tokens that together reach this probability, of what `top_k` left. None: all.
  """

  PATH: ClassVar[str] = "sampling"

  temperature: config.NotNegative = 0.0
  top_k: config.Count | None = None
  top_p: Annotated[float, config.Bounds(above=0, most=1)] | None = None

  def __post_init__(self):
    config.check_fields(self)


def start(cfg: ModelConfig, sleep_cfg: SleepConfig, batch: int = 1) -> Session:
  """The session of B sequences of which nothing is read yet."""
  state = model.init_state(cfg, batch, sleep_cfg)
  fast, cache = model.open_window(state, cfg, batch)
  return Session(
    start=state,
    fast=fast,
    cache=cache,
    logits=jnp.zeros((batch, cfg.vocab_size), jnp.float32),
    tokens=np.zeros((batch, cfg.window), np.int32),
    valid=np.zeros((batch, cfg.window), bool),
    filled=0,
    windows=0,
  )


def read(
  weights: model.Params,
  tokens: np.ndarray,
  session: Session,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
  *,
  valid: np.ndarray | None = None,
  watch: Watch | None = None,
) -> Session:
  """Reads the next tokens, and sleeps on every window that they fill.

  Only the logits of the last token are computed: windows that are filled before it are slept on without being
  read awake. What is left is read in pieces of powers of two, so that no more than log2(L) + 1 programs are
  compiled for it. Memory does not depend on how many tokens there are.

  Args:
    tokens: [B, T] int32, T >= 1.
    session: what was read before.
    valid: [B, T] bool, False for pads; a shorter sequence is padded on the left. Pads take room in the
      window, so a row is read as it is alone if whole windows of it are pads. None: all valid.
    watch: is called after every step, awake or asleep, and makes the host wait for its end.

  Returns:
    The session after the last token, `logits` its prediction.

  Raises:
    ConfigError: if there is no token, or one that the vocabulary lacks.
  """
  tokens = np.asarray(tokens, np.int32)
  valid = np.ones(tokens.shape, bool) if valid is None else np.asarray(valid, bool)
  _check(tokens, valid, session, cfg)
  for at, stop in _windows(session.filled, tokens.shape[1], cfg.window):
    part, real = tokens[:, at:stop], valid[:, at:stop]
    if stop == tokens.shape[1]:
      session = _timed("awake", watch, lambda: _read_awake(weights, part, real, session, cfg))  # noqa: B023
    session = _noted(session, part, real)
    if session.filled == cfg.window:
      session = _timed("asleep", watch, lambda: _fall_asleep(weights, session, cfg, sleep_cfg))  # noqa: B023
  return session


def generate(
  weights: model.Params,
  session: Session,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
  *,
  count: int,
  key: jax.Array,
  sampling: SamplingConfig | None = None,
  watch: Watch | None = None,
) -> Iterator[tuple[np.ndarray, Session]]:
  """Draws tokens, each of which is read before it is given out.

  What is drawn depends on `key` and on the tokens read before alone: a session that was stored and resumed
  goes on as if it had never stopped.

  Args:
    session: with at least one token read.
    count: tokens to draw.
    key: of the whole sequence, not of this call.
    sampling: how they are drawn. None: the likeliest.
    watch: as for `read`.

  Yields:
    The tokens [B] int32, and the session that has read them.

  Raises:
    ConfigError: if nothing was read yet.
  """
  if session.tokens_read == 0:
    raise ConfigError("prompt: has no tokens")
  sampling = sampling or SamplingConfig()
  for _ in range(count):
    token = np.asarray(_sample(session.logits, jax.random.fold_in(key, session.tokens_read), sampling))
    session = read(weights, token[:, None], session, cfg, sleep_cfg, watch=watch)
    yield token, session


def sample(logits: jax.Array, key: jax.Array, sampling: SamplingConfig) -> jax.Array:
  """Draws one token a row; of equally likely ones those with the lower numbers come first.

  Args:
    logits: [B, vocab] float32.
    key: for this token.

  Returns:
    [B] int32.
  """
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  order = jnp.argsort(-logits, axis=-1, stable=True)
  ranked = jnp.take_along_axis(logits, order, axis=-1) / sampling.temperature
  if sampling.top_k is not None:
    ranked = jnp.where(jnp.arange(ranked.shape[-1]) < sampling.top_k, ranked, -jnp.inf)
  if sampling.top_p is not None:
    shares = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    ranked = jnp.where(before < sampling.top_p, ranked, -jnp.inf)
  rank = jax.random.categorical(key, ranked, axis=-1)
  return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)


def state_bytes(session: Session) -> int:
  """Bytes that survive the window: fast weights, convolution inputs and what sliding eviction keeps."""
  return sum(x.nbytes for x in jax.tree.leaves(session.start))


def _check(tokens: np.ndarray, valid: np.ndarray, session: Session, cfg: ModelConfig) -> None:
  rows = session.tokens.shape[0]
  if tokens.ndim != 2 or tokens.shape[0] != rows or valid.shape != tokens.shape:
    raise ValueError(f"tokens and valid must be [{rows}, T], got {tokens.shape} and {valid.shape}")
  if tokens.shape[1] == 0:
    raise ConfigError("prompt: has no tokens")
  low, high = int(tokens.min()), int(tokens.max())
  if low < 0 or high >= cfg.vocab_size:
    raise ConfigError(f"prompt: tokens must lie in 0..{cfg.vocab_size - 1}, there are some in {low}..{high}")


def _windows(filled: int, length: int, window: int) -> list[tuple[int, int]]:
  """Where T tokens are cut if `filled` of the first window are there already: [start, stop) each."""
  cuts = [0, *range(window - filled, length, window), length]
  return list(zip(cuts, cuts[1:], strict=False))


def _pieces(length: int) -> list[int]:
  """A number as powers of two, largest first."""
  return [1 << i for i in reversed(range(length.bit_length())) if length >> i & 1]


def _read_awake(
  weights: model.Params, tokens: np.ndarray, valid: np.ndarray, session: Session, cfg: ModelConfig
) -> Session:
  """Reads tokens for which the open window has room; they are not noted yet."""
  if tokens.shape[1] == cfg.window:  # a cache would be filled to be dropped
    return session.replace(logits=_whole_window(weights, tokens, valid, session.start, cfg))
  fast, cache, logits, at = session.fast, session.cache, session.logits, 0
  for length in _pieces(tokens.shape[1]):
    piece = np.s_[:, at : at + length]
    logits, fast, cache = _piece(weights, tokens[piece], valid[piece], fast, cache, cfg)
    at += length
  return session.replace(fast=fast, cache=cache, logits=logits)


def _noted(session: Session, tokens: np.ndarray, valid: np.ndarray) -> Session:
  """The session with tokens added to its open window."""
  filled = session.filled + tokens.shape[1]
  window, real = session.tokens.copy(), session.valid.copy()
  window[:, session.filled : filled], real[:, session.filled : filled] = tokens, valid
  return session.replace(tokens=window, valid=real, filled=filled)


def _fall_asleep(
  weights: model.Params, session: Session, cfg: ModelConfig, sleep_cfg: SleepConfig
) -> Session:
  """Sleeps on the full window, and opens the next one."""
  state, fast, cache = _asleep(weights, session.tokens, session.valid, session.start, cfg, sleep_cfg)
  return session.replace(
    start=state,
    fast=fast,
    cache=cache,
    tokens=np.zeros_like(session.tokens),
    valid=np.zeros_like(session.valid),
    filled=0,
    windows=session.windows + 1,
  )


def _timed(what: str, watch: Watch | None, step: Callable[[], Session]) -> Session:
  """Takes a step and, if somebody watches, waits for its end."""
  if watch is None:
    return step()
  begun = time.perf_counter()
  session = jax.block_until_ready(step())
  watch(what, session, time.perf_counter() - begun)
  return session


def _placed(*rows: jax.Array) -> list[jax.Array]:
  """Arrays [B, T] that come from the host, split over the mesh as batches are."""
  return [sharding.constrain(x, ("batch", "seq")) for x in rows]


@functools.partial(jax.jit, static_argnames="cfg")
def _piece(weights, tokens, valid, fast, cache, cfg):
  tokens, valid = _placed(tokens, valid)
  logits, fast, cache = model.decode(
    weights, tokens, fast, cache, cfg, reads=(tokens.shape[1] - 1,), valid=valid
  )
  return logits[:, 0], fast, cache


@functools.partial(jax.jit, static_argnames="cfg")
def _whole_window(weights, tokens, valid, state, cfg):
  tokens, valid = _placed(tokens, valid)
  return model.predict(weights, tokens, state, cfg, reads=(tokens.shape[1] - 1,), valid=valid)[0][:, 0]


@functools.partial(jax.jit, static_argnames=("cfg", "sleep_cfg"))
def _asleep(weights, tokens, valid, state, cfg, sleep_cfg):
  tokens, valid = _placed(tokens, valid)
  state = model.consolidate(weights, tokens, state, cfg, sleep_cfg, valid=valid)
  return state, *model.open_window(state, cfg, tokens.shape[0])


_sample = jax.jit(sample, static_argnames="sampling")
