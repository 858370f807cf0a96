"""Windows of a sequence: which are slept on and which answer. Planned before anything is traced."""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import numpy as np

from sleep_jax.config import ConfigError


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
  """

  inputs: jax.Array
  targets: jax.Array
  loss_mask: jax.Array
  valid: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Segment:
  """`count` neighbouring windows of one length and kind, under one loop.

  Attributes:
    start: position of the first window's first token.
    length: tokens a window, at most L.
    count: windows.
    reads: positions inside each window that have a loss; empty: the model sleeps on the window.
  """

  start: int
  length: int
  count: int
  reads: tuple[int, ...]


Plan = tuple[Segment, ...]


def plan(layout: Sequence[bool] | np.ndarray, window: int) -> Plan:
  """Cuts a sequence into windows and says which are slept on.

  >>> for segment in plan([False] * 8 + [False, True], window=4):  # two windows to sleep on, one that answers
  ...   print(segment)
  Segment(start=0, length=4, count=2, reads=())
  Segment(start=8, length=2, count=1, reads=(1,))

  Args:
    layout: for each of T positions, whether any sequence of a batch may have a loss there.
    window: L.

  Returns:
    Segments in order. Neighbouring windows alike in length and reads share one.

  Raises:
    ConfigError: if no position has a loss.
  """
  asked = np.asarray(layout, bool)
  if not asked.any():
    raise ConfigError("loss_mask: no position has a loss, so there is nothing to learn")
  segments: list[Segment] = []
  for start in range(0, len(asked), window):
    part = asked[start : start + window]
    reads = tuple(int(i) for i in np.flatnonzero(part))
    last = segments[-1] if segments else None
    if last and (last.length, last.reads) == (len(part), reads):
      segments[-1] = dataclasses.replace(last, count=last.count + 1)
    else:
      segments.append(Segment(start, len(part), 1, reads))
  return tuple(segments)


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
