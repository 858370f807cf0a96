"""Exact match by position of the answer, on a fixed held-out set that the device makes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import model, windows
from sleep_jax.config import ModelConfig, SleepConfig
from sleep_jax.runtime import processes
from sleep_jax.scoring.intervals import wilson


def score(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
  """Sums over a batch, from which `rates` makes rates.

  Args:
    logits: [B, M, vocab].
    targets: [B, M].
    mask: [B, M], 1 where the answer counts.

  Returns:
    nats (summed cross-entropy), right [M] and asked [M] (answers a position), exact (sequences whose
    answers are all right) and sequences.
  """
  asked = mask > 0
  right = (jnp.argmax(logits, axis=-1) == targets) & asked
  return {
    "nats": model.cross_entropy(logits, targets, mask) * jnp.sum(mask),
    "right": jnp.sum(right, axis=0),
    "asked": jnp.sum(asked, axis=0),
    "exact": jnp.sum(jnp.all(right | ~asked, axis=1)),
    "sequences": jnp.asarray(targets.shape[0]),
  }


def rates(sums: dict[str, Any]) -> dict[str, float]:
  """Rates from summed scores.

  Returns:
    loss (nats an answer), exact with its 95 % interval `low`, `high` (Wilson), bit, string_0 .. string_{M-1}.
  """
  right, asked = np.asarray(sums["right"], float), np.asarray(sums["asked"], float)
  return {
    "loss": float(sums["nats"]) / asked.sum(),
    "exact": float(sums["exact"]) / float(sums["sequences"]),
    **dict(zip(("low", "high"), wilson(float(sums["exact"]), float(sums["sequences"])), strict=True)),
    "bit": right.sum() / asked.sum(),
    **{f"string_{i}": r / a for i, (r, a) in enumerate(zip(right, asked, strict=True))},
  }


def best_constant(targets: np.ndarray) -> dict[str, float]:
  """What the best answer that ignores the question scores on these targets.

  Args:
    targets: [sequences, M].

  Returns:
    const_exact: share of the commonest answer vector; const_bit: share of the commonest single answer.
  """
  targets = np.asarray(targets)
  _, vectors = np.unique(targets, axis=0, return_counts=True)
  _, singles = np.unique(targets, return_counts=True)
  return {"const_exact": vectors.max() / len(targets), "const_bit": singles.max() / targets.size}


def make_evaluate(
  held_out: Callable[[jax.Array], windows.Batch],
  num_batches: int,
  segments: windows.Plan,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
) -> Callable[[model.Params], dict[str, float]]:
  """An evaluation on a fixed held-out set, one device call.

  Args:
    held_out: index -> batch; pure, traced.
    num_batches: batches 0 .. num_batches - 1 are the set.

  Returns:
    weights -> rates, with the best constant's beside them.
  """
  where = windows.answer_positions(segments)

  @jax.jit
  def sums(weights):
    def one(index):
      batch = held_out(index)
      logits, _ = model.forward(weights, batch, segments, cfg, sleep_cfg.forward_only)
      return score(logits, batch.targets[:, where], batch.loss_mask[:, where])

    return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.lax.map(one, jnp.arange(num_batches)))

  answers = jax.jit(lambda: jax.lax.map(lambda i: held_out(i).targets[:, where], jnp.arange(num_batches)))()
  constant = best_constant(processes.gather(answers).reshape(-1, len(where)))
  return lambda weights: rates(jax.device_get(sums(weights))) | constant
