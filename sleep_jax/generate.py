"""Awake decoding that falls asleep when its window is full.

A session holds what is left of all that was read, however much: the state at the beginning of the open
window, the window's tokens (at most L), and what reading them awake has left so far. When the window is full
and the logits of its last token are given, the model sleeps on it: N passes, from the state with which the
window *began*, as in training. What was read awake is dropped. So nothing that outlives a window depends, to
the bit, on whether the tokens came one by one or all at once, and awake rounding never adds up.

With `sleep.spread` the passes are made while the next tokens are read, so that no token waits for all of
them: `spread.py` says what is then answered, and from what.

    session = start(cfg, sleep_cfg, batch=1)
    session = read(weights, prompt, session, cfg, sleep_cfg)
    for token, session in generate(weights, session, cfg, sleep_cfg, count=100, key=jax.random.key(0)):
      ...
"""

import dataclasses
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import jax
import numpy as np

from sleep_jax import decoding, model, prompts, spread
from sleep_jax import sampling as ways
from sleep_jax.config import ConfigError, ModelConfig, SleepConfig
from sleep_jax.prompts import Tokens
from sleep_jax.sampling import SamplingConfig, sample
from sleep_jax.session import Session, due, noted, pads_first, start, state_bytes, torn, with_noted

__all__ = [
  "ENDED", "NotFiniteError", "SamplingConfig", "Session", "draw", "generate", "read", "read_parts", "sample",
  "start", "state_bytes"
]  # fmt: skip

ENDED = -1  # in place of a token, in a row that has ended


class NotFiniteError(RuntimeError):
  """Logits or fast weights are NaN or infinite: one line that says from which token on."""


# Called with what was done, the session after it, and the seconds that it took: `awake`, `asleep` or, of a
# sleep that is spread, `pass` for each pass (or several at once) but the last.
Watch = Callable[[str, Session, float], None]


def read(
  weights: model.Params,
  tokens: Tokens,
  session: Session,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
  *,
  valid: np.ndarray | None = None,
  watch: Watch | None = None,
  reuse: bool = False,
) -> Session:
  """Reads the next tokens, and sleeps on every window that they fill.

  Only the logits of the last token are computed: windows that are filled before it are slept on without being
  read awake. The rest is read in pieces of powers of two, so that at most log2(L) + 1 programs are compiled
  for it. Memory does not depend on how many tokens there are.

  Args:
    tokens: whole numbers [B, T], T >= 1. A list of B lists of different lengths is padded on the left.
    session: what was read before.
    valid: [B, T] bool, False for pads; a shorter sequence is padded on the left. Pads take room in the
      window, and so move a row's borders: otherwise they are as if they were not there, wherever they stand.
      A row is read as it is alone if whole windows of it are pads. None: all valid.
    watch: called after every step, awake or asleep; the host waits for the step's end before.
    reuse: `session` is not needed any more: one token is added to its cache in place, which saves a copy of
      the cache. It must not be used afterwards.

  Returns:
    The session after the last token, `logits` the prediction of each row's own last one.

  Raises:
    ConfigError: if there is no token, or one that the vocabulary lacks.
    ValueError: if the shapes do not fit the session's B rows.
    TypeError: if tokens are no whole numbers.
    NotFiniteError: if the logits or the fast weights are not finite any more.
  """
  tokens, valid = prompts.checked(tokens, valid, session.tokens.shape[0], cfg.vocab_size)
  return _read(weights, iter([(tokens, valid)]), session, cfg, sleep_cfg, watch, reuse)


def read_parts(
  weights: model.Params,
  parts: Iterable[Tokens],
  session: Session,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
  *,
  watch: Watch | None = None,
) -> Session:
  """Reads tokens that come in parts, exactly as `read` reads all of them joined.

  It holds one window and one part at a time, so a text of any length can be read as it arrives.

  Args:
    parts: of the tokens, each as `read` takes it, all of them valid; cut anywhere.
    session, watch: as for `read`.

  Raises:
    ConfigError, ValueError, TypeError, NotFiniteError: as `read`; and whatever `parts` raises.
  """
  rows = session.tokens.shape[0]
  checked = (prompts.checked(part, None, rows, cfg.vocab_size) for part in parts)
  return _read(weights, checked, session, cfg, sleep_cfg, watch)


def generate(
  weights: model.Params,
  session: Session,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
  *,
  count: int,
  key: jax.Array,
  sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
  end_tokens: Collection[int] = (),
  watch: Watch | None = None,
  reuse: bool = False,
) -> Iterator[tuple[np.ndarray, Session]]:
  """Draws tokens, each of which is read before it is yielded.

  What is drawn depends on `key` and on the tokens read before alone: a session that was stored and resumed
  goes on as if it had never stopped.

  Args:
    session: with at least one token read.
    count: tokens to draw.
    key, sampling: as for `draw`; the key is the whole sequence's, not this call's.
    end_tokens: a row ends with one of these, unless its `sampling.stop_at_end` is False. It then reads pads
      until all rows have ended.
    watch: as for `read`.
    reuse: each session that is yielded must not be used once the next one was asked for; see `read`.

  Yields:
    The tokens [B] int32, `ENDED` in rows that have ended, and the session that has read them.

  Raises:
    ConfigError: if nothing was read yet.
    NotFiniteError: as `read`.
  """
  rows = session.tokens.shape[0]
  stops = np.array([one.stop_at_end for one in ways.of_rows(sampling, rows)])
  going = np.ones(rows, bool)
  for i in range(count):
    token = np.where(going, draw(session, key, sampling), 0)
    session = read(
      weights,
      token[:, None],
      session,
      cfg,
      sleep_cfg,
      valid=going[:, None],
      watch=watch,
      reuse=reuse and i > 0,
    )
    yield np.where(going, token, ENDED), session
    going &= ~(stops & np.isin(token, list(end_tokens)))
    if not going.any():
      return


def draw(
  session: Session, key: jax.Array, sampling: SamplingConfig | Sequence[SamplingConfig] | None = None
) -> np.ndarray:
  """Draws the next token of every row; the session has not read it.

  Args:
    session: with at least one token read.
    key, sampling: as for `sampling.draw`; the key is the whole sequence's.

  Returns:
    [B] int32.

  Raises:
    ConfigError: if nothing was read yet.
    ValueError: as `sampling.draw`.
  """
  if session.tokens_read == 0:
    raise ConfigError("prompt: has no tokens")
  return ways.draw(session.logits, session.tokens_read, key, sampling)


def _read(
  weights: model.Params,
  parts: Iterator[tuple[np.ndarray, np.ndarray]],
  session: Session,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
  watch: Watch | None,
  reuse: bool = False,
) -> Session:
  """Sleeps on windows as they fill, and reads awake what no further token follows."""
  tokens, valid = (
    np.zeros((session.tokens.shape[0], 0), np.int32),
    np.zeros((session.tokens.shape[0], 0), bool),
  )
  for part, real in parts:
    tokens, valid = np.concatenate([tokens, part], axis=1), np.concatenate([valid, real], axis=1)
    session, tokens, valid = _slept_through(weights, tokens, valid, session, cfg, sleep_cfg, watch)
  if tokens.shape[1] == 0:
    raise ConfigError("prompt: has no tokens")
  begun = time.perf_counter()
  if 0 < (rest := cfg.window - session.filled) < tokens.shape[1]:  # spread: the window stays readable
    session = _read_awake(weights, tokens[:, :rest], valid[:, :rest], session, cfg, sleep_cfg, False)
    session = spread.fallen_asleep(noted(session, tokens[:, :rest], valid[:, :rest]))
    tokens, valid = tokens[:, rest:], valid[:, rest:]
  filled = session.filled + tokens.shape[1]
  sleeps = filled == cfg.window or (
    session.night is not None and due(filled, sleep_cfg) > session.night.passes
  )
  # If the sleep that follows fails, the session before must be as it was; an empty cache is one array twice.
  reuse = reuse and session.filled > 0 and not sleeps
  session = noted(_read_awake(weights, tokens, valid, session, cfg, sleep_cfg, reuse), tokens, valid)
  if not np.all(decoding.finite(session.logits)):
    raise NotFiniteError(_where_not_finite(weights, session, cfg))
  if watch is not None:
    watch("awake", session, time.perf_counter() - begun)
  if session.filled == cfg.window:
    if sleep_cfg.spread:
      return spread.fallen_asleep(session)
    return _fall_asleep(weights, session, cfg, sleep_cfg, watch)
  return _pass_by_pass(weights, due(filled, sleep_cfg), session, cfg, sleep_cfg, watch) if sleeps else session


def _slept_through(
  weights: model.Params,
  tokens: np.ndarray,
  valid: np.ndarray,
  session: Session,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
  watch: Watch | None,
) -> tuple[Session, np.ndarray, np.ndarray]:
  """Makes all sleeps that are over before the last of the tokens is read: the session, and the tokens left.

  They fit the open window or, where a sleep is spread, reach up to K tokens behind it. Where a token would
  follow pads that follow tokens, the window is begun anew with the pads in front, and no sleep stays spread.
  """
  late = sleep_cfg.spread or 0
  while True:
    ahead = session.filled + tokens.shape[1]
    parted = ahead <= cfg.window + late and torn(session, valid, cfg.eviction)
    room = 0 if parted else late
    if session.behind and ahead > room:
      if session.night is not None:
        session = _pass_by_pass(weights, sleep_cfg.num_passes, session, cfg, sleep_cfg, watch)
      tokens, valid = with_noted(session, tokens, valid)
      session = spread.awake_again(session, cfg, sleep_cfg)
    elif ahead > cfg.window + room:
      rest = cfg.window - session.filled
      session = noted(session, tokens[:, :rest], valid[:, :rest])
      ending = np.asarray(valid[:, :rest].any(axis=1) & ~valid[:, rest:].any(axis=1))
      session = _last_logits(weights, session, ending, cfg)
      tokens, valid = tokens[:, rest:], valid[:, rest:]
      if late:
        session = spread.fallen_asleep(session)
        session = _pass_by_pass(weights, sleep_cfg.num_passes, session, cfg, sleep_cfg, watch)
        session = spread.awake_again(session, cfg, sleep_cfg)
      else:
        session = _fall_asleep(weights, session, cfg, sleep_cfg, watch)
    elif parted:
      tokens, valid = pads_first(*with_noted(session, tokens, valid))
      pads = np.asarray(np.sum(~valid, axis=1, dtype=np.int32))
      return spread.awake_again(session, cfg, sleep_cfg, pads), tokens, valid
    else:
      return session, tokens, valid


def _last_logits(weights: model.Params, session: Session, ending: np.ndarray, cfg: ModelConfig) -> Session:
  """The session, its window full, with the logits behind it of the rows [B] bool that end there."""
  if not ending.any():
    return session
  tokens, valid = pads_first(session.tokens, session.valid)
  logits = decoding.whole_window(weights, tokens, valid, session.start, cfg)
  return dataclasses.replace(session, logits=decoding.where(ending[:, None], logits, session.logits))


def _pass_by_pass(
  weights: model.Params,
  passes: int,
  session: Session,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
  watch: Watch | None,
) -> Session:
  """Goes on with a spread sleep, up to so many passes in all."""
  begun = time.perf_counter()
  after = spread.advanced(weights, session, passes, cfg, sleep_cfg)
  if after.night is None and not decoding.finite(after.start):
    whole = spread.joined(session)
    raise NotFiniteError(_where_not_finite(weights, dataclasses.replace(whole, filled=cfg.window), cfg))
  if watch is not None:
    jax.block_until_ready(after)
    watch("pass" if after.night is not None else "asleep", after, time.perf_counter() - begun)
  return after


def _pieces(length: int) -> list[int]:
  """A number as powers of two, largest first."""
  return [1 << i for i in reversed(range(length.bit_length())) if length >> i & 1]


def _read_awake(
  weights: model.Params,
  tokens: np.ndarray,
  valid: np.ndarray,
  session: Session,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
  reuse: bool,
) -> Session:
  """Reads tokens for which the open window has room; they are not noted yet. In a row of pads logits stay."""
  fast, cache, logits, at = session.fast, session.cache, session.logits, 0
  whole = tokens.shape[1] == cfg.window and not sleep_cfg.spread
  if whole:  # a cache would be filled to be dropped
    logits = decoding.whole_window(weights, tokens, valid, session.start, cfg)
  for length in [] if whole else _pieces(tokens.shape[1]):
    piece = np.s_[:, at : at + length]
    if length == 1 and decoding.by_rows(cfg):
      logits, fast, rows = decoding.token(weights, tokens[piece], valid[piece], fast, cache, cfg)
      cache = (decoding.appended_in_place if reuse and tokens.shape[1] == 1 else decoding.appended)(
        cache, rows
      )
    else:
      scan = sleep_cfg.loops == "scan"
      logits, fast, cache = decoding.piece(weights, tokens[piece], valid[piece], fast, cache, cfg, scan)
    at += length
  read = valid.any(axis=1, keepdims=True)
  if not read.all():
    logits = decoding.where(read, logits, session.logits)
  return dataclasses.replace(session, fast=fast, cache=cache, logits=logits)


def _fall_asleep(
  weights: model.Params, session: Session, cfg: ModelConfig, sleep_cfg: SleepConfig, watch: Watch | None
) -> Session:
  """Sleeps on the full window, and opens the next one."""
  begun = time.perf_counter()
  tokens, valid = pads_first(session.tokens, session.valid)
  state, fast, cache = decoding.asleep(weights, tokens, valid, session.start, cfg, sleep_cfg)
  if not decoding.finite(state):
    raise NotFiniteError(_where_not_finite(weights, session, cfg))
  after = dataclasses.replace(
    session,
    start=state,
    fast=fast,
    cache=cache,
    tokens=np.zeros_like(session.tokens),
    valid=np.zeros_like(session.valid),
    filled=0,
    windows=session.windows + 1,
  )
  if watch is not None:
    watch("asleep", after, time.perf_counter() - begun)
  return after


def _where_not_finite(weights: model.Params, session: Session, cfg: ModelConfig) -> str:
  """Says which token of the open window is the first whose logits are not finite; reads them one by one."""
  if session.night is not None:
    session = spread.joined(session)
  rows, before = session.tokens.shape[0], session.windows * cfg.window
  fast, cache = model.open_window(session.start, cfg, rows, room=max(0, session.filled - cfg.window))
  for t in range(session.filled):
    at = np.s_[:, t : t + 1]
    logits, fast, cache = decoding.piece(
      weights, session.tokens[at], session.valid[at], fast, cache, cfg, False
    )
    if not np.all(decoding.finite(logits)):
      return f"logits are not finite from token {before + t + 1} on"
  return f"the fast weights are not finite after sleep on tokens {before + 1}..{before + session.filled}"
