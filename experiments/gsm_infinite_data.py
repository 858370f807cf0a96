"""Writes a GSM-Infinite data set and its statistics beside the original generator's.

    python -m experiments.gsm_infinite_data --config=experiments/configs/gsm_infinite_data.py:PRESET \\
      --workdir=D

D gets train, held_out_balanced and held_out_faithful, each as JSON lines and as ArrayRecord (a record is
the same JSON); manifest.json with rows, SHA-256, config, command, commit and time; statistics.md. Every text
is read back by the solver, and no text is in train and held out: either failing is exit code 1.
"""

import collections
import dataclasses
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator

from array_record.python import array_record_module

from sleep_jax import config
from sleep_jax.data import gsm_infinite as gsm
from sleep_jax.data.gsm_infinite import GsmInfiniteConfig, Problem, problem, problems
from sleep_jax.data.gsm_infinite.study import comparison
from sleep_jax.data.gsm_infinite.study.reading import Reading, read_problem
from sleep_jax.experiments import cli
from sleep_jax.runtime import workdir
from sleep_jax.runtime.workdir import write_file

CONFIG = cli.define_config_flag()
WORKDIR = cli.define_workdir_flag()
SHOWN_ANSWERS = 5


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is written.

  Attributes:
    data: the problems.
    seed: of the training problems.
    num: training problems.
    held_out: held-out problems of each kind.
  """

  data: GsmInfiniteConfig
  seed: config.Seed = 0
  num: config.Count = 77_000
  held_out: int = 1600

  def __post_init__(self):
    config.check_fields(self)
    config.check(
      self.seed != self.data.held_out_seed, "seed", f"must differ from data.held_out_seed, got {self.seed}"
    )
    low, high = self.data.operations
    levels = high - low + 1
    config.check(
      self.held_out >= 1 and self.held_out % levels == 0,
      "held_out",
      f"must be a multiple of the {levels} numbers of operations, got {self.held_out}",
    )


FIELDS = {"": Settings}


@dataclasses.dataclass
class Seen:
  """What is kept of the problems of a split: no text."""

  texts: set[bytes] = dataclasses.field(default_factory=set)
  readings: list[Reading] = dataclasses.field(default_factory=list)
  answers: dict[int, collections.Counter[str]] = dataclasses.field(default_factory=dict)
  tokens: list[int] = dataclasses.field(default_factory=list)
  attempts: int = 0
  wrong: int = 0
  repeated: int = 0

  def add(self, cfg: GsmInfiniteConfig, p: Problem) -> None:
    """Reads a problem back from its text and remembers what is counted."""
    if p.depth:
      r = read_problem(p.question, p.context, p.num_tokens, cfg.modulus)
      self.readings.append(r)
      solved, op = r.answer, r.op
    else:
      solved, op = tuple(gsm.solve(p.question, p.context)), gsm.count_operations(p.question, p.context)
    self.wrong += (solved, op) != (p.answer, p.op)
    text = problems.fingerprint(p.question, p.context)
    self.repeated += text in self.texts
    self.texts.add(text)
    self.answers.setdefault(p.op, collections.Counter())[p.written_answer] += 1
    self.tokens.append(p.num_tokens)
    self.attempts += p.attempts


def write(folder: pathlib.Path, name: str, made: Iterable[Problem]) -> list[dict[str, object]]:
  """One split in both formats, a problem at a time; gives the rows of the manifest."""
  lines, arrays = folder / f"{name}.jsonl", folder / f"{name}.array_record"
  rows = 0
  writer = array_record_module.ArrayRecordWriter(str(arrays), "group_size:1")
  with lines.open("wb") as file:
    for p in made:
      record = json.dumps(dataclasses.asdict(p), ensure_ascii=False).encode()
      file.write(record + b"\n")
      writer.write(record)
      rows += 1
  writer.close()
  return [{"file": path.name, "rows": rows, "sha256": _sha256(path)} for path in (lines, arrays)]


def report(cfg: GsmInfiniteConfig, seen: Seen) -> str:
  """Statistics of a split as Markdown."""
  total = sum(counted.total() for counted in seen.answers.values())
  parts = [
    f"{total} problems of {min(seen.tokens)} to {max(seen.tokens)} tokens, mean"
    f" {sum(seen.tokens) / total:.0f}; {seen.attempts / total:.1f} cores drawn for one",
    "| op | problems | commonest answers (the first is the majority baseline) |\n| --- | --- | --- |",
  ]
  for op, counted in sorted(seen.answers.items()):
    shares = (f"{answer}: {n / counted.total():.1%}" for answer, n in counted.most_common(SHOWN_ANSWERS))
    parts[-1] += f"\n| {op} | {counted.total()} | {', '.join(shares)} |"
  if seen.readings and (cfg.number_range, cfg.modulus) == (5, -1):  # of others nothing was measured
    if cfg.noise and cfg.max_tokens <= 3300 and cfg.min_tokens >= 2000 and not cfg.tokenizer:
      for by in ("cell", "operations"):
        table, found = comparison.against_readings(seen.readings, by)
        parts += [f"## With noise, by {by}: ours / the original's", table, comparison.verdict(found)]
    table, found = comparison.against_facts(seen.readings)
    few = f"Not compared: fewer than {comparison.LEAST} problems of each kind whose original was measured."
    parts += ["## The core: ours / the original's", *([table, comparison.verdict(found)] if found else [few])]
  return "\n\n".join(parts)


def main() -> int:
  settings = config.from_dict(Settings, cli.required("config", CONFIG.value).to_dict())
  folder = cli.folder_to_write("workdir", cli.required("workdir", WORKDIR.value))
  config.check(not (folder / "manifest.json").exists(), "--workdir", f"{folder} already holds a data set")
  cfg, wall, cpu = settings.data, time.perf_counter(), time.process_time()
  problem(cfg, settings.seed, 0)  # what cannot be made is refused before anything is written
  folder.mkdir(parents=True, exist_ok=True)
  splits = {
    f"held_out_{kind}": problems.held_out(cfg, kind, settings.held_out) for kind in problems.HELD_OUT_KINDS
  }
  splits["train"] = (problem(cfg, settings.seed, i) for i in range(settings.num))
  kept: dict[str, Seen] = {}

  def watched(name: str, made: Iterable[Problem]) -> Iterator[Problem]:
    seen = kept[name] = Seen()
    for p in made:
      seen.add(cfg, p)
      yield p

  files = [row for name, made in splits.items() for row in write(folder, name, watched(name, made))]
  train, *tests = kept["train"], kept["held_out_balanced"], kept["held_out_faithful"]
  shared = sum(len(train.texts & test.texts) for test in tests)
  wrong = sum(seen.wrong for seen in kept.values())
  manifest = {
    "config": config.to_dict(settings),
    "files": files,
    "texts_in_train_and_held_out": shared,
    "texts_twice_in_a_split": {name: seen.repeated for name, seen in kept.items()},
    "problems_that_the_solver_reads_differently": wrong,
    "command": " ".join(sys.argv[1:]),
    "git": workdir.git_state(),
    "cpu_seconds": round(time.process_time() - cpu, 1),
    "wall_seconds": round(time.perf_counter() - wall, 1),
  }
  text = report(cfg, train)
  write_file(folder / "statistics.md", f"# train\n\n{text}\n")
  write_file(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
  print(text)
  print(
    f"{folder}: {len(files)} files in {manifest['wall_seconds']} s; in train and held out: {shared}"
    f"; problems that the solver reads differently: {wrong}"
  )
  return cli.DONE if shared == wrong == 0 else cli.FAILED


def _sha256(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
  cli.run(main)
