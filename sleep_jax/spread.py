"""A sleep whose passes are spread over the tokens behind its window: `sleep.spread` = K, N <= K < L.

Without it, the token that fills a window waits for all N passes. With it, no token waits for more than one:

* **The token that fills window w** waits for no pass. Its sleep begins.
* **Tokens 1..K of window w + 1** are read as if window w had not ended: from the state with which w began,
  with the fast weights that reading w awake has written since, and with the attention cache of w, to which
  theirs is added. Under hard eviction such a token sees all of w and the tokens since, up to L + K; under
  sliding eviction and in `swa` blocks it sees as many as ever. What they answer therefore differs from an
  unspread sleep's: it knows w itself, and nothing of the passes. Pass n is made with token ceil(n K / N),
  behind its logits; the first with the blocks in front of the repeated ones, the last with those behind.
* **Token K + 1** is the first that is read with the new memory. The K tokens before it are read anew with
  it, in one piece that is shorter than a window and takes less than a pass. From its logits on, all is as
  if the sleep had not been spread: memory, fast weights, cache and answers are the same, but for rounding.

So the passes see what they always see, the window alone; what is read meanwhile cannot change what they
write. K of L tokens are answered by the old memory, and are read twice. Where more than K tokens are read at
once, those that would be answered so have no logits to give, and the sleep is finished before they are read.
"""

import dataclasses

import numpy as np

from sleep_jax import decoding, model
from sleep_jax.config import ModelConfig, SleepConfig
from sleep_jax.session import Night, Session, pads_first


def fallen_asleep(session: Session) -> Session:
  """The session whose full window is slept on from now on; no pass is made yet."""
  night = Night(*pads_first(session.tokens, session.valid))
  return dataclasses.replace(_emptied(session), windows=session.windows + 1, night=night, behind=True)


def advanced(
  weights: model.Params, session: Session, passes: int, cfg: ModelConfig, sleep_cfg: SleepConfig
) -> Session:
  """The session whose night has made `passes` passes; behind the last one the night is over.

  Args:
    session: with a night.
    passes: in all, the night's own among them; at most N.
  """
  night, start = session.night, session.start
  assert night is not None
  how = dataclasses.replace(sleep_cfg, spread=None)  # the programs are the same for all K
  asleep = night.asleep
  if asleep is None:
    asleep = decoding.falling_asleep(weights, night.tokens, night.valid, start, cfg, how)
  for number in range(night.passes, passes):
    number = np.int32(number)
    asleep = decoding.one_pass(weights, night.valid, start, asleep, number, cfg, how)
  if passes < sleep_cfg.num_passes:
    return dataclasses.replace(session, night=dataclasses.replace(night, asleep=asleep, passes=passes))
  state = decoding.waking(weights, night.valid, start, asleep, cfg, how)
  return dataclasses.replace(session, start=state, night=None)


def awake_again(
  session: Session, cfg: ModelConfig, sleep_cfg: SleepConfig, pads: np.ndarray | None = None
) -> Session:
  """The session at the beginning of its open window, whose tokens are to be read anew, with the new memory or
  in another order.

  Args:
    pads: as for `attention.init_cache`.
  """
  fast, cache = decoding.opened(session.start, pads, cfg, session.tokens.shape[0], sleep_cfg.spread or 0)
  return dataclasses.replace(_emptied(session), fast=fast, cache=cache, behind=False)


def joined(session: Session) -> Session:
  """A session with a night as if it had not fallen asleep: its two windows as one, longer than L."""
  night = session.night
  assert night is not None
  return dataclasses.replace(
    session,
    tokens=np.concatenate([night.tokens, session.tokens], axis=1),
    valid=np.concatenate([night.valid, session.valid], axis=1),
    filled=night.tokens.shape[1] + session.filled,
    windows=session.windows - 1,
    night=None,
    behind=False,
  )


def _emptied(session: Session) -> Session:
  """The session with nothing noted in its open window."""
  blank = np.zeros_like
  return dataclasses.replace(session, tokens=blank(session.tokens), valid=blank(session.valid), filled=0)
