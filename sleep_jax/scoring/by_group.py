"""Exact match of answers by group (hops, operations), with intervals, the majority and other baselines.

An answer is one or more tokens; it is right if all of them are. A sequence may have several. Scores are sums
over sequences, so that they do not depend on how these are cut into batches.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import model, sharding, windows
from sleep_jax.config import ModelConfig, SleepConfig
from sleep_jax.data import batching
from sleep_jax.runtime import processes
from sleep_jax.scoring.intervals import wilson

Sums = dict[str, Any]


def score(
  logits: jax.Array,
  targets: jax.Array,
  mask: jax.Array,
  answer: jax.Array,
  group: jax.Array,
  num_answers: int,
  num_groups: int,
) -> Sums:
  """Sums over a batch, by group and by place of the answer, from which `rates` makes rates.

  Args:
    logits: [B, M, vocab].
    targets, mask: [B, M]; mask is 1 where the loss counts.
    answer: [B, M] int, which answer of its sequence a target belongs to; -1 for none.
    group: [B] int in 0..num_groups - 1.

  Returns:
    nats, tokens [num_groups] (all that counts in the loss); answer_nats, answer_tokens, right, asked
    [num_groups, num_answers] (tokens of answers; whole answers).
  """
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
  chosen = jax.nn.one_hot(
    targets, logits.shape[-1], dtype=log_p.dtype
  )  # no gather: the vocabulary may be split
  nats = -jnp.sum(chosen * log_p, axis=-1) * mask
  hit = jnp.argmax(logits, axis=-1) == targets
  of = (answer[:, :, None] == jnp.arange(num_answers)) & (mask > 0)[:, :, None]  # [B, M, Q]
  asked = jnp.any(of, axis=1)
  right = asked & jnp.all(hit[:, :, None] | ~of, axis=1)
  mine = (group[:, None] == jnp.arange(num_groups)).astype(jnp.float32)  # [B, G]

  def by_group(x: jax.Array) -> jax.Array:
    """[B, ...] -> [G, ...]."""
    x = x.astype(jnp.float32)
    return jnp.sum(mine.reshape(*mine.shape, *[1] * (x.ndim - 1)) * x[:, None], axis=0)

  return {
    "nats": by_group(jnp.sum(nats, axis=1)),
    "tokens": by_group(jnp.sum(mask > 0, axis=1)),
    "answer_nats": by_group(jnp.sum(nats[:, :, None] * of, axis=1)),
    "answer_tokens": by_group(jnp.sum(of, axis=1)),
    "right": by_group(right),
    "asked": by_group(asked),
  }


def rates(sums: Sums, groups: Sequence[str]) -> dict[str, Any]:
  """Rates of summed scores; NaN where nothing was asked.

  Returns:
    loss (nats a target), answer_loss (nats a token of an answer) and exact over all groups; for each group
    `GROUP_loss`, `_answer_loss`, `_exact`, `_low`, `_high` (Wilson, 95 %) and `_asked`; and
    `by_answer`: group -> answer_loss and exact by the answer's place in its sequence.
  """
  s = {name: np.asarray(x, np.float64) for name, x in sums.items()}
  row: dict[str, Any] = {
    "loss": _ratio(s["nats"].sum(), s["tokens"].sum()),
    "answer_loss": _ratio(s["answer_nats"].sum(), s["answer_tokens"].sum()),
    "exact": _ratio(s["right"].sum(), s["asked"].sum()),
  }
  row["low"], row["high"] = wilson(s["right"].sum(), s["asked"].sum())
  by_answer = {}
  for g, name in enumerate(groups):
    right, asked = s["right"][g].sum(), s["asked"][g].sum()
    row[f"{name}_loss"] = _ratio(s["nats"][g], s["tokens"][g])
    row[f"{name}_answer_loss"] = _ratio(s["answer_nats"][g].sum(), s["answer_tokens"][g].sum())
    row[f"{name}_exact"] = _ratio(right, asked)
    row[f"{name}_low"], row[f"{name}_high"] = wilson(right, asked)
    row[f"{name}_asked"] = int(asked)
    by_answer[name] = {
      "answer_loss": [_ratio(*x) for x in zip(s["answer_nats"][g], s["answer_tokens"][g], strict=True)],
      "exact": [_ratio(*x) for x in zip(s["right"][g], s["asked"][g], strict=True)],
    }
  return row | {"by_answer": by_answer}


def majority(
  targets: np.ndarray, answer: np.ndarray, group: np.ndarray, groups: Sequence[str], num_answers: int
) -> dict[str, float]:
  """What the commonest answer of each group gets: `const_exact` over all, `GROUP_majority` for each.

  Args:
    targets, answer: [sequences, M].
    group: [sequences].
  """
  vectors, members = [], []
  for q in range(num_answers):
    of = answer == q
    rows = of.any(axis=1)
    # an answer's tokens lie side by side: moved to the front, -1 behind
    order = np.argsort(~of[rows], axis=1, kind="stable")
    moved = np.take_along_axis(np.where(of, targets, -1)[rows], order, axis=1)
    vectors.append(moved)
    members.append(np.asarray(group)[rows])
  vectors, members = np.concatenate(vectors), np.concatenate(members)
  vectors = vectors[:, : max(1, int((vectors >= 0).sum(axis=1).max(initial=1)))]

  def commonest(rows: np.ndarray) -> float:
    return _ratio(np.unique(rows, axis=0, return_counts=True)[1].max(), len(rows)) if len(rows) else math.nan

  each = {f"{name}_majority": commonest(vectors[members == g]) for g, name in enumerate(groups)}
  return {"const_exact": commonest(vectors)} | each


def make_evaluate(
  held_out: Callable[[int, jax.Array], windows.Batch],
  groups: Sequence[str],
  num_batches: int,
  answer_of: Callable[[jax.Array, jax.Array], jax.Array],
  num_answers: int,
  segments: windows.Plan,
  forward: Callable[[model.Params, windows.Batch], jax.Array],
) -> Callable[[model.Params], dict[str, Any]]:
  """An evaluation on fixed sets that the device makes, one a group, of equal size.

  Args:
    held_out: (group, index) -> batch; pure, traced in the index.
    num_batches: batches 0 .. num_batches - 1 are the set of each group.
    answer_of: (targets, mask), each [B, M] -> [B, M], as `score` takes it.
    forward: (weights, batch) -> logits [B, M, vocab] at the answers' positions.

  Returns:
    weights -> `rates` and `majority`.
  """
  where = windows.answer_positions(segments)

  def labels(batch: windows.Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    targets, mask = batch.targets[:, where], batch.loss_mask[:, where]
    return targets, mask, answer_of(targets, mask)

  @jax.jit
  def sums(weights):
    def one(g, index):
      batch = held_out(g, index)
      group = jnp.full((batch.inputs.shape[0],), g)
      return score(forward(weights, batch), *labels(batch), group, num_answers, len(groups))

    each = [jax.lax.map(lambda i, g=g: one(g, i), jnp.arange(num_batches)) for g in range(len(groups))]
    return jax.tree.map(lambda *x: sum(jnp.sum(y, axis=0) for y in x), *each)

  @jax.jit
  def asked():
    def one(g, i):
      targets, _, answer = labels(held_out(g, i))
      return targets, answer

    return [jax.lax.map(lambda i, g=g: one(g, i), jnp.arange(num_batches)) for g in range(len(groups))]

  made = [[np.asarray(x).reshape(-1, len(where)) for x in pair] for pair in processes.gather(asked())]
  group = np.concatenate([np.full(len(targets), g) for g, (targets, _) in enumerate(made)])
  targets, answer = (np.concatenate([pair[i] for pair in made]) for i in (0, 1))
  baseline = majority(targets, answer, group, groups, num_answers)
  return lambda weights: rates(jax.device_get(sums(weights)), groups) | baseline


def stack(
  examples: Sequence[batching.Example],
  bucket: batching.Bucket,
  cut: batching.CutConfig,
  window: int,
  size: int = 0,
) -> tuple[windows.Batch, np.ndarray]:
  """Examples as a batch of NumPy arrays, and their groups [B].

  Args:
    size: rows at least; those that are missing repeat the first example with no loss, so that they count
      nowhere.
  """
  rows = [batching.place(example, bucket, cut, window) for example in examples]
  rows += [rows[0] | {"loss_mask": np.zeros_like(rows[0]["loss_mask"])}] * (size - len(rows))
  columns: dict[str, Any] = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  group = columns.pop("group")
  return windows.Batch(**columns), group


def make_host_evaluate(
  sets: Mapping[str, batching.HeldOut],
  groups: Sequence[str],
  cut: batching.CutConfig,
  batch_size: int,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
  mesh: jax.sharding.Mesh,
  *,
  forget: bool = False,
) -> Callable[[model.Params], dict[str, Any]]:
  """An evaluation on fixed sets of examples that the host holds.

  An answer is right if all its tokens are, its end included. The model reads it awake in one pass, the true
  tokens before each place given (teacher forcing), without loops or scratch tokens. That is the exact match
  of greedy decoding: greedy decoding gives the model the true tokens as long as it was right so far, so both
  agree up to the first wrong token, and from there on both have failed.

  Every example has the shape of its own bucket whatever the batch, and rows that fill up the last batch of a
  bucket have no loss: scores do not depend on `batch_size`.

  Args:
    sets: by name.
    groups: names of the groups.
    batch_size: sequences a device call, a multiple of the mesh axis `data`.
    forget: every window begins with an empty state, so that an answer sees the last window alone.

  Returns:
    weights -> `rates` and `majority` of the first set, and `GROUP_NAME` of its guesses; the same of every
    other set, each key behind the set's name and a `_`.
  """
  count = len(sets) * len(groups)  # each set has groups of its own
  examples = [
    e._replace(group=e.group + i * len(groups)) for i, s in enumerate(sets.values()) for e in s.examples
  ]
  buckets: dict[batching.Bucket, list[batching.Example]] = {}
  for example in examples:
    buckets.setdefault(batching.bucket_of(example, cut, cfg.window), []).append(example)
  host, hosts = jax.process_index(), jax.process_count()

  def batches(bucket: batching.Bucket) -> Iterator[tuple[windows.Batch, np.ndarray]]:
    members, mine = buckets[bucket], batch_size // hosts
    for start in range(0, len(members), batch_size):
      whole = stack(members[start : start + batch_size], bucket, cut, cfg.window, batch_size)
      if forget:
        shape = whole[0].inputs.shape
        begins = np.broadcast_to(np.arange(shape[1]) % cfg.window == 0, shape)
        whole = dataclasses.replace(whole[0], begins=begins), whole[1]
      yield jax.tree.map(lambda x: x[host * mine : (host + 1) * mine], whole)

  def make_sums(bucket: batching.Bucket) -> Callable[..., Sums]:
    segments = windows.plan(batching.layout(bucket, cut, cfg.window), cfg.window, sleep_cfg)
    where = windows.answer_positions(segments)

    @jax.jit
    def sums(weights, batch, group):
      logits, _ = model.forward(weights, batch, segments, cfg, sleep_cfg.forward_only)
      mask = batch.loss_mask[:, where]
      return score(logits, batch.targets[:, where], mask, jnp.where(mask > 0, 0, -1), group, 1, count)

    return sums

  made = {bucket: make_sums(bucket) for bucket in sorted(buckets)}
  baselines = {kind: _baselines(held, groups, cut.answer_tokens) for kind, held in sets.items()}

  def evaluate(weights: model.Params) -> dict[str, Any]:
    parts = [
      made[bucket](weights, *sharding.put(batch, mesh)) for bucket in made for batch in batches(bucket)
    ]
    sums = jax.tree.map(lambda *x: sum(x), *jax.device_get(parts))
    row: dict[str, Any] = {}
    for i, kind in enumerate(sets):
      own = jax.tree.map(lambda x, i=i: x[i * len(groups) : (i + 1) * len(groups)], sums)
      prefix = f"{kind}_" if i else ""
      row |= {f"{prefix}{key}": x for key, x in (rates(own, groups) | baselines[kind]).items()}
    return row

  return evaluate


def _baselines(held: batching.HeldOut, groups: Sequence[str], answer_tokens: int) -> dict[str, float]:
  """What a set's commonest answers and its guesses get."""
  vectors = np.full((len(held.examples), answer_tokens), -1)
  for vector, example in zip(vectors, held.examples, strict=True):
    vector[: len(example.answer)] = example.answer
  of_group = np.asarray([example.group for example in held.examples])
  row = majority(vectors, np.where(vectors >= 0, 0, -1), of_group, groups, 1)
  for name, right in held.guesses.items():
    for g, group in enumerate(groups):
      mine = np.asarray(right)[of_group == g]
      row[f"{group}_{name}"] = _ratio(mine.sum(), len(mine))
  return row


def _ratio(over: float, under: float) -> float:
  return float(over) / float(under) if under else math.nan
