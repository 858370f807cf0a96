"""What sleep costs as N grows, and what an answer costs however much was read.

    python -m benchmarks.scaling --preset=fig2b

A window slept on should cost N times one pass. An answer, and what is kept for it, should depend neither on
N nor on how much was read; beside them stands a transformer of the same blocks, all attention, that keeps
the keys and values of everything.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import attention, looped, model
from sleep_jax.benchmarks import command, measure, tables
from sleep_jax.config import ModelConfig, SleepConfig
from sleep_jax.kernels.measure import flags
from sleep_jax.runtime.files import RunFailedError

ANSWERS = 8  # tokens decoded in one timed call, one at a time


def main(argv: Sequence[str] | None = None) -> int:
  args = _arguments(argv)
  threads = measure.pin(args.threads)
  facts = tables.machine()
  cfg, _ = measure.rule110_config(args.preset, sleep={"loops": "unroll"})
  weights = measure.quick(lambda: model.init(cfg.model, jax.random.key(cfg.seed)))()
  made = {
    "Sleep: one window": sleep_table(
      weights, cfg.model, cfg.sleep, args.passes, args.batch, args.rounds, args.turn
    ),
    "Wake: one token of an answer": wake_table(
      weights, cfg.model, cfg.sleep, args.passes, args.lengths, args.rounds, args.turn
    ),
  }
  asleep, awake = made.values()
  facts = tables.finish(facts) | {
    "rounds": f"{args.rounds}, in turns; {threads} core(s)",
    "sleep": f"windows of {cfg.model.window} tokens; {fit(asleep, 'wall ms')}; {fit(asleep, 'CPU ms')}",
    "wake": f"{spread(awake, 'wall ms')}; {spread(awake, 'CPU ms')}",
  }
  tables.save(
    args.out,
    f"scaling_{args.preset}",
    f"What sleeping and answering cost, Rule 110 preset `{args.preset}`",
    made,
    facts,
    NOTES,
  )
  return 0


NOTES = (
  "Sleep runs forward only, as it does when the model is used. `of fit` compares with the straight line"
  " through all N.",
  "Wake decodes token after token with `model.decode`, batch 1, behind T tokens that were really slept"
  " on. `state` is what is kept of them (fast weights and the convolution's inputs), `window` the"
  " attention cache, which holds one window and no more.",
  "`transformer` decodes with the same sizes, every block attention, with a cache of T tokens and room"
  " for the answer; its weights are random, which does not change its cost. It is timed in the same"
  " turns.",
)


def sleep_table(
  weights: model.Params,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
  passes: Sequence[int],
  batches: Sequence[int],
  rounds: int,
  least_s: float,
) -> list[dict[str, Any]]:
  """Milliseconds a window slept on, for each batch and N, and how far from a straight line."""
  rows = []
  for batch in batches:
    calls = {}
    for n in passes:
      asleep = dataclasses.replace(sleep_cfg, num_passes=n, remat="none", backprop_passes=None)
      tokens = jax.random.randint(jax.random.key(1), (batch, cfg.window), 0, cfg.vocab_size)
      state = model.init_state(cfg, batch)
      run = jax.jit(lambda w, s, t, asleep=asleep: model.consolidate(w, t, s, cfg, asleep))
      run = run.lower(weights, state, tokens).compile()
      calls[n] = lambda run=run, s=state, t=tokens: jax.block_until_ready(run(weights, s, t))
    times = measure.interleave(calls, rounds, least_s=least_s)
    lines = {clock: _line(passes, [times[n].median(clock) for n in passes]) for clock in ("wall", "cpu")}
    for n in passes:
      row: dict[str, Any] = {"batch": batch, "N": n}
      for clock, title in (("wall", "wall"), ("cpu", "CPU")):
        slope, start = lines[clock]
        median = times[n].median(clock)
        row |= {f"{title} ms": median * 1e3, f"{title} of fit": f"{median / (start + slope * n):.0%}"}
      rows.append(row)
  return rows


def wake_table(
  weights: model.Params,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
  passes: Sequence[int],
  lengths: Sequence[int],
  rounds: int,
  least_s: float,
) -> list[dict[str, Any]]:
  """Milliseconds a token and bytes kept after T tokens, for each N and T; a transformer beside it."""
  answer = jax.jit(lambda w, s, c: _answer(w, s, c, cfg))
  cache = looped.init_cache(cfg, 1)
  states = {}
  for n in passes:
    asleep = dataclasses.replace(sleep_cfg, num_passes=n)
    states |= {(n, t): state for t, state in _read(weights, cfg, asleep, lengths).items()}
  calls: dict[Any, Callable[[], Any]] = {
    key: lambda s=state: jax.block_until_ready(answer(weights, s, cache)) for key, state in states.items()
  }
  kept = {}
  for t in lengths:
    plain = dataclasses.replace(cfg, blocks=("attn",) * len(cfg.blocks), window=t + ANSWERS)
    full = _filled(looped.init_cache(plain, 1), t)
    kept[t] = _bytes(full) * t // (t + ANSWERS)
    own = measure.quick(lambda plain=plain: model.init(plain, jax.random.key(0)))()
    empty = model.init_state(plain, 1)
    run = (
      jax.jit(lambda w, c, plain=plain, empty=empty: _answer(w, empty, c, plain)).lower(own, full).compile()
    )
    calls[t] = lambda run=run, w=own, c=full: jax.block_until_ready(run(w, c))
  for call in calls.values():
    call()
  times = measure.interleave(calls, rounds, least_s=least_s)
  return [
    {
      "N": n,
      "T": t,
      "wall ms": times[n, t].median("wall") * 1e3 / ANSWERS,
      "CPU ms": times[n, t].median("cpu") * 1e3 / ANSWERS,
      "state bytes": _bytes(states[n, t]),
      "window bytes": _bytes(cache),
      "transformer wall ms": times[t].median("wall") * 1e3 / ANSWERS,
      "transformer CPU ms": times[t].median("cpu") * 1e3 / ANSWERS,
      "transformer bytes": kept[t],
    }
    for n, t in states
  ]


def fit(rows: Sequence[dict[str, Any]], column: str) -> str:
  """The straight line through the rows of each batch, as text."""
  found = []
  for batch, members in itertools.groupby(rows, key=lambda row: row["batch"]):
    members = list(members)
    slope, start = _line([row["N"] for row in members], [row[column] for row in members])
    found.append(f"batch {batch}: {start:.3g} + {slope:.3g} N {column}")
  return ", ".join(found)


def spread(rows: Sequence[dict[str, Any]], column: str) -> str:
  """The largest over the smallest value, as text: 1.00 is flat."""
  values = [row[column] for row in rows]
  return f"largest / smallest {column} over all N and T: {max(values) / min(values):.2f}"


def _answer(weights: model.Params, state: model.State, cache: looped.Cache, cfg: ModelConfig) -> jax.Array:
  """Decodes `ANSWERS` tokens, each the likeliest after the one before; the last."""
  fast = model.open_window(state, cfg, 1)[0]

  def step(carry, _):
    token, fast, cache = carry
    logits, fast, cache = model.decode(weights, token, fast, cache, cfg)
    return (jnp.argmax(logits, axis=-1).astype(jnp.int32), fast, cache), None

  (token, _, _), _ = jax.lax.scan(step, (jnp.zeros((1, 1), jnp.int32), fast, cache), length=ANSWERS)
  return token


def _read(
  weights: model.Params, cfg: ModelConfig, sleep_cfg: SleepConfig, lengths: Sequence[int]
) -> dict[int, model.State]:
  """T -> the state after T random tokens, all of them slept on; batch 1."""
  window = measure.quick(lambda s, t: model.consolidate(weights, t, s, cfg, sleep_cfg))
  tokens = jax.random.randint(
    jax.random.key(2), (max(lengths) // cfg.window, 1, cfg.window), 0, cfg.vocab_size
  )
  state, found = model.init_state(cfg, 1), {}
  for i, part in enumerate(tokens):
    state = window(state, part)
    if (i + 1) * cfg.window in lengths:
      found[(i + 1) * cfg.window] = state
  if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state)):
    raise RunFailedError(f"the state is not finite after {max(lengths)} tokens")
  return found


def _filled(cache: looped.Cache, length: int) -> looped.Cache:
  """The cache as if `length` tokens were in it."""

  def fill(c: attention.KVCache) -> attention.KVCache:
    return c.replace(valid=c.valid.at[:, :length].set(True), length=jnp.asarray(length, jnp.int32))

  return jax.block_until_ready(tuple({i: fill(c) for i, c in one.items()} for one in cache))


def _bytes(tree: Any) -> int:
  """Bytes of keys, values, fast weights and convolution inputs; flags and counters are left out."""
  return sum(x.nbytes for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating))


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
  """Slope and intercept of least squares."""
  if len(x) < 2:
    return y[0] / x[0], 0.0
  slope, start = np.polyfit(x, y, 1)
  return float(slope), float(start)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = flags.Parser("benchmarks.scaling", __doc__)
  numbers = flags.counts
  parser.add_argument("--preset", choices=("tiny", "demo", "fig2b"), default="fig2b")
  parser.add_argument("--passes", type=numbers, default=(1, 2, 4, 8), help="values of N, with commas")
  parser.add_argument(
    "--lengths", type=numbers, default=(96, 384, 1536, 6144), help="values of T, multiples of L"
  )
  parser.add_argument("--batch", type=numbers, default=(1, 32), help="windows slept on at a time")
  parser.add_argument("--rounds", type=flags.count, default=15)
  parser.add_argument("--turn", type=flags.from_zero, default=0.1, help="seconds of work in a turn, at least")
  parser.add_argument("--threads", type=flags.count, default=1, help="cores to use")
  parser.add_argument("--out", type=command.out, default="benchmarks/results")
  return parser.parse_args(argv)


if __name__ == "__main__":
  sys.exit(command.run(main, None))
