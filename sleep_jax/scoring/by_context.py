"""Loss on text by how much of it was read before, and by what of it is long evicted."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import model, sharding, windows
from sleep_jax.config import ATTENTION, ModelConfig, SleepConfig, check_sleep
from sleep_jax.data.text.rows import KINDS, Rows
from sleep_jax.runtime import processes
from sleep_jax.scoring.intervals import wilson


def chosen(rows: Rows, most: int) -> list[int]:
  """At most `most` rows, spread evenly over all of them."""
  count = min(most, len(rows))
  return [i * len(rows) // count for i in range(count)]


def buckets(length: int, window: int) -> list[tuple[int, int]]:
  """Ranges of the position of a target, in windows: the first, the second, two more, four more, ...

  >>> buckets(length=32, window=4)
  [(0, 4), (4, 8), (8, 16), (16, 32)]
  """
  found, start, end = [], 0, window
  while start < length:
    found.append((start, min(end, length)))
    start, end = end, 2 * end
  return found


def forms(
  cfg: ModelConfig, sleep_cfg: SleepConfig, passes: list[int], length: int
) -> Iterator[tuple[str, ModelConfig, SleepConfig, bool]]:
  """Name, model, sleep, and whether every window forgets what was before it, of each form."""
  plain = SleepConfig(when="unread")
  yield "full attention", dataclasses.replace(cfg, window=length, eviction="hard"), plain, False
  yield "window only", dataclasses.replace(cfg, eviction="hard"), plain, True
  if set(cfg.blocks) <= set(ATTENTION) and cfg.eviction == "hard":
    return
  for n in passes:
    how = dataclasses.replace(sleep_cfg, when="always", num_passes=n, backprop_passes=None)
    check_sleep(how, cfg)
    yield f"N = {n}", cfg, how, False


def make_evaluate(
  rows: Rows,
  most: int,
  batch_size: int,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
  mesh: jax.sharding.Mesh,
  *,
  forget: bool = False,
) -> Callable[[model.Params], dict[str, Any]]:
  """An evaluation on text that is not trained on, the same rows whatever the model.

  Args:
    rows: of the held-out files.
    most: rows that are read, spread over all of them.
    batch_size: rows a device call, a multiple of the number of processes.
    forget: every window begins with an empty state, so that a token sees its own window alone.

  Returns:
    weights -> `summary`.
  """
  indices = chosen(rows, most)
  described = [rows.described(i) for i in indices]
  segments = windows.plan(np.ones(rows.length, bool), cfg.window, sleep_cfg)
  host, hosts = jax.process_index(), jax.process_count()

  @jax.jit
  def scores(weights, batch):
    logits, _ = model.forward(weights, batch, segments, cfg, sleep_cfg.forward_only)
    return model.nats(logits, batch.targets), jnp.argmax(logits, axis=-1) == batch.targets

  def batch(start: int) -> windows.Batch:
    own = [described[i % len(described)] for i in range(start, start + batch_size)]
    own = own[host * batch_size // hosts : (host + 1) * batch_size // hosts]
    names = ("inputs", "targets", "loss_mask", "valid", "begins")
    columns: dict[str, Any] = {name: np.stack([row[name] for row in own]) for name in names}
    if forget:
      columns["begins"] = np.broadcast_to(np.arange(rows.length) % cfg.window == 0, columns["begins"].shape)
    return windows.Batch(**columns)

  def evaluate(weights: model.Params) -> dict[str, Any]:
    parts = [
      processes.gather(scores(weights, sharding.put(batch(start), mesh)))
      for start in range(0, len(described), batch_size)
    ]
    nats, right = (np.concatenate([p[i] for p in parts])[: len(described)] for i in (0, 1))
    return summary(described, nats, right, rows.length, rows.window)

  return evaluate


def summary(
  described: Sequence[Mapping[str, np.ndarray]], nats: np.ndarray, right: np.ndarray, length: int, window: int
) -> dict[str, Any]:
  """What is reported of an evaluation.

  Args:
    described: the rows, from `Rows.described`.
    nats, right: of each target, [rows, T].

  Returns:
    loss (nats a token), perplexity, nats_a_byte, bits_a_byte; exact (share of tokens that are the likeliest
    one) with its 95 % interval `low`, `high`, and const_exact, what the commonest token gets; tokens and
    bytes that were predicted; and `loss_NAME`, `perplexity_NAME` and `tokens_NAME` for each range of
    positions (`at_0_512`: after 0 .. 511 tokens of the text), each of `KINDS`, and `evicted_names`; None
    where no token is.
  """
  of = {name: np.stack([row[name] for row in described]) for name in described[0]}
  asked = of["loss_mask"] > 0
  nats, count, size = np.asarray(nats, np.float64), int(asked.sum()), int(of["bytes"][asked].sum())
  total, hits = float(nats[asked].sum()), int(np.asarray(right)[asked].sum())
  low, high = wilson(hits, count)
  row: dict[str, Any] = {
    "loss": total / count,
    "perplexity": _exp(total / count),
    "bits_a_byte": total / size / math.log(2) if size else None,
    "exact": hits / count,
    "low": low,
    "high": high,
    "const_exact": int(np.bincount(of["targets"][asked]).max()) / count,
    "tokens_scored": count,
    "bytes_scored": size,
  }
  before = of["position"] - 1
  groups = {f"at_{a}_{b}": (before >= a) & (before < b) for a, b in buckets(length, window)}
  groups |= {name: of["kind"] == i for i, name in enumerate(KINDS)}
  groups["evicted_names"] = of["evicted_name"]
  for name, where in groups.items():
    members = asked & where
    found = int(members.sum())
    mean = float(nats[members].sum()) / found if found else None
    row[f"loss_{name}"], row[f"tokens_{name}"] = mean, found
    row[f"perplexity_{name}"] = None if mean is None else _exp(mean)
  return row


def _exp(nats: float) -> float:
  """e^nats, and the largest float where that is larger."""
  return math.exp(min(nats, 700.0))
