"""Rule 110: the first cell of a string of cells after t steps of a cellular automaton.

A sequence is `num_strings` independent random strings of cells, one token a cell. Each fills a window and is
evicted before the next. Then follows one answer for each string: its *first* cell after `rollout_steps`
steps. The depth of reasoning is t, and the amount to remember does not depend on it.

    tokens   cells of string 0 | cells of string 1 | ...      | ASK  label 0  label 1 ...
    targets                                                   | label 0  label 1  label 2 ...

The last window predicts from itself: `ASK` predicts the first label. The strings are independent, so an
earlier label, which the next prediction sees, carries no information about it.
"""

import dataclasses
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax.config import Bounds, Count, Natural, Seed, check, check_fields
from sleep_jax.data import limits
from sleep_jax.windows import Batch

ASK = 2
VOCAB_SIZE = 3  # '0', '1', ASK


@dataclasses.dataclass(frozen=True)
class Rule110Config:
  """The task.

  Attributes:
    num_strings: strings, and labels, of a sequence.
    num_cells: cells of a string, at most 32.
    rollout_steps: t, steps of the rule.
    boundary: `periodic`: the last cell is the first one's left neighbour. `zero`: cells outside are 0; then a
      constant answers t = 8 with 99 %, so the paper cannot have meant it.
    held_out_seed: seed of the evaluation set, which is the same for every run.
    curriculum_steps: optimizer steps in which t grows from 1 to `rollout_steps` in training, by equal shares.
      Evaluations always ask for `rollout_steps`. 0: so does training.
  """

  PATH: ClassVar[str] = "data"

  num_strings: Count = 4
  num_cells: Annotated[int, Bounds(least=3, most=32)] = 24
  rollout_steps: Annotated[int, Bounds(least=0), Bounds(most=limits.STEPS)] = 32
  boundary: Literal["periodic", "zero"] = "periodic"
  held_out_seed: Seed = 1_000_003
  curriculum_steps: Natural = 0

  def __post_init__(self):
    check_fields(self)
    longest = limits.LENGTH // (self.num_cells + 1)
    at_most = f"must be at most {longest} of {self.num_cells} cells, got {self.num_strings}"
    check(self.num_strings <= longest, "data.num_strings", at_most)

  @property
  def length(self) -> int:
    """T, tokens of a sequence."""
    return self.num_strings * (self.num_cells + 1)


def layout(cfg: Rule110Config) -> np.ndarray:
  """Returns where the loss is: [T] bool, the last `num_strings` positions."""
  return np.arange(cfg.length) >= cfg.num_strings * cfg.num_cells


def check_window(cfg: Rule110Config, window: int) -> None:
  """Raises `ConfigError` unless windows end where the answers begin."""
  context = cfg.num_strings * cfg.num_cells
  check(
    context % window == 0,
    "model.window",
    f"must divide the {context} cells (data.num_strings x data.num_cells) so that no window holds cells"
    f" and answers, got {window}",
  )
  check(
    cfg.num_strings <= window,
    "model.window",
    f"must hold the {cfg.num_strings} answers (data.num_strings), got {window}",
  )


def evolve(cells: jax.Array, cfg: Rule110Config, steps: int | jax.Array | None = None) -> jax.Array:
  """Runs the rule for t steps.

  Args:
    cells: uint32, any shape; bit i is cell i, bits from `num_cells` on are 0.
    cfg: the task.
    steps: t. None: the task's.

  Returns:
    The strings after t steps, in the same shape and form. A cell c with neighbours l and r becomes
    (c or r) and not (l and c and r).
  """
  cells = jnp.asarray(cells, jnp.uint32)
  n = cfg.num_cells
  all_cells = jnp.uint32((1 << n) - 1)
  wrap = cfg.boundary == "periodic"

  def step(_, c):
    left, right = c << 1, c >> 1  # bit i of `left` is cell i - 1
    if wrap:
      left, right = left | (c >> (n - 1)), right | (c << (n - 1))
    return (c | right) & ~(left & c & right) & all_cells

  steps = cfg.rollout_steps if steps is None else steps
  short = isinstance(steps, int) and steps <= 64
  return jax.lax.fori_loop(0, steps, step, cells, unroll=short or None)


def lesson(cfg: Rule110Config, step: jax.Array) -> jax.Array:
  """t at an optimizer step of the curriculum, int32.

  >>> cfg = Rule110Config(rollout_steps=3, curriculum_steps=6)
  >>> [int(lesson(cfg, step)) for step in range(8)]
  [1, 1, 2, 2, 3, 3, 3, 3]
  """
  share = jnp.int32(step) * cfg.rollout_steps // cfg.curriculum_steps
  return jnp.minimum(share + 1, cfg.rollout_steps)


def strings(cfg: Rule110Config, key: jax.Array, index: jax.Array) -> jax.Array:
  """Draws the strings of sequences, each cell evenly: a pure function of (key, index).

  Args:
    cfg: the task.
    key: typed PRNG key of the stream.
    index: [B] whole numbers below 2^31.

  Returns:
    [B, num_strings] uint32, bit i is cell i.
  """
  draw = jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(key, i), (cfg.num_strings,), jnp.uint32))
  return draw(index) >> (32 - cfg.num_cells)


def sequences(cfg: Rule110Config, packed: jax.Array, steps: jax.Array | None = None) -> Batch:
  """Writes given strings and their labels as token sequences.

  Args:
    cfg: the task.
    packed: [B, num_strings] uint32, bit i is cell i.
    steps: t of the labels. None: the task's.

  Returns:
    B sequences of T tokens; no pads.
  """
  shifts = jnp.arange(cfg.num_cells, dtype=jnp.uint32)
  cells = ((packed[:, :, None] >> shifts) & 1).astype(jnp.int32).reshape(packed.shape[0], -1)
  labels = (evolve(packed, cfg, steps) & 1).astype(jnp.int32)
  ask = jnp.full_like(labels[:, :1], ASK)
  inputs = jnp.concatenate([cells, ask, labels[:, :-1]], axis=1)
  targets = jnp.concatenate([jnp.zeros_like(cells), labels], axis=1)
  mask = jnp.broadcast_to(jnp.asarray(layout(cfg), jnp.float32), inputs.shape)
  return Batch(inputs, targets, mask)


def batch(cfg: Rule110Config, key: jax.Array, step: jax.Array, size: int) -> Batch:
  """Makes batch number `step` of a stream: sequences step * size .. (step + 1) * size - 1."""
  return sequences(cfg, strings(cfg, key, step * size + jnp.arange(size)))


def lessons(cfg: Rule110Config, key: jax.Array, step: jax.Array, size: int) -> Batch:
  """Batch number `step` for training: `batch`, with the labels of the curriculum's t."""
  if not cfg.curriculum_steps:
    return batch(cfg, key, step, size)
  return sequences(cfg, strings(cfg, key, step * size + jnp.arange(size)), lesson(cfg, step))
