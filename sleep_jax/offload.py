"""Windows and passes under one loop, which keeps what the way back needs in the host's memory.

With `sleep.remat` = `offload` nothing that stays on the device grows with the number of windows or of passes:
of each pass only what it began with is kept, and that is moved to the host and fetched again on the way back.
JAX cannot move what a loop inside of a loop keeps, so both are one here: step i is pass i mod N over window
i // N.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from sleep_jax import carry
from sleep_jax.carry import State
from sleep_jax.consolidation import Asleep, Parts

KEPT = "begun_with"  # of one pass; the name by which JAX is told what to move


def read_and_sleep(
  parts: Callable[[State, jax.Array | None], Parts],
  embed: Callable[[jax.Array, jax.Array | None], jax.Array],
  tokens: jax.Array,
  state: State,
  *,
  num_passes: int,
  valid: jax.Array | None = None,
  begins: jax.Array | None = None,
  reads: Sequence[int] = (),
) -> tuple[jax.Array | tuple[()], State]:
  """Sleeps on W windows of one length, one after the other.

  Args:
    parts: (state between windows, valid [B, L]) -> the parts of the sleep on a window that begins with it.
    embed: (tokens [B, L], valid) -> h [B, L, D].
    tokens: [W, B, L] int32.
    state: between windows, with which the first one begins.
    num_passes: N.
    valid: [W, B, L] bool, False for pads. None: all valid.
    begins: [W, B, L] bool, as in `windows.Batch`. None: nothing begins after the start.
    reads: positions of each window that are read awake; the first pass is that reading.

  Returns:
    Hidden states [W, B, M, D] at `reads`, in the activation dtype, before the final norm; () where nothing is
    read. And the state behind the last window.
  """

  def step(carried: Any, i: jax.Array) -> tuple[Any, tuple[()]]:
    kept, read = carried
    state, asleep = jax.tree.map(lambda x: checkpoint_name(x, KEPT), kept)
    window, n = i // num_passes, i % num_passes
    ids, real, starts = jax.tree.map(lambda x: x[window], (tokens, valid, begins))
    with jax.named_scope("window"):
      if starts is not None:
        state = carry.begin(state, starts[:, 0] & (n == 0))
      part = parts(state, real)
      asleep = jax.lax.cond(n == 0, lambda: part.fall(embed(ids, real)), lambda: asleep)
      with jax.named_scope("pass"):
        h, after = part.read(asleep, n)
      if reads:
        read = jax.lax.cond(n == 0, lambda: read.at[window].set(awake(part, h, after)), lambda: read)
      state = jax.lax.cond(n == num_passes - 1, lambda: part.wake(after), lambda: state)
    return ((state, after), read), ()

  def awake(part: Parts, h: jax.Array, after: Asleep) -> jax.Array:
    return part.coda(h, after.prelude, after.repeated)[0][:, np.asarray(reads, int)]

  h = embed(tokens[0], None if valid is None else valid[0])
  # Only its types matter: the first step begins the sleep anew.
  asleep = parts(state, None).begin(h)
  read = jnp.stack([jnp.zeros_like(h[:, : len(reads)])] * tokens.shape[0]) if reads else ()
  policy = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[KEPT],
    offload_src="device",
    offload_dst="pinned_host",
  )
  step = jax.checkpoint(step, policy=policy, prevent_cse=False)  # inside a scan no barrier is needed
  ((state, _), read), _ = jax.lax.scan(
    step, ((state, asleep), read), jnp.arange(tokens.shape[0] * num_passes)
  )
  return read, state
