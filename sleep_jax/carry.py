"""What a sequence carries over the border of a window.

Always the fast weights. Under `hard` eviction nothing else, under `sliding` also the keys and values of the
newest L - 1 tokens.

Pass n over the next window may see the keys that the *last* pass over this one left, or those of pass n
(`sleep.kept`). The blocks that are repeated therefore keep one cache, or one a pass; prelude and coda run
once and keep one. Gradients flow through what is kept, as in a sliding-window hybrid without sleep that is
trained end to end: with N = 1 this is that hybrid, gradients included.

A window read awake makes one pass, but there may be N caches. The missing ones get a copy of the last pass's
keys and values; otherwise the newest tokens would be missing there. Reading awake is a single pass and sees
the cache of the first: keys that were computed in as many passes as its own queries, as in a looped
transformer, where loop n sees the keys of loop n.
"""

import flax.struct
import jax
import jax.numpy as jnp

from sleep_jax import attention, fast_weights
from sleep_jax.config import ATTENTION, ModelConfig, SleepConfig


@flax.struct.dataclass
class State:
  """The memory of a sequence, by number of the block.

  Attributes:
    fast: of every fast-weight block.
    kept: of every attention block under sliding eviction, else empty. Between windows each array is
      [P, B, L-1, ...], with P caches, one or one a pass; inside a pass there is one, [B, L-1, ...].
  """

  fast: dict[str, fast_weights.FastWeights]
  kept: dict[str, attention.Kept]

  def __or__(self, other: "State") -> "State":
    """The blocks of both; where both have one, that of `other`."""
    return State(self.fast | other.fast, self.kept | other.kept)

  def within(self, first: int, last: int) -> "State":
    """Blocks `first` .. `last` - 1 alone."""

    def part(of):
      return {i: x for i, x in of.items() if first <= int(i) < last}

    return State(part(self.fast), part(self.kept))


def init_state(cfg: ModelConfig, batch: int, sleep_cfg: SleepConfig) -> State:
  """The state at the start of a sequence: fast weights zero, caches empty.

  Args:
    sleep_cfg: says how many caches a block keeps; without effect under hard eviction.
  """
  first, last = sleep_cfg.looped(len(cfg.blocks))
  state = State({}, {})
  for i, kind in enumerate(cfg.blocks):
    if kind not in ATTENTION:
      state.fast[str(i)] = fast_weights.init_state(cfg, batch, kind)
    elif cfg.eviction == "sliding":
      caches = sleep_cfg.num_passes if sleep_cfg.kept == "each" and first <= i < last else 1
      state.kept[str(i)] = jax.tree.map(
        lambda x, n=caches: jnp.stack([x] * n), attention.init_kept(cfg, batch)
      )
  return state


def begin(state: State, where: jax.Array) -> State:
  """The state between windows with the rows `where` [B] bool at the start of a sequence: all zero."""

  def empty(x: jax.Array, axis: int) -> jax.Array:
    rows = where.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    return jnp.where(rows, jnp.zeros_like(x), x)

  fast = jax.tree.map(lambda x: empty(x, 0), state.fast)
  return State(fast, jax.tree.map(lambda x: empty(x, 1), state.kept))


def first_pass(state: State) -> State:
  """What the first pass over the next window sees, or the only one."""
  return State(state.fast, jax.tree.map(lambda x: x[0], state.kept))


def per_pass(state: State, num_passes: int) -> dict[str, attention.Kept]:
  """The caches of the first N passes, each array [N, B, ...], of the blocks that keep one a pass.

  Raises:
    ValueError: if the state has fewer.
  """
  several = {i: kept for i, kept in state.kept.items() if kept.k.shape[0] > 1}
  for i, kept in several.items():
    if (caches := kept.k.shape[0]) < num_passes:
      raise ValueError(f"the state has caches for {caches} passes in block {i}, {num_passes} are asked for")
  return jax.tree.map(lambda x: x[:num_passes], several)


def open_window(state: State, cfg: ModelConfig) -> State:
  """The state with which a new window begins: inside a pass, the convolutions' inputs as eviction left
  them.
  """
  return State({i: fast_weights.open_window(s, cfg) for i, s in state.fast.items()}, state.kept)


def rewind(state: State, start: State) -> State:
  """Back to the start of the window, with the S written so far.

  Every pass over a window reads the same tokens after the same tokens: a pass does not see the end of the
  window as what came before its beginning.
  """
  return State(
    {i: fast_weights.rewind(s, start.fast[i]) for i, s in state.fast.items()},
    {i: start.kept[i] for i in state.kept},
  )


def after_window(
  before: State, after: State, kept_per_pass: dict[str, attention.Kept] | None = None
) -> State:
  """The state between windows.

  Args:
    before: the state between windows that this window began with; how many caches a block keeps.
    after: what the last pass left.
    kept_per_pass: what each pass left, as in `per_pass`. None: there was one pass.
  """

  def as_many(new: jax.Array, old: jax.Array) -> jax.Array:
    """[n, B, ...] with copies of its last entry up to the number of caches of `old`."""
    lacking = old.shape[0] - new.shape[0]
    return jnp.concatenate([new, *[new[-1:]] * lacking]) if lacking else new

  kept = jax.tree.map(lambda x: x[None], after.kept) | (kept_per_pass or {})
  return State(after.fast, {i: jax.tree.map(as_many, x, before.kept[i]) for i, x in kept.items()})
