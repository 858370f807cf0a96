"""Has a training step become slower? The same runs at several commits, in turns.

    python -m benchmarks.commits --commits=v1,HEAD

Each turn is one process that trains a preset of Rule 110 for some steps, in a checkout of the commit and with
this Python's packages. What is compared is the CPU time a step in the rows that the run writes, after the
first row, so that starting and compiling do not count. Only what all commits understand is used: the
experiment's own command, its flags, and `cpu_s` and `step` of metrics.jsonl.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from sleep_jax import config
from sleep_jax.benchmarks import command, measure, tables
from sleep_jax.kernels.measure import flags
from sleep_jax.runtime.files import RunFailedError

BATCH = {"tiny": 16, "demo": 128, "fig2b": 32}
NOTES = (
  "One turn is one process; commits take turns, and every round begins with another one.",
  "CPU ms: of a whole training step (sleep, answer, gradients, optimizer), the median over rounds of a turn's"
  " median; the range is that of the turns.",
)


def main(argv: Sequence[str] | None = None) -> int:
  args = _arguments(argv)
  measure.pin(args.threads)
  facts, rows = tables.machine(), []
  with tempfile.TemporaryDirectory(prefix="commits.") as scratch:
    with checkouts(args.commits, pathlib.Path(scratch)) as folders:
      for preset in args.presets:
        for passes in args.passes:
          print(f"{preset}, N = {passes}", file=sys.stderr, flush=True)
          rows += compare(folders, preset, passes, args.steps, args.rounds, pathlib.Path(scratch))
  title = "CPU time of a training step, by commit"
  tables.save(args.out, "commits", title, {"steps": rows}, tables.finish(facts), NOTES)
  return 0


@contextlib.contextmanager
def checkouts(commits: Sequence[str], scratch: pathlib.Path) -> Iterator[dict[str, pathlib.Path]]:
  """Folders with the files of each commit, by its short hash.

  Raises:
    ConfigError: if git knows no such commit.
  """
  here = pathlib.Path(__file__).resolve().parents[1]
  folders = {}
  for name in commits:
    found = subprocess.run(
      ["git", "rev-parse", "--short", "--verify", "--quiet", name + "^{commit}"],
      cwd=here, capture_output=True, text=True,
    )  # fmt: skip
    config.check(found.returncode == 0, "--commits", f"this clone has no commit {name!r}")
    folders[found.stdout.strip()] = scratch / found.stdout.strip()
  try:
    for commit, folder in folders.items():
      subprocess.run(["git", "worktree", "add", "--quiet", "--detach", folder, commit], cwd=here, check=True)
    yield folders
  finally:
    for folder in folders.values():
      subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=here, capture_output=True)


def compare(
  folders: dict[str, pathlib.Path], preset: str, passes: int, steps: int, rounds: int, scratch: pathlib.Path
) -> list[dict[str, Any]]:
  """A row for each commit; the first is what the others are compared with."""
  turns: dict[str, list[float]] = {commit: [] for commit in folders}
  order = list(folders)
  for i in range(rounds):
    for commit in order[i % len(order) :] + order[: i % len(order)]:
      turns[commit].append(turn(folders[commit], preset, passes, steps, scratch))
  base = statistics.median(turns[order[0]])
  return [
    {
      "preset": preset,
      "batch": BATCH[preset],
      "N": passes,
      "commit": commit,
      "CPU ms": statistics.median(found) * 1e3,
      "least": min(found) * 1e3,
      "greatest": max(found) * 1e3,
      f"× {order[0]}": statistics.median(found) / base,
    }
    for commit, found in turns.items()
  ]


def turn(folder: pathlib.Path, preset: str, passes: int, steps: int, scratch: pathlib.Path) -> float:
  """CPU seconds of one training step: the median over the rows of one run.

  Raises:
    RunFailedError: if the run fails; its last line is in the message.
  """
  with tempfile.TemporaryDirectory(dir=scratch) as workdir:
    settings = {
      "sleep.num_passes": passes,
      "train.batch_size": BATCH[preset],
      "train.steps": 5 * steps,
      "train.steps_per_dispatch": steps,
      "train.log_every": steps,
      "train.eval_every": 5 * steps,
      "train.save_every": 5 * steps,
      "train.eval_sequences": BATCH[preset],
      "train.eval_batch_size": BATCH[preset],
    }
    ended = subprocess.run(
      [sys.executable, "-m", "experiments.rule110",
       f"--config=experiments/configs/rule110.py:{preset}", f"--workdir={workdir}/run",
       *(f"--config.{key}={value}" for key, value in settings.items())],
      cwd=folder, env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(folder)},
      capture_output=True, text=True,
    )  # fmt: skip
    if ended.returncode:
      last = ended.stderr.strip().splitlines()[-1:] or [f"exit code {ended.returncode}"]
      raise RunFailedError(f"the run at {folder.name}: {last[0]}")
    lines = (pathlib.Path(workdir) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
  spent = [(row["step"], row["cpu_s"]) for row in map(json.loads, lines) if "cpu_s" in row]
  found = sorted(dict(spent).items())
  return statistics.median(
    (after[1] - before[1]) / (after[0] - before[0]) for before, after in zip(found, found[1:], strict=False)
  )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
  def names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]

  parser = flags.Parser("benchmarks.commits", __doc__)
  parser.add_argument("--commits", type=names, required=True, help="the first is the base")
  parser.add_argument("--presets", type=names, default=["demo", "fig2b"], help=f"of {', '.join(BATCH)}")
  parser.add_argument("--passes", type=flags.counts, default=(1, 4), help="N")
  parser.add_argument("--steps", type=flags.count, default=5, help="steps a row; a turn has five rows")
  parser.add_argument("--rounds", type=flags.count, default=5)
  parser.add_argument("--threads", type=flags.count, default=1, help="cores to use")
  parser.add_argument("--out", type=command.out, default="benchmarks/results")
  args = parser.parse_args(argv)
  unknown = [name for name in args.presets if name not in BATCH]
  if unknown:
    parser.error(f"--presets: unknown {', '.join(unknown)}; known: {', '.join(BATCH)}")
  if len(args.commits) < 2:
    parser.error("--commits: name at least two, as in --commits=v1,HEAD")
  return args


if __name__ == "__main__":
  sys.exit(command.run(main, None))
