"""Token ids as they come from outside: checked, and rows of different lengths padded."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sleep_jax.config import ConfigError

# Token ids of B sequences: [B, T], or a list of B lists, which may differ in length.
Tokens = np.ndarray | Sequence[Sequence[int]]


def checked(
  tokens: Tokens, valid: np.ndarray | None, rows: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Checks the tokens of so many rows, and pads rows of different lengths on the left.

  Args:
    tokens: whole numbers [B, T], T >= 1, or a list of B lists.
    valid: [B, T] bool, False for pads; None: all valid, or as lists of different lengths are padded.
    rows: B.
    vocab_size: tokens lie in 0..vocab_size - 1.

  Returns:
    Tokens [B, T] int32, and [B, T] bool, False for pads.

  Raises:
    ConfigError: if there is no token, or one that the vocabulary lacks.
    ValueError: if the shapes do not fit B rows.
    TypeError: if tokens are no whole numbers.
  """
  lengths = (
    {len(row) for row in tokens if hasattr(row, "__len__")} if isinstance(tokens, (list, tuple)) else ()
  )
  if len(lengths) > 1:
    if valid is not None:
      raise ValueError("rows of different lengths are padded here: `valid` must be None")
    tokens, valid = _padded(list(tokens), max(lengths))
  tokens = np.asarray(tokens)
  valid = np.ones(tokens.shape, bool) if valid is None else np.asarray(valid, bool)
  if tokens.ndim != 2 or tokens.shape[0] != rows or valid.shape != tokens.shape:
    raise ValueError(f"tokens and valid must be [{rows}, T], got {tokens.shape} and {valid.shape}")
  if tokens.shape[1] == 0:
    raise ConfigError("prompt: has no tokens")
  if not np.issubdtype(tokens.dtype, np.integer):
    raise TypeError(f"tokens must be whole numbers, got {tokens.dtype}")
  low, high = int(tokens.min()), int(tokens.max())
  if low < 0 or high >= vocab_size:
    raise ConfigError(f"prompt: tokens must lie in 0..{vocab_size - 1}, there are some in {low}..{high}")
  return tokens.astype(np.int32), valid


def _padded(rows: Sequence[Any], length: int) -> tuple[np.ndarray, np.ndarray]:
  """Rows of different lengths as one array, padded on the left, and what is no pad."""
  kind = np.result_type(*(np.asarray(row).dtype for row in rows if len(row)))
  tokens, valid = np.zeros((len(rows), length), kind), np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    if len(row) == 0:
      raise ConfigError(f"prompt: row {i} has no tokens")
    tokens[i, -len(row) :], valid[i, -len(row) :] = row, True
  return tokens, valid
