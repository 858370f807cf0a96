"""One loop over all passes over all windows: each block is in the program once.

With `sleep.loops` = `scan` the windows that are slept on and those that are read awake are programs of their
own. Here what belongs to a window's first or last pass alone (embedding, prelude, coda, what is read) happens
under a condition, and the passes are one loop. That compiles sooner. A shorter last window is padded on its
left to the length of the others, which changes no number and costs the passes over the pads.

With `sleep.remat` = `offload` what each pass began with is moved to the host's memory and fetched again on
the way back, so that what a device keeps grows neither with the windows nor with the passes. JAX cannot move
what a loop inside of a loop keeps; here there is one loop.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from sleep_jax import carry, sharding
from sleep_jax.carry import State
from sleep_jax.config import SleepConfig
from sleep_jax.consolidation import Parts
from sleep_jax.windows import Batch, Plan

KEPT = "begun_with"  # of one pass; the name by which JAX is told what to keep or to move


@flax.struct.dataclass
class Step:
  """One pass over one window; a numpy or jax array of each, one entry a step of the loop.

  Attributes:
    window: its number, from 0.
    number: of the pass, from 0.
    last: whether it is the window's last pass.
    asleep: whether the window is slept on.
    row: where what is read in this pass belongs, among the windows that are read; -1: nothing is read.
  """

  window: Any
  number: Any
  last: Any
  asleep: Any
  row: Any


def steps(segments: Plan, num_passes: int) -> Step:
  """All passes over the windows of a plan, in order, as numpy arrays; windows read awake have one pass."""
  made, row, window = [], 0, 0
  for segment in segments:
    passes = num_passes if segment.asleep else 1
    for _ in range(segment.count):
      reading = row if segment.reads else -1
      made += [(window, n, n == passes - 1, segment.asleep, reading if n == 0 else -1) for n in range(passes)]
      window, row = window + 1, row + bool(segment.reads)
  columns = [np.array(column) for column in zip(*made, strict=True)]
  return Step(*(x if x.dtype == bool else x.astype(np.int32) for x in columns))


def read(
  parts: Callable[[State, jax.Array | None], Parts],
  embed: Callable[[jax.Array, jax.Array | None], jax.Array],
  batch: Batch,
  segments: Plan,
  state: State,
  sleep_cfg: SleepConfig,
) -> tuple[jax.Array, State]:
  """Reads sequences, as `model.forward` does.

  Args:
    parts: (state between windows, valid [B, L]) -> the parts of the sleep on a window that begins with it.
    embed: (tokens [B, L], valid) -> h [B, L, D].
    segments: a plan of windows of one length (`windows.whole_windows`).
    state: at the start of the sequences.

  Returns:
    Hidden states [B, M, D] at `windows.answer_positions(segments)`, in the activation dtype, before the final
    norm, and the state behind these windows.
  """
  tokens = cut(batch.inputs, segments)
  valid, begins = (None if x is None else cut(x, segments) for x in (batch.valid, batch.begins))
  places = _places(segments)

  def one_pass(carried: Any, step: Step) -> tuple[Any, tuple[()]]:
    kept, found = carried
    state, asleep = jax.tree.map(lambda x: checkpoint_name(x, KEPT), kept)
    ids, real, starts = jax.tree.map(lambda x: x[step.window], (tokens, valid, begins))
    first = step.number == 0
    with jax.named_scope("window"):
      if starts is not None:
        state = carry.begin(state, starts[:, 0] & first)
      part = parts(state, real)
      asleep = jax.lax.cond(first, lambda: part.fall(embed(ids, real)), lambda: asleep)
      with jax.named_scope("pass"):
        h, after = part.read(asleep, step.number)
      after = dataclasses.replace(after, kept=_for_all_passes(after.kept, step))
      # Behind a sleep the coda reads what another pass would; awake it reads the pass itself.
      h = jnp.where(step.asleep & step.last, after.h, h)
      inside = part.start | after.prelude | after.repeated
      h, inside = jax.lax.cond(
        step.last | (step.row >= 0),
        lambda: part.coda(h, after.prelude, after.repeated),
        lambda: (h, inside),
      )
      if len(places):
        found = jax.lax.cond(step.row >= 0, lambda: _put(found, h, step.row, places), lambda: found)
      next_window = lambda: carry.after_window(state, inside, after.kept)  # noqa: E731
      state = jax.lax.cond(step.last, next_window, lambda: state)
    return ((state, after), found), ()

  h = embed(tokens[0], None if valid is None else valid[0])
  asleep = parts(state, None).begin(h)  # only its types matter: the first step begins the sleep anew
  rows = [jnp.zeros_like(h[:, : places.shape[1]])] * len(places)
  found = jnp.stack(rows) if rows else ()
  if sleep_cfg.remat in ("pass", "offload"):
    one_pass = jax.checkpoint(one_pass, policy=_policy(sleep_cfg.remat), prevent_cse=False)
  all_steps = jax.tree.map(jnp.asarray, steps(segments, sleep_cfg.num_passes))
  ((state, _), found), _ = jax.lax.scan(one_pass, ((state, asleep), found), all_steps)
  return _in_order(found, segments) if len(places) else h[:, :0], state


def _policy(remat: str) -> Callable[..., Any]:
  """What of a pass is kept on the way back: what it began with, here or on the host."""
  if remat == "pass":
    return jax.checkpoint_policies.save_only_these_names(KEPT)
  return jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[KEPT],
    offload_src="device",
    offload_dst="pinned_host",
  )


def _for_all_passes(kept: dict[str, Any], step: Step) -> dict[str, Any]:
  """Caches of N passes [N, B, ...]; a window read awake makes one pass, and leaves the same to all."""
  return jax.tree.map(lambda x: jnp.where(step.asleep, x, x[:1]), kept)


def _put(found: jax.Array, h: jax.Array, row: jax.Array, places: np.ndarray) -> jax.Array:
  """`found` [R, B, M, D] with h [B, L, D] at the places of a row."""
  layout = sharding.spec(("batch", "seq", "embed"), (h.shape[0], places.shape[1], h.shape[2]))
  return found.at[row].set(h.at[:, jnp.asarray(places)[row]].get(out_sharding=layout))


def _places(segments: Plan) -> np.ndarray:
  """For each window that is read, the positions in it: [R, M] int32, filled up with zeros."""
  read = [s.reads for s in segments for _ in range(s.count) if s.reads]
  places = np.zeros((len(read), max(map(len, read), default=0)), np.int32)
  for row, positions in enumerate(read):
    places[row, : len(positions)] = positions
  return places


def _in_order(found: jax.Array, segments: Plan) -> jax.Array:
  """[R, B, M, D] without what rows were filled up with, one window behind the other: [B, M', D]."""
  parts, row = [], 0
  for s in segments:
    if s.reads:
      part = jnp.moveaxis(found[row : row + s.count, :, : len(s.reads)], 0, 1)
      parts.append(part.reshape(part.shape[0], -1, part.shape[-1]))
      row += s.count
  return jnp.concatenate(parts, axis=1)


def cut(x: jax.Array, segments: Plan) -> jax.Array:
  """The windows of neighbouring segments of one length: [B, T] -> [W, B, L]."""
  first, last = segments[0], segments[-1]
  part = x[:, first.start : last.start + last.length * last.count]
  return jnp.moveaxis(part.reshape(x.shape[0], -1, first.length), 1, 0)
