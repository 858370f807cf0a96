"""Milliseconds a token while a model generates: how long the token at a window's end waits for sleep.

    python -m benchmarks.stall --passes=4 --spread=0,4,32
    python -m benchmarks.stall --checkpoint=checkpoints/SmolLM2-135M-Instruct --window=512 --spread=0,4,64
    python -m benchmarks.stall --checkpoint=work/novels/exported --window=512 --spread=0,4,64 --text=novel.txt

Every value of `sleep.spread` (0: all passes at once) generates the same number of tokens, in turns. Without a
checkpoint the model is a hybrid of random weights; a checkpoint without fast weights is given a memory. With
a text, a second table says how well each of them predicts it.
"""

import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sleep_jax import config, generate, model, pretrained
from sleep_jax.benchmarks import command, measure, tables
from sleep_jax.config import ATTENTION, FastConfig, ModelConfig, SleepConfig
from sleep_jax.experiments.generate_io import prompt_pieces
from sleep_jax.kernels.measure import flags
from sleep_jax.pretrained.tokenizer import Tokenizer

MEMORY = FastConfig(num_heads=9, key_dim=64, value_dim=64)
NOTES = (
  "A token's time is that of its `generate` step, all passes of sleep that are made in it included; compiling"
  " is not. `most` is the slowest token: without a spread, one at a window's end.",
  "Where a sleep is spread, the K tokens behind a window are answered by the old memory, and read twice.",
)
QUALITY = (
  "`nats behind a window`: of the tokens that follow the first tokens of each window but the first one, as"
  " many as the largest spread: they are the ones that a spread changes, and the same for all rows."
)


def main(argv: Sequence[str] | None = None) -> int:
  parser = flags.Parser("benchmarks.stall", __doc__)
  parser.add_argument("--checkpoint", type=pathlib.Path, default=None)
  parser.add_argument("--window", type=flags.count, default=128, help="L")
  parser.add_argument("--passes", type=flags.count, default=4, help="N")
  parser.add_argument("--spread", type=flags.naturals, default=(0, 4, 32), help="of sleep.spread")
  parser.add_argument("--text", type=pathlib.Path, default=None, help="a UTF-8 file to predict")
  parser.add_argument("--windows", type=flags.count, default=3, help="that a turn fills and predicts")
  parser.add_argument("--rounds", type=flags.count, default=3)
  parser.add_argument("--threads", type=flags.count, default=None, help="cores; all if not given")
  parser.add_argument("--out", type=command.out, default="benchmarks/results")
  args = parser.parse_args(argv)
  threads = measure.pin(args.threads)
  cfg = ModelConfig(vocab_size=4096, window=args.window)
  sleeps = [SleepConfig(num_passes=args.passes, spread=late) for late in args.spread]
  for sleep_cfg in sleeps:
    config.check_sleep(sleep_cfg, cfg)
  config.check(args.text is None or args.checkpoint is not None, "--text", "needs --checkpoint")
  cfg, weights = _loaded(args.checkpoint, args.window) if args.checkpoint else (cfg, _drawn(cfg))
  tokens = _tokens(args.checkpoint, args.text, cfg, args.windows) if args.text else None
  facts = tables.machine()
  results = {"Tokens": measured(weights, cfg, sleeps, windows=args.windows, rounds=args.rounds)}
  if tokens is not None:
    results["Quality"] = predicted(weights, cfg, sleeps, tokens)
  name = args.checkpoint.name if args.checkpoint else "a hybrid of random weights"
  title = f"Milliseconds a token: {name}, L = {args.window}, N = {args.passes}, {threads} core(s)"
  notes = NOTES if tokens is None else (*NOTES, QUALITY)
  tables.save(args.out, f"stall_{threads}core", title, results, tables.finish(facts), notes)
  return 0


def measured(
  weights: model.Params, cfg: ModelConfig, sleeps: Sequence[SleepConfig], *, windows: int, rounds: int
) -> list[dict[str, Any]]:
  """One row a sleep: the milliseconds that half of the tokens, 99 of 100 and all of them took at most.

  Args:
    windows: that each turn fills; the first window of a turn follows no sleep.
    rounds: turns of each that count; one more comes first, in which programs are compiled.
  """
  taken: list[list[float]] = [[] for _ in sleeps]
  for i in range(rounds + 1):
    for place in range(len(sleeps)):
      which = (i + place) % len(sleeps)
      seconds = _turn(weights, cfg, sleeps[which], (windows + 1) * cfg.window)
      taken[which] += seconds if i else []
  rows = []
  for sleep_cfg, seconds in zip(sleeps, taken, strict=True):
    half, most, longest = 1e3 * np.percentile(seconds, (50, 99, 100))
    row = {"spread": sleep_cfg.spread or 0, "tokens": len(seconds), "p50 ms": float(half)}
    row |= {"p99 ms": float(most), "most ms": float(longest), "tokens/s": len(seconds) / sum(seconds)}
    rows.append(row)
  return rows


def predicted(
  weights: model.Params, cfg: ModelConfig, sleeps: Sequence[SleepConfig], tokens: np.ndarray
) -> list[dict[str, Any]]:
  """One row a sleep: nats a token of a text, read token by token, as a generation reads what it has drawn.

  Args:
    tokens: [T] int32, T - 1 > L.
  """
  longest = max(sleep_cfg.spread or 1 for sleep_cfg in sleeps)
  read = np.arange(len(tokens) - 1)  # place of the token that was read last
  behind = (read >= cfg.window) & (read % cfg.window < longest)
  rows = []
  for sleep_cfg in sleeps:
    session, nats = generate.start(cfg, sleep_cfg), []
    for token, following in zip(tokens[:-1], tokens[1:], strict=True):
      session = generate.read(weights, [[int(token)]], session, cfg, sleep_cfg, reuse=True)
      nats.append(float(model.nats(session.logits[:, None], np.array([[following]]))[0, 0]))
    means = float(np.mean(nats)), float(np.mean(np.array(nats)[behind]))
    rows.append(
      {"spread": sleep_cfg.spread or 0, "tokens": len(nats), "nats a token": means[0]}
      | {"behind a window": int(behind.sum()), "nats behind a window": means[1]}
    )
  return rows


def _turn(weights: model.Params, cfg: ModelConfig, sleep_cfg: SleepConfig, count: int) -> list[float]:
  """Seconds of each of `count` tokens behind a prompt of one."""

  def wait(what: str, session: generate.Session, seconds: float) -> None:
    """That there is a watcher makes every step wait for its end."""

  session = generate.read(weights, [[1]], generate.start(cfg, sleep_cfg), cfg, sleep_cfg)
  key, seconds, begun = jax.random.key(0), [], time.perf_counter()
  steps = generate.generate(weights, session, cfg, sleep_cfg, count=count, key=key, watch=wait, reuse=True)
  for _ in steps:
    now = time.perf_counter()
    seconds.append(now - begun)
    begun = now
  return seconds


def _drawn(cfg: ModelConfig) -> model.Params:
  return jax.jit(lambda key: model.init(cfg, key))(jax.random.key(0))


def _tokens(folder: pathlib.Path, text: pathlib.Path, cfg: ModelConfig, windows: int) -> np.ndarray:
  """The first tokens of a text, one more than so many windows and one have."""
  with prompt_pieces(str(text)) as pieces:
    tokens, most = [], (windows + 1) * cfg.window + 1
    for part in Tokenizer(folder, cfg).encode_parts(pieces):
      tokens += part
      if len(tokens) >= most:
        break
  config.check(len(tokens) > cfg.window + 1, "--text", f"{text} has {len(tokens)} tokens, needs two windows")
  return np.array(tokens[:most], np.int32)


def _loaded(folder: pathlib.Path, window: int) -> tuple[ModelConfig, model.Params]:
  cfg, weights, _ = pretrained.load(folder, window=window)
  if set(cfg.blocks) <= set(ATTENTION):
    cfg, weights = pretrained.add_memory(cfg, weights, jax.random.key(0), num_layers=6, fast=MEMORY)
  return cfg, weights


if __name__ == "__main__":
  sys.exit(command.run(main, None))
