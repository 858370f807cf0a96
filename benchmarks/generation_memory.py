"""Peak memory of `experiments.generate` as its prompt grows: it should not.

    python -m benchmarks.generation_memory --megabytes=1,10,100

Each prompt is a file that one process reads, tokenizes and sleeps on, on a tiny model of random weights. The
system counts that process's largest resident memory.
"""

import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import tokenizers

from sleep_jax import config, model, pretrained
from sleep_jax.benchmarks import command, tables
from sleep_jax.experiments.configs import generate as presets
from sleep_jax.kernels.measure import flags
from sleep_jax.runtime.files import RunFailedError

WORDS, LETTERS, WINDOW = 200, 99, 1000  # of the vocabulary; of a word, a space follows; tokens
WITHIN = 0.10  # of the smallest prompt's memory is what the others may take more
# A small process between the two: a process counts as its own what its parent held when it was started.
STARTER = """
import json, os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(child.pid, 0)
unit = 1 if sys.platform == "darwin" else 1024
code = os.waitstatus_to_exitcode(status)
print(json.dumps({"code": code, "bytes": unit * used.ru_maxrss, "cpu_s": used.ru_utime + used.ru_stime}))
"""
NOTES = (
  f"The model has one Gated DeltaNet block of width 16 and windows of {WINDOW} tokens. Its vocabulary is"
  f" {WORDS} words of {LETTERS} letters, so a token is {LETTERS + 1} bytes of text; a prompt is words drawn"
  " at random.",
  "`more` is what a prompt takes over the first one's peak. Most of every peak is Python and JAX. Programs"
  " were compiled before, by a run that is not in the table: the compiler's memory would hide the rest.",
  f"The command fails if one takes more than {WITHIN:.0%} more.",
)


def main(argv: Sequence[str] | None = None) -> int:
  parser = flags.Parser("benchmarks.generation_memory", __doc__)
  parser.add_argument("--megabytes", type=flags.counts, default=(1, 10, 100), help="as 1,10,100")
  parser.add_argument("--out", type=command.out, default="benchmarks/results")
  args = parser.parse_args(argv)
  facts = tables.machine(("jax", "jaxlib", "numpy", "tokenizers"))
  rows = measured(args.megabytes)
  title = "Peak memory of a generation as its prompt grows"
  tables.save(args.out, "generation_memory", title, {"Memory": rows}, tables.finish(facts), NOTES)
  return int(max(row["more, %"] for row in rows) > 100 * WITHIN)


def measured(megabytes: Sequence[int]) -> list[dict[str, Any]]:
  """One row a prompt: its size, the process's peak in MB, how much more than the first's, its CPU seconds.

  Raises:
    RunFailedError: if the command fails.
  """
  rows: list[dict[str, Any]] = []
  with tempfile.TemporaryDirectory() as scratch:
    checkpoint, prompt = pathlib.Path(scratch) / "checkpoint", pathlib.Path(scratch) / "prompt"
    make_checkpoint(checkpoint)
    write_prompt(prompt, 10**6)
    peak(checkpoint, prompt)
    for size in megabytes:
      print(f"{size} MB", file=sys.stderr, flush=True)
      write_prompt(prompt, size * 10**6)
      used = peak(checkpoint, prompt)
      first = rows[0]["peak, MB"] if rows else used["bytes"] / 1e6
      rows.append(
        {
          "prompt, MB": size,
          "tokens": size * 10**6 // (LETTERS + 1),
          "peak, MB": used["bytes"] / 1e6,
          "more, %": 100 * (used["bytes"] / 1e6 / first - 1),
          "CPU s": used["cpu_s"],
        }
      )
  return rows


def vocabulary() -> list[str]:
  """The words."""
  rng = random.Random(0)
  return ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=LETTERS)) for _ in range(WORDS)]


def make_checkpoint(folder: pathlib.Path) -> None:
  """Writes the model, in our own format, with its tokenizer."""
  cfg = config.ModelConfig(
    vocab_size=WORDS,
    embed_dim=16,
    mlp_dim=16,
    blocks=("gdn",),
    window=WINDOW,
    fast=config.FastConfig(num_heads=1, key_dim=8, value_dim=8),
  )
  words = {word: i for i, word in enumerate(vocabulary())}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=next(iter(words))))
  made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  with tempfile.TemporaryDirectory() as scratch:
    made.save(f"{scratch}/tokenizer.json")
    weights = model.init(cfg, jax.random.key(0))
    pretrained.export_own(folder, cfg, weights, tokenizer=f"{scratch}/tokenizer.json")


def write_prompt(path: pathlib.Path, size: int) -> None:
  """Writes words until there are `size` bytes."""
  rng, words = random.Random(1), vocabulary()
  with path.open("w", encoding="utf-8") as out:
    for at in range(0, size, (LETTERS + 1) * 1000):
      out.write("".join(f"{word} " for word in rng.choices(words, k=1000))[: size - at])


def peak(checkpoint: pathlib.Path, prompt: pathlib.Path) -> dict[str, Any]:
  """Runs the command: `bytes` and `cpu_s` of its process.

  Raises:
    RunFailedError: if it fails, with what it said last.
  """
  command = [
    *(sys.executable, "-W", "ignore", "-m", "sleep_jax.experiments.generate"),
    f"--config={presets.__file__}:plain",
    f"--config.checkpoint={checkpoint}",
    "--config.max_new_tokens=1",
    f"--prompt_file={prompt}",
  ]
  cache = {"JAX_COMPILATION_CACHE_DIR": str(checkpoint.parent / "programs")}
  always = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  starter = [sys.executable, "-S", "-c", STARTER, *command]
  done = subprocess.run(starter, capture_output=True, text=True, check=True, env=os.environ | cache | always)
  used = json.loads(done.stdout)
  if used["code"] != 0:
    raise RunFailedError(f"{prompt.stat().st_size} bytes: {done.stderr.strip().splitlines()[-1]}")
  return used


if __name__ == "__main__":
  sys.exit(command.run(main, None))
