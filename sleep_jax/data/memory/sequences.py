"""Sequences of a test of memory: a context, then questions with answers. Pure functions of (seed, index).

    tokens   PAD PAD  filler .. statement .. filler .. statement .. | question answer  question answer ...
    targets                                                         |       answer           answer

The statements keep their order and lie at random places among the filler, each way to place them equally
likely. Windows that end inside a statement part it: half of it is then known through S alone. The questions
begin at `context` exactly, each in a place of its own: P tokens, the last of which predicts the first token
of the answer, then A.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax.config import check
from sleep_jax.data.memory.config import MemoryConfig
from sleep_jax.data.memory.story import PAD, Story, below, shuffled
from sleep_jax.windows import Batch


def set_names(cfg: MemoryConfig) -> list[str]:
  """The name of each held-out set in a run's rows.

  >>> set_names(MemoryConfig(depths=(2, 4), lengths=(16,)))
  ['d2_t16', 'd4_t16']
  """
  return [f"d{depth}_t{length}" for depth, length in cfg.sets]


def layout(cfg: MemoryConfig) -> np.ndarray:
  """Returns where the loss may be: [T] bool, `queries` times A positions."""
  i = np.arange(cfg.length) - cfg.context
  place = i % (cfg.question + cfg.answer) - (cfg.question - 1)
  return (i >= 0) & (place >= 0) & (place < cfg.answer)


def answer_of(cfg: MemoryConfig, targets: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns which question each target answers.

  Args:
    cfg: the test.
    targets, mask: [B, M], at the positions of `layout`.

  Returns:
    [B, M] int32: 0 .. queries - 1, and -1 where nothing counts.
  """
  question = jnp.broadcast_to(jnp.arange(targets.shape[1]) // cfg.answer, targets.shape)
  return jnp.where(mask > 0, question, -1).astype(jnp.int32)


def check_window(cfg: MemoryConfig, window: int) -> None:
  """Raises `ConfigError` unless windows end where the questions begin, and one holds them all."""
  check(
    cfg.context % window == 0,
    "model.window",
    f"must divide {cfg.context}, the longest of data.lengths, so that no window holds text and questions,"
    f" got {window}",
  )
  check(
    cfg.asking <= window,
    "model.window",
    f"must hold the {cfg.asking} tokens of the questions (data.queries), got {window}",
  )


def story(cfg: MemoryConfig, key: jax.Array, depth: int, length: int) -> Story:
  """Draws what a sequence says and asks; the same at every length for tasks that do not count words."""
  return cfg.test.draw(cfg, cfg.vocabulary, key, depth, length)


def batch(cfg: MemoryConfig, key: jax.Array, step: jax.Array, size: int, of: int | None = None) -> Batch:
  """Makes batch number `step` of a stream: sequences step * size .. (step + 1) * size - 1.

  Args:
    cfg: the test.
    key: typed PRNG key of the stream; a sequence is a pure function of it and of its index.
    step: whole number; (step + 1) * size must not exceed 2^31.
    size: B, sequences.
    of: number of a held-out set. None: training, each sequence of a set drawn evenly.

  Returns:
    B sequences of T tokens; `valid` marks the pads, and is None where there are none.
  """
  makers = [functools.partial(_sequence, cfg, depth=depth, length=length) for depth, length in cfg.sets]

  def one(index):
    of_key, own = jax.random.split(jax.random.fold_in(key, index))
    if of is not None:
      return makers[of](own)
    return jax.lax.switch(below(of_key, len(makers)), makers, own)

  inputs, labelled = jax.vmap(one)(step * size + jnp.arange(size))
  shifted = jnp.concatenate([inputs[:, 1:], jnp.zeros_like(inputs[:, :1])], axis=1)
  mask = jnp.concatenate([labelled[:, 1:], jnp.zeros_like(labelled[:, :1])], axis=1)
  valid = inputs != PAD if cfg.padded else None
  return Batch(inputs, jnp.where(mask, shifted, 0), mask.astype(jnp.float32), valid)


def _sequence(cfg: MemoryConfig, key: jax.Array, *, depth: int, length: int) -> tuple[jax.Array, jax.Array]:
  """Draws one sequence: tokens [T] int32, and which of them are answers, [T] bool."""
  story_key, place_key, fill_key = jax.random.split(key, 3)
  told = story(cfg, story_key, depth, length)
  count, width = told.statements.shape
  if cfg.test.scattered:
    slots = shuffled(place_key, length - count * (width - 1))  # of statements and filler words
    (taken,) = jnp.nonzero(slots < count, size=count)
    places = taken + jnp.arange(count) * (width - 1)
  else:
    places = jnp.arange(count) * width
  filler = cfg.vocabulary.kinds["filler"]
  context = filler.start + below(fill_key, len(filler), (length,))
  context = context.at[places[:, None] + jnp.arange(width)].set(told.statements)
  context = jnp.pad(context, (cfg.context - length, 0), constant_values=PAD)

  questions = jnp.pad(told.questions, ((0, 0), (cfg.question - told.questions.shape[1], 0)))
  answers = jnp.pad(told.answers, ((0, 0), (0, cfg.answer - told.answers.shape[1])))
  asking = jnp.concatenate([questions, answers], axis=1)
  labels = jnp.concatenate([jnp.zeros_like(questions, bool), answers != PAD], axis=1)
  tokens = jnp.concatenate([context, asking.ravel()]).astype(jnp.int32)
  return tokens, jnp.concatenate([jnp.zeros(cfg.context, bool), labels.ravel()])
