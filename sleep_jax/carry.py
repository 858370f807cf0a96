"""What a sequence carries over the border of a window, besides its fast weights.

Under `hard` eviction that is nothing, under `sliding` the keys and values of the newest L - 1 tokens.

Pass n over the next window may see those that the *last* pass over this one left, or those of pass n
(`sleep.kept`). The carry of an attention block is therefore a tuple of caches: one, or one a pass. Prelude
and coda run once and have one. Gradients flow through what is kept, as in a sliding-window hybrid without
sleep that is trained end to end: with N = 1 this is that hybrid, gradients included.

A token that was read in fewer passes than there are caches, because its window was read awake, is in the
later ones as its last pass left it: a cache without it would have a hole where the newest tokens are.
Reading awake is a single pass, and sees the cache of the first: keys that were computed in as many passes as
its own queries, as in a looped transformer, where loop n sees the keys of loop n.
"""

import jax
import jax.numpy as jnp

from sleep_jax import attention, blocks, fast_weights
from sleep_jax.config import ModelConfig, SleepConfig

# What a sequence carries, by block. Hard eviction: fast weights alone.
State = dict[str, fast_weights.FastWeights | tuple[attention.Kept, ...]]


def init_state(cfg: ModelConfig, batch: int, sleep_cfg: SleepConfig) -> State:
  """The state at the start of a sequence: fast weights zero, caches empty.

  Args:
    sleep_cfg: says how many caches a block has; without effect under hard eviction.
  """
  first, last = sleep_cfg.first_block, sleep_cfg.last_block or len(cfg.blocks)
  state: State = dict(blocks.init_state(cfg, batch))
  for i, kept in blocks.init_kept(cfg, batch).items():
    each = sleep_cfg.kept == "each" and first <= int(i) < last
    state[i] = (kept,) * (sleep_cfg.num_passes if each else 1)
  return state


def of_first_pass(state: State) -> blocks.State:
  """What the first pass over the next window sees, or the only one."""
  return {i: s[0] if isinstance(s, tuple) else s for i, s in state.items()}


def of_each_pass(state: State, num_passes: int) -> blocks.State:
  """Of the blocks with one cache a pass: those of the first N passes, each array [N, B, ...].

  Raises:
    ValueError: if the state has fewer.
  """
  several = {i: s for i, s in state.items() if isinstance(s, tuple) and len(s) > 1}
  for i, caches in several.items():
    if len(caches) < num_passes:
      raise ValueError(
        f"the state has caches for {len(caches)} passes in block {i}, {num_passes} are asked for"
      )
  return {i: jax.tree.map(lambda *x: jnp.stack(x), *caches[:num_passes]) for i, caches in several.items()}


def left(before: State, after: blocks.State, own: blocks.State | None = None) -> State:
  """What a window leaves.

  Args:
    before: what it began with; how many caches a block has.
    after: what its last pass left.
    own: what each pass left, as in `of_each_pass`. None: there was one pass.
  """
  state: State = {}
  for i, s in after.items():
    caches = [s]
    if own and i in own:
      count = jax.tree.leaves(own[i])[0].shape[0]
      caches = [jax.tree.map(lambda x, n=n: x[n], own[i]) for n in range(count)]
    held = len(before[i]) if isinstance(before[i], tuple) else 0
    state[i] = tuple((caches + caches[-1:] * held)[:held]) if held else s
  return state
