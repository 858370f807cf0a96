"""What a run learns."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sleep_jax import model, windows
from sleep_jax.config import Config


@dataclasses.dataclass(frozen=True)
class Task:
  """What is learnt.

  Attributes:
    layout: [T] bool, positions that may have a loss.
    batch: (key, index, size) -> `windows.Batch`; pure and traced, so that the device makes its own data.
    held_out_seed: key of the evaluation's stream.
    test: makes the evaluation, weights -> row (with `loss` and `exact`), of a run; called with its mesh set.
      None: `evaluate.make_evaluate` on `batch` with the key of `held_out_seed`.
  """

  layout: np.ndarray
  batch: Callable[[jax.Array, jax.Array, int], windows.Batch]
  held_out_seed: int
  test: Callable[[Config], Callable[[model.Params], dict[str, Any]]] | None = None
