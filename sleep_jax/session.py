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
    tokens: [B, L] int32, the open window; from `filled` on not set yet. On the host.
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


def due(filled: int, sleep_cfg: SleepConfig) -> int:
  """Passes of a spread sleep that are made once `filled` tokens behind its window are read.

  >>> [due(token, SleepConfig(num_passes=2, spread=5)) for token in range(6)]
  [0, 0, 0, 1, 1, 2]
  """
  return filled * sleep_cfg.num_passes // (sleep_cfg.spread or 1)


def state_bytes(session: Session) -> int:
  """Counts the bytes that outlive a window: fast weights, convolution inputs, what sliding eviction keeps."""
  return sum(x.nbytes for x in jax.tree.leaves(session.start))
