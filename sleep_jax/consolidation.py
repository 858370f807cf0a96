"""The parts of a sleep on one window: the blocks in front of the repeated ones once, N passes, the rest once.

`model.consolidate` makes them all in one program. `generate` makes them one after the other where
`sleep.spread` asks for it, with other tokens read in between. `Parts` is what both are made of.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax

from sleep_jax import blocks, carry, looped
from sleep_jax.carry import State
from sleep_jax.config import ModelConfig, SleepConfig


@flax.struct.dataclass
class Arranged:
  """All blocks as `blocks.run` takes them: those that run once before the loop, the repeated ones, those
  after.
  """

  prelude: tuple[blocks.Group, ...]
  repeated: tuple[blocks.Group, ...]
  coda: tuple[blocks.Group, ...]

  @property
  def all(self) -> tuple[blocks.Group, ...]:
    return self.prelude + self.repeated + self.coda


def arrange(weights: dict[str, Any], cfg: ModelConfig, sleep_cfg: SleepConfig) -> Arranged:
  """Stacks the weights of equal blocks, as `sleep_cfg.loops` says."""
  first, last = sleep_cfg.looped(len(cfg.blocks))
  part = functools.partial(blocks.arrange, weights["blocks"], cfg, scan=sleep_cfg.loops != "unroll")
  return Arranged(part(0, first), part(first, last), part(last))


@flax.struct.dataclass
class Asleep:
  """A sleep between two of its passes.

  Attributes:
    h: [B, L, D] in the activation dtype, as the next pass reads it.
    prelude: state of the blocks in front of the repeated ones, behind the window.
    repeated: state of the repeated blocks after the last pass that was made, without `kept`.
    kept: caches of the blocks that have one a pass, each array [N, B, ...]: as the passes that were made left
      them, and as the others find them.
  """

  h: jax.Array
  prelude: State
  repeated: State
  kept: dict[str, Any]


def begin(h: jax.Array, state: State, cfg: ModelConfig, sleep_cfg: SleepConfig) -> Asleep:
  """A sleep of which nothing is done yet.

  Args:
    h: the embedded window, [B, L, D].
    state: between windows, with which the window began.
  """
  first, last = sleep_cfg.looped(len(cfg.blocks))
  start = carry.open_window(carry.first_pass(state), cfg)
  kept = carry.per_pass(state, sleep_cfg.num_passes)
  return Asleep(h, start.within(0, first), _without(start.within(first, last), kept), kept)


@dataclasses.dataclass(frozen=True)
class Parts:
  """The parts of the sleep on one window, each of them pure; from `parts`.

  Attributes:
    weights: of the whole model.
    arranged: its blocks.
    state: between windows, with which the window began.
    start: the same inside of a pass.
    cfg, sleep_cfg: the model, and how it sleeps.
    valid: [B, L] bool, False for pads. None: all valid.
  """

  weights: dict[str, Any]
  arranged: Arranged
  state: State
  start: State
  cfg: ModelConfig
  sleep_cfg: SleepConfig
  valid: jax.Array | None

  def begin(self, h: jax.Array) -> Asleep:
    """The sleep on the embedded window h [B, L, D] of which nothing is done yet."""
    return begin(h, self.state, self.cfg, self.sleep_cfg)

  def fall(self, h: jax.Array) -> Asleep:
    """The sleep on the embedded window h [B, L, D] before its first pass; runs the blocks in front."""
    asleep = self.begin(h)
    h, after = self._run(self.arranged.prelude, h, self.start)
    first, _ = self.sleep_cfg.looped(len(self.cfg.blocks))
    return dataclasses.replace(asleep, h=h, prelude=after.within(0, first))

  def repeat(
    self, h: jax.Array, repeated: State, kept: dict[str, Any]
  ) -> tuple[jax.Array, State, dict[str, Any]]:
    """One pass over the repeated blocks.

    Args:
      h: [B, L, D].
      repeated: their state, without `kept`.
      kept: the caches that this pass has to itself, each array [B, ...].

    Returns:
      The same three behind the pass.
    """
    before = self.start
    if self.sleep_cfg.state == "carry":
      before = before | carry.rewind(repeated, before)
    h, after = self._run(self.arranged.repeated, h, before | State({}, kept))
    inside = after.within(*self.sleep_cfg.looped(len(self.cfg.blocks)))
    return h, _without(inside, kept), {i: after.kept[i] for i in kept}

  def between(self, h: jax.Array) -> jax.Array:
    """h of one pass as the next one reads it; a single pass is the plain hybrid."""
    normed = self.cfg.loop_norm and self.sleep_cfg.num_passes > 1
    return looped.final_norm(self.weights, h, self.cfg) if normed else h

  def coda(self, h: jax.Array, prelude: State, repeated: State) -> tuple[jax.Array, State]:
    """The blocks behind the repeated ones, once: h, and the state of all blocks inside a pass."""
    return self._run(self.arranged.coda, h, self.start | prelude | repeated)

  def one_pass(self, asleep: Asleep, number: jax.Array | int) -> Asleep:
    """Makes pass `number`, from 0; an int32 scalar."""
    return self.read(asleep, number)[1]

  def read(self, asleep: Asleep, number: jax.Array | int) -> tuple[jax.Array, Asleep]:
    """Makes a pass as `one_pass` does; also h [B, L, D] as the blocks behind the repeated ones read it."""
    kept = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, 0, keepdims=False), asleep.kept)
    h, repeated, kept = self.repeat(asleep.h, asleep.repeated, kept)
    every = jax.tree.map(
      lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, number, 0), asleep.kept, kept
    )
    return h, Asleep(self.between(h), asleep.prelude, repeated, every)

  def wake(self, asleep: Asleep) -> State:
    """The state between windows behind the last pass."""
    _, after = self.coda(asleep.h, asleep.prelude, asleep.repeated)
    return carry.after_window(self.state, after, asleep.kept)

  def _run(self, groups: tuple[blocks.Group, ...], h: jax.Array, state: State) -> tuple[jax.Array, State]:
    remat = self.sleep_cfg.remat != "none"
    h, state, _ = blocks.run(groups, h, state, self.cfg, valid=self.valid, remat=remat)
    return h, state


def parts(
  weights: dict[str, Any],
  arranged: Arranged,
  state: State,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
  valid: jax.Array | None,
) -> Parts:
  """The sleep on a window that began with `state`; arguments as for `model.consolidate`."""
  start = carry.open_window(carry.first_pass(state), cfg)
  return Parts(weights, arranged, state, start, cfg, sleep_cfg, valid)


def _without(state: State, kept: dict[str, Any]) -> State:
  """The state without the caches of the blocks in `kept`."""
  return State(state.fast, {i: x for i, x in state.kept.items() if i not in kept})
