"""Writes a GSM-Infinite data set and prints its statistics beside the original generator's.

    python -m experiments.gsm_infinite_data --config=experiments/configs/gsm_infinite_data.py:PRESET
      --workdir=D

D gets train, held_out_balanced and held_out_faithful, each as JSON lines and as ArrayRecord (a record is
the same JSON), and manifest.json with rows, SHA-256 and the config. A text is never in train and held out.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence

from array_record.python import array_record_module

from experiments import cli
from sleep_jax import config
from sleep_jax.data.gsm_infinite import GsmInfiniteConfig, Problem, dataset, problem, statistics

CONFIG = cli.define_config_flag()
WORKDIR = cli.define_workdir_flag()
SHOWN = ("attempts", "tokens", "sentences", "N", "U", "S", "noise_share", "majority")


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is written: `num` training problems of the stream `seed`, and `held_out` of each kind."""

  data: GsmInfiniteConfig
  seed: int = 0
  num: int = 77_000
  held_out: int = 1600

  def __post_init__(self):
    config.at_least(self.seed, 0, "seed")
    config.check(
      self.seed != self.data.held_out_seed, "seed", f"must differ from data.held_out_seed, got {self.seed}"
    )
    config.at_least(self.num, 1, "num")
    low, high = self.data.operations
    levels = high - low + 1
    config.check(
      self.held_out >= 1 and self.held_out % levels == 0,
      "held_out",
      f"must be a multiple of the {levels} numbers of operations, got {self.held_out}",
    )


def write(folder: pathlib.Path, name: str, problems: Sequence[Problem]) -> list[dict[str, object]]:
  """One split in both formats; gives the rows of the manifest."""
  records = [json.dumps(dataclasses.asdict(p), ensure_ascii=False).encode() for p in problems]
  lines, arrays = folder / f"{name}.jsonl", folder / f"{name}.array_record"
  lines.write_bytes(b"".join(record + b"\n" for record in records))
  writer = array_record_module.ArrayRecordWriter(str(arrays), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()
  return [
    {"file": path.name, "rows": len(records), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    for path in (lines, arrays)
  ]


def report(cfg: GsmInfiniteConfig, problems: Sequence[Problem]) -> str:
  """A line for each number of operations, ours / the original's where it was measured."""
  known = statistics.reference()
  lines = [f"op  problems  {'  '.join(f'{name:>15}' for name in SHOWN)}"]
  for op, row in statistics.by_op(problems).items():
    subset = {0: "symbolic", 2: "medium", 3: "hard"}[cfg.depth(op)]
    theirs = known["core"].get(f"{subset} {cfg.mode}", {}).get(str(op), {})
    if subset != "symbolic" and (cfg.noise, cfg.min_tokens, cfg.max_tokens) == (
      True,
      2000,
      3300,
    ):  # lengths of the sample that mixes d = 2 and 3, both modes
      lengths = known["noisy"].get(str(op), {})
      theirs = {k: lengths[k] for k in ("tokens", "sentences", "N", "noise_share") if k in lengths} | theirs
    cells = []
    for name in SHOWN:
      other = theirs.get(name)
      cells.append(f"{row[name]:.4g}" + (f" / {other:.4g}" if other is not None else ""))
    lines.append(f"{op:>2}  {row['problems']:>8}  {'  '.join(f'{cell:>15}' for cell in cells)}")
    shares = ", ".join(
      f"{answer} {share:.0%}" for answer, share in statistics.answers([p for p in problems if p.op == op])
    )
    lines.append(f"    answers: {shares}")
  return "\n".join(lines)


def main() -> int:
  settings = config.from_dict(Settings, cli.required("config", CONFIG.value).to_dict())
  folder = pathlib.Path(cli.required("workdir", WORKDIR.value))
  config.check(not (folder / "manifest.json").exists(), "--workdir", f"{folder} already holds a data set")
  splits = {
    f"held_out_{kind}": dataset.held_out(settings.data, kind, settings.held_out) for kind in dataset.KINDS
  }
  splits["train"] = [problem(settings.data, settings.seed, i) for i in range(settings.num)]
  folder.mkdir(parents=True, exist_ok=True)
  files = [row for name, problems in splits.items() for row in write(folder, name, problems)]
  shared = dataset.overlap(splits["train"], splits["held_out_balanced"] + splits["held_out_faithful"])
  manifest = {"config": config.to_dict(settings), "files": files, "texts_in_train_and_held_out": shared}
  (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
  print(report(settings.data, splits["train"]))
  print("ours / the original's; lengths of the latter mix d = 2 and 3 and both modes, in Qwen tokens")
  print(f"{folder}: {len(files)} files; texts in both train and held out: {shared}")
  return cli.DONE if shared == 0 else cli.FAILED


if __name__ == "__main__":
  cli.run(main)
