"""Draws accuracy over the depth of reasoning, one curve for each N, from finished runs.

    python -m experiments.sweep --config=experiments/configs/depth.py:demo --workdir=work/depth --seeds=5
    python -m experiments.depth --runs='work/depth/*' --out=work/depth_figures

Runs that go on are left out. With --out also JSON lines, Markdown and a figure, and with --archive each
finished run as one file.
"""

import dataclasses
import json

from absl import flags

from sleep_jax.config import ConfigError, check
from sleep_jax.experiments import cli, figures
from sleep_jax.report import depth
from sleep_jax.report.load import RunError

RUNS = flags.DEFINE_list("runs", None, "workdirs, archived runs or globs of them")
OUT = flags.DEFINE_string("out", None, "folder for table and figure. Default: the table is printed only")
ARCHIVE = flags.DEFINE_string("archive", None, "folder for finished runs, each as one file NAME.jsonl")


def main() -> int:
  folder = None if OUT.value is None else cli.folder_to_write("out", OUT.value)
  archive = None if ARCHIVE.value is None else cli.folder_to_write("archive", ARCHIVE.value)
  try:
    runs = figures.load_runs(cli.required("runs", RUNS.value))
    found = depth.points(runs)
  except RunError as error:
    raise ConfigError(str(error)) from error
  check(bool(found), "--runs", "none of them is finished and has a depth")
  (letter,) = {run.experiment.letter for run in runs if run.depth is not None}
  soon = depth.solved(runs)
  text = depth.table(found, soon, letter)
  print(text, end="")
  if archive is not None:
    figures.archive_finished(runs, archive)
  if folder is not None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = (json.dumps(dataclasses.asdict(point)) for point in (*found, *soon))
    (folder / "depth.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    (folder / "depth.md").write_text(text, encoding="utf-8")
    for drawing in (depth.figure(found, letter), depth.figure_soon(soon, letter)):
      for path in drawing.save(folder):
        print(f"wrote {path}")
  return cli.DONE


if __name__ == "__main__":
  cli.run(main)
