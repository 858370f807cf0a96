"""Windows of a sequence: which are slept on and which answer. Planned before anything is traced."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import sharding
from sleep_jax.config import ConfigError, SleepConfig


@flax.struct.dataclass
class Batch:
  """Sequences of one length, unequal ones padded on the left.

  Position i predicts targets[i]: the shift of labels is made where the batch is made, *inside* the window
  that answers. Otherwise the first label would be predicted by the last token of the window
  before, which would have a loss, and would not be slept on.

  Attributes:
    inputs, targets: [B, T] int32.
    loss_mask: [B, T], 1 where the prediction counts; zero outside the layout given to `plan`.
    valid: [B, T] bool, False for pads. None: no pads.
    begins: [B, T] bool, True at the first token of a window where another text begins: what was read before
      is forgotten, the fast weights and what sliding eviction kept. Elsewhere in a window it says nothing.
      None: nothing begins after the start.
  """

  inputs: jax.Array
  targets: jax.Array
  loss_mask: jax.Array
  valid: jax.Array | None = None
  begins: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Segment:
  """`count` neighbouring windows of one length and kind, under one loop.

  Attributes:
    start: position of the first window's first token.
    length: tokens a window, at most L.
    count: windows.
    reads: positions inside each window that have a loss. Where there are some the window is read awake.
    asleep: whether the model sleeps on the windows; of one that is also read, the first pass is the reading.
      None: it does unless they have a loss.
  """

  start: int
  length: int
  count: int
  reads: tuple[int, ...]
  asleep: bool | None = None

  def __post_init__(self):
    if self.asleep is None:
      object.__setattr__(self, "asleep", not self.reads)


Plan = tuple[Segment, ...]


def plan(layout: Sequence[bool] | np.ndarray, window: int, sleep_cfg: SleepConfig | None = None) -> Plan:
  """Cuts a sequence into windows and says which are slept on.

  >>> for segment in plan([False] * 8 + [False, True], window=4):  # two windows to sleep on, one that answers
  ...   print(segment)
  Segment(start=0, length=4, count=2, reads=(), asleep=True)
  Segment(start=8, length=2, count=1, reads=(1,), asleep=False)

  With `sleep.when` = `always` a window that something follows is slept on, whether it has a loss or not; the
  last one is not. With one pass to make, sleep is that reading itself and nothing is done besides: the plan
  is the plain hybrid's.

  Args:
    layout: for each of T positions, whether any sequence of a batch may have a loss there.
    window: L.
    sleep_cfg: says which windows are slept on. None: the default.

  Returns:
    Segments in order. Neighbouring windows alike in all but their place share one.

  Raises:
    ConfigError: if no position has a loss.
  """
  asked = np.asarray(layout, bool)
  if not asked.any():
    raise ConfigError("loss_mask: no position has a loss, so there is nothing to learn")
  always = sleep_cfg is not None and sleep_cfg.when == "always" and sleep_cfg.num_passes > 1
  segments = []
  for start in range(0, len(asked), window):
    part = asked[start : start + window]
    reads = tuple(int(i) for i in np.flatnonzero(part))
    asleep = start + window < len(asked) if always else not reads
    segments.append(Segment(start, len(part), 1, reads, asleep))
  return _merged(segments)


def _merged(segments: Iterable[Segment]) -> Plan:
  """The same windows, with one segment for neighbours that are alike in all but their place."""
  found: list[Segment] = []
  for segment in segments:
    last = found[-1] if found else segment
    if found and dataclasses.replace(segment, start=last.start, count=last.count) == last:
      found[-1] = dataclasses.replace(last, count=last.count + segment.count)
    else:
      found.append(segment)
  return tuple(found)


def whole_windows(segments: Plan) -> Plan:
  """The plan where a shorter last window is padded on its left to the length of the others.

  >>> whole_windows(plan([False] * 4 + [False, True], window=4))[-1]
  Segment(start=4, length=4, count=1, reads=(3,), asleep=False)
  """
  *before, last = segments
  missing = segments[0].length - last.length
  reads = tuple(missing + i for i in last.reads)
  return _merged((*before, dataclasses.replace(last, length=last.length + missing, reads=reads)))


def with_whole_windows(batch: Batch, segments: Plan) -> tuple[Batch, Plan]:
  """The batch as the plan `whole_windows` reads it.

  Pads in front of a window's tokens are not there for the model, so all that it computes stays the same.

  Args:
    batch: B sequences of T tokens.
    segments: for the same T.

  Returns:
    Both for T' >= T tokens, a multiple of the first window's length; as they are if they are so already.
  """
  last = segments[-1]
  missing = segments[0].length - last.length
  if not missing:
    return batch, segments

  def filled(x: jax.Array, value: Any) -> jax.Array:
    """x [B, T] with `value`, a scalar or [B, 1], in front of the last window."""
    pads = jnp.broadcast_to(jnp.asarray(value, x.dtype), (x.shape[0], missing))
    parts = (x[:, : last.start], pads, x[:, last.start :])
    return jnp.concatenate([sharding.constrain(part, ("batch", "seq")) for part in parts], axis=1)

  begins = batch.begins
  if begins is not None:  # what is said of the first token stands at the window's first place
    begins = filled(begins, begins[:, last.start : last.start + 1])
  valid = jnp.ones_like(batch.inputs, bool) if batch.valid is None else batch.valid
  whole = Batch(
    inputs=filled(batch.inputs, 0),
    targets=filled(batch.targets, 0),
    loss_mask=filled(batch.loss_mask, 0),
    valid=filled(valid, False),
    begins=begins,
  )
  return whole, whole_windows(segments)


def check_plan(segments: Plan, sleep_cfg: SleepConfig) -> None:
  """Raises `ValueError` if the plan was made for another `sleep.when`."""
  *before, last = segments
  passed_over = any(not s.asleep for s in before) or (not last.asleep and last.count > 1)
  if sleep_cfg.when == "always" and sleep_cfg.num_passes > 1 and passed_over:
    raise ValueError("the plan does not sleep on every window, sleep.when is 'always'")
  if sleep_cfg.when == "unread" and any(s.asleep and s.reads for s in segments):
    raise ValueError("the plan sleeps on windows with a loss, sleep.when is 'unread'")


def answer_positions(segments: Plan) -> np.ndarray:
  """Positions of the sequence that have a loss, in order: [M] int.

  >>> answer_positions(plan([False] * 8 + [False, True], window=4)).tolist()
  [9]
  """
  return np.concatenate(
    [
      s.start + w * s.length + np.asarray(s.reads, int)
      for s in segments
      for w in range(s.count if s.reads else 0)
    ]
  )
