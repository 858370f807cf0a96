"""What a generation holds between two tokens: all that is left of what was read, however much that was."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import consolidation, looped, model
from sleep_jax.config import ModelConfig, SleepConfig, check_spread
from sleep_jax.fast_weights import FastWeights


@flax.struct.dataclass
class Night:
  """A window that is slept on while the tokens behind it are read (`sleep.spread`).

  Attributes:
    tokens: [B, L] int32, the window. On the host.
    valid: [B, L] bool, False for pads. On the host.
    asleep: what the passes that were made left; None before the first.
    passes: how many were made, 0..N - 1.
  """

  tokens: np.ndarray
  valid: np.ndarray
  asleep: consolidation.Asleep | None = None
  passes: int = flax.struct.field(pytree_node=False, default=0)


@flax.struct.dataclass
class Session:
  """B sequences that are being read. It is a value: reading makes a new one.

  Attributes:
    start: the state with which the open window began; sleep starts from it. While there is a `night`, the one
      with which that night's window began.
    fast: fast weights after the window's tokens so far, awake.
    cache: attention's, of the window's tokens so far; under sliding eviction behind what was kept. With
      `behind`, both are of the window before and go on over the open one.
    logits: [B, vocab] float32, of the token after the last one read; zero before the first.
    tokens: [B, L] int32, the open window; from `filled` on not set yet. On the host. A row that went on
      behind pads has them in front.
    valid: [B, L] bool, False for pads and what is not set. On the host.
    filled: tokens in the open window, 0..L - 1.
    windows: windows slept on, that of `night` included.
    night: the sleep that is under way; None if there is none.
    behind: the open window is read as if the one before had not ended: the next token may still be.
  """

  start: model.State
  fast: dict[str, FastWeights]
  cache: looped.Cache
  logits: jax.Array
  tokens: np.ndarray
  valid: np.ndarray
  filled: int = flax.struct.field(pytree_node=False)
  windows: int = flax.struct.field(pytree_node=False)
  night: Night | None = None
  behind: bool = flax.struct.field(pytree_node=False, default=False)

  @property
  def tokens_read(self) -> int:
    """Tokens read in all, pads included."""
    return self.windows * self.tokens.shape[1] + self.filled


def start(cfg: ModelConfig, sleep_cfg: SleepConfig, batch: int = 1) -> Session:
  """Makes the session of B sequences of which nothing is read yet.

  Raises:
    ConfigError: if `sleep.spread` does not fit the window.
  """
  check_spread(sleep_cfg, cfg)
  state = model.init_state(cfg, batch, sleep_cfg)
  fast, cache = model.open_window(state, cfg, batch, room=sleep_cfg.spread or 0)
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


def like(cfg: ModelConfig, sleep_cfg: SleepConfig, batch: int, filled: int, windows: int) -> Session:
  """A session of zeros, with the arrays of one that has read `windows` windows and `filled` tokens."""
  session, spread = start(cfg, sleep_cfg, batch), sleep_cfg.spread or 0
  behind, night = windows > 0 and filled <= spread > 0, None
  if behind and filled < spread:
    asleep, passes = None, due(filled, sleep_cfg)
    if passes:
      h = jnp.zeros((batch, cfg.window, cfg.embed_dim), cfg.dtype)
      asleep = consolidation.begin(h, session.start, cfg, sleep_cfg)
    night = Night(session.tokens, session.valid, asleep, passes)
  return dataclasses.replace(session, filled=filled, windows=windows, night=night, behind=behind)


def pads_first(tokens: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The same tokens [B, T] in the same order, with all pads of a row in front of them; and `valid` likewise.

  >>> tokens, valid = np.array([[1, 0, 2, 0], [3, 4, 5, 6]]), np.array([[1, 0, 1, 0], [1, 1, 1, 1]], bool)
  >>> pads_first(tokens, valid)[0].tolist()
  [[0, 0, 1, 2], [3, 4, 5, 6]]
  """
  order = np.argsort(valid, axis=1, kind="stable")
  return np.take_along_axis(tokens, order, axis=1), np.take_along_axis(valid, order, axis=1)


def noted(session: Session, tokens: np.ndarray, valid: np.ndarray) -> Session:
  """The session with tokens [B, T] added to its open window."""
  filled = session.filled + tokens.shape[1]
  window, real = session.tokens.copy(), session.valid.copy()
  window[:, session.filled : filled], real[:, session.filled : filled] = tokens, valid
  return dataclasses.replace(session, tokens=window, valid=real, filled=filled)


def with_noted(session: Session, tokens: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The tokens of the open window in front of the next ones [B, T], and which are valid."""
  both = (session.tokens, tokens), (session.valid, valid)
  tokens, valid = (np.concatenate([old[:, : session.filled], new], axis=1) for old, new in both)
  return tokens, valid


def torn(session: Session, valid: np.ndarray, eviction: str) -> bool:
  """Whether pads would part a row's tokens in what is read as one window, or part them from what was kept.

  Args:
    valid: [B, T] bool, of the next tokens. A row without any does not go on, and can wait.
    eviction: `ModelConfig.eviction`.
  """
  nights = [session.night.valid] if session.night is not None else []
  before = np.concatenate([*nights, session.valid[:, : session.filled]], axis=1)
  whole = np.concatenate([before, valid], axis=1)
  parted = np.any(whole[:, :-1] & ~whole[:, 1:], axis=1)
  if eviction == "sliding" and session.windows > len(nights):
    parted |= ~before.any(axis=1) & ~whole[:, 0]
  return bool(np.any(parted & valid.any(axis=1)))


def due(filled: int, sleep_cfg: SleepConfig) -> int:
  """Passes of a spread sleep that are made once `filled` tokens behind its window are read.

  >>> [due(token, SleepConfig(num_passes=2, spread=5)) for token in range(6)]
  [0, 0, 0, 1, 1, 2]
  """
  return filled * sleep_cfg.num_passes // (sleep_cfg.spread or 1)


def state_bytes(session: Session) -> int:
  """Counts the bytes that outlive a window: fast weights, convolution inputs, what sliding eviction keeps."""
  return sum(x.nbytes for x in jax.tree.leaves(session.start))
