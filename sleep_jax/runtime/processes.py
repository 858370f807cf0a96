"""Several processes in one run: the first one writes, and all of them agree.

One process is a special case of everything here and pays nothing for it. Processes are started by
`jax.distributed.initialize`, before any device is touched; nothing in this package does that.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_MESSAGE_BYTES = 16384  # what is agreed on, as JSON, is shorter


def primary() -> bool:
  """Whether this process writes files and talks to the user."""
  return jax.process_index() == 0


def agree(decide: Callable[[], Any], *errors: type[Exception]) -> Any:
  """What the first process decides; the others wait for it.

  Args:
    decide: called in the first process only; gives what JSON can hold, in less than 16 kB.
    errors: kinds of exceptions, made from one string, that are raised in every process when `decide` raises
      them. The others see any other kind as a RuntimeError.
  """
  if jax.process_count() == 1:
    return decide()
  value, kind, error = None, None, None
  if primary():
    try:
      value = decide()
    except Exception as e:
      error = e
      kind = next((i for i, k in enumerate(errors) if isinstance(e, k)), len(errors))
  message = json.dumps([value, kind, error and str(error)[:2000]]).encode()
  sent = multihost_utils.broadcast_one_to_all(np.frombuffer(message.ljust(_MESSAGE_BYTES), np.uint8))
  if error is not None:
    raise error
  value, kind, said = json.loads(bytes(np.asarray(sent, np.uint8)))
  if kind is not None:
    raise (*errors, RuntimeError)[kind](said)
  return value


def any_process(*flags: bool) -> list[bool]:
  """Each flag, true if it is in any process."""
  if jax.process_count() == 1:
    return list(flags)
  return [bool(x) for x in multihost_utils.process_allgather(np.array(flags)).any(axis=0)]


def gather(tree: Any) -> Any:
  """A pytree of whole NumPy arrays, in every process; all of them call it."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)
