"""Tokens a second of decoding, beside transformers on the same checkpoint; and seconds to the first token.

    make smollm2 peers
    python -m benchmarks.decoding --threads=2
    python -m benchmarks.decoding --threads=1

Both decode greedily from the same prompt, in one process, in turns; their tokens must be the same.
"""

import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import decoding, generate, pretrained
from sleep_jax.benchmarks import command, measure, tables
from sleep_jax.config import FastConfig, SleepConfig
from sleep_jax.kernels.measure import flags

WINDOW, PROMPT, TOKENS = 512, 64, 16  # L; tokens read before; tokens decoded in a call
MEMORY = FastConfig(num_heads=9, key_dim=64, value_dim=64)
GREEDY = generate.SamplingConfig(temperature=0.0)
SLEEP = SleepConfig(num_passes=2)
NOTES = (
  f"A call decodes {TOKENS} tokens after {PROMPT}, batch 1, float32, L = {WINDOW}. Ratios are of medians.",
  "`bytes` is what the compiled step of one token reads and writes, over the bytes of weights, cache and"
  " state.",
  "The head is the largest product, [1, 576] x [576, 49152]. XLA multiplies bfloat16 and int8 on a CPU by"
  " making float32 of a whole matrix first; the rows below are the fastest of several other ways.",
  "The first token is that of `experiments.generate` in a process of its own: Python, JAX, reading the"
  " checkpoint and compiling, with an empty and with a filled JAX_COMPILATION_CACHE_DIR.",
)


def main(argv: Sequence[str] | None = None) -> int:
  parser = flags.Parser("benchmarks.decoding", __doc__)
  parser.add_argument(
    "--checkpoint", type=pathlib.Path, default=pathlib.Path("checkpoints/SmolLM2-135M-Instruct")
  )
  parser.add_argument("--threads", type=flags.count, default=None, help="cores; all if not given")
  parser.add_argument("--rounds", type=flags.count, default=7)
  parser.add_argument("--out", type=command.out, default="benchmarks/results")
  args = parser.parse_args(argv)
  threads = measure.pin(args.threads)
  facts = tables.machine(("jax", "jaxlib", "torch", "transformers"))
  results = {
    "Decoding": speeds(args.checkpoint, threads, args.rounds),
    "Weights: the head in other dtypes": dtypes(args.rounds),
    "First: the first token": first_token(args.checkpoint),
  }
  title = f"Decoding SmolLM2-135M on {threads} core(s)"
  tables.save(args.out, f"decoding_{threads}core", title, results, tables.finish(facts), NOTES)
  return 0


def speeds(checkpoint: pathlib.Path, threads: int, rounds: int) -> list[dict[str, Any]]:
  """One row a contender."""
  cfg, weights, _ = pretrained.load(checkpoint, window=WINDOW)
  prompt = np.random.default_rng(0).integers(100, 40_000, (1, PROMPT), dtype=np.int32)
  plain, step, share = ours(cfg, weights, prompt)
  with_memory, step_memory, share_memory = ours(
    *pretrained.add_memory(cfg, weights, jax.random.key(0), num_layers=6, fast=MEMORY), prompt
  )
  rival, rival_step = transformers(checkpoint, prompt, threads)
  if not plain == with_memory == rival:
    raise SystemExit(f"failed: the tokens differ: {plain}, {with_memory}, {rival}")
  contenders = {"sleep_jax": step, "sleep_jax, six layers of memory": step_memory, "transformers": rival_step}
  times = measure.interleave(contenders, rounds)
  shares = {"sleep_jax": share, "sleep_jax, six layers of memory": share_memory}
  base = times["transformers"]
  return [
    {
      "": name,
      "tokens/s": TOKENS / t.median("wall"),
      "CPU ms a token": 1e3 * t.median("cpu") / TOKENS,
      "speed": base.median("wall") / t.median("wall"),
      "speed by CPU time": base.median("cpu") / t.median("cpu"),
      "bytes": shares.get(name),
    }
    for name, t in times.items()
  ]


def ours(cfg: Any, weights: Any, prompt: np.ndarray) -> tuple[list[int], Callable[[], Any], float]:
  """The tokens, a call that decodes them, and the bytes that a step moves over those that it needs."""
  session = generate.read(weights, prompt, generate.start(cfg, SLEEP), cfg, SLEEP)

  def decode() -> list[int]:
    made = generate.generate(
      weights, session, cfg, SLEEP, count=TOKENS, key=jax.random.key(0), sampling=GREEDY, reuse=True
    )
    return [int(token[0]) for token, _ in made]

  args = (weights, np.zeros((1, 1), np.int32), np.ones((1, 1), bool), session.fast, session.cache)
  needed = sum(x.nbytes for x in jax.tree.leaves((weights, session.fast, session.cache)))
  moved = decoding.token.lower(*args, cfg).compile().cost_analysis()["bytes accessed"]
  return decode(), decode, moved / needed


def transformers(checkpoint: pathlib.Path, prompt: np.ndarray, threads: int) -> tuple[list[int], Callable]:
  """The same by transformers: its own loop is slower than this one, which calls the model alone."""
  import torch
  from transformers import AutoModelForCausalLM, DynamicCache

  torch.set_num_threads(threads)
  peer = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
  cache = DynamicCache(config=peer.config)
  with torch.inference_mode():
    begun = peer(torch.from_numpy(prompt.astype(np.int64)), past_key_values=cache).logits[:, -1].argmax(-1)

  def decode() -> list[int]:
    token, tokens = begun, [int(begun)]
    with torch.inference_mode():
      for _ in range(TOKENS):
        token = peer(token[:, None], past_key_values=cache).logits[:, -1].argmax(-1)
        tokens.append(int(token))
    cache.crop(-TOKENS)
    return tokens[:TOKENS]  # we, too, read the last one

  return decode(), decode


def dtypes(rounds: int) -> list[dict[str, Any]]:
  """One vector times the head in float32, bfloat16 and int8 (a scale a row)."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=576), jnp.float32)
  head = jnp.asarray(rng.normal(size=(49152, 576)), jnp.float32)
  scale = jnp.max(jnp.abs(head), axis=1) / 127
  whole = jnp.round(head / scale[:, None]).astype(jnp.int8)
  product = jax.jit(lambda w, x: jax.lax.dot(w, x))
  summed = jax.jit(lambda w, x: jnp.sum(w.astype(jnp.float32) * x, axis=1))
  scaled = jax.jit(lambda w, s, x: s * jnp.sum(w.astype(jnp.float32) * x, axis=1))
  half, exact = head.astype(jnp.bfloat16), product(head, x)
  calls = {
    "float32": lambda: product(head, x).block_until_ready(),
    "bfloat16": lambda: summed(half, x).block_until_ready(),
    "int8": lambda: scaled(whole, scale, x).block_until_ready(),
  }
  errors = {name: float(jnp.std(call() - exact) / jnp.std(exact)) for name, call in calls.items()}
  times = measure.interleave(calls, rounds, least_s=0.2)
  return [
    {
      "dtype": name,
      "ms": 1e3 * t.median("wall"),
      "CPU ms": 1e3 * t.median("cpu"),
      "error, of the logits' spread": errors[name],
    }
    for name, t in times.items()
  ]


def first_token(checkpoint: pathlib.Path) -> list[dict[str, Any]]:
  """Seconds of a process that generates one token, without and with programs compiled before."""
  rows = []
  with tempfile.TemporaryDirectory() as cache:
    for name, repeats in (("cold", 1), ("warm", 3)):
      taken = [_one_token(checkpoint, cache) for _ in range(repeats)]
      wall, cpu = (statistics.median(x) for x in zip(*taken, strict=True))
      rows.append({"compilation cache": name, "s": wall, "CPU s": cpu})
  return rows


def _one_token(checkpoint: pathlib.Path, cache: str) -> tuple[float, float]:
  command = [sys.executable, "-m", "experiments.generate", "--config=experiments/configs/generate.py"]
  command += [f"--config.checkpoint={checkpoint}", "--prompt=The capital of France is"]
  command += ["--config.max_new_tokens=1", f"--config.window={WINDOW}"]
  changes = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
  before, begun = os.times(), time.perf_counter()
  subprocess.run(command, check=True, capture_output=True, env=os.environ | changes)
  after = os.times()
  used = after.children_user + after.children_system - before.children_user - before.children_system
  return time.perf_counter() - begun, used


if __name__ == "__main__":
  sys.exit(command.run(main, None))
