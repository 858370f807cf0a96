"""Counts the seeds that have taken off, for each setting and N, by a quarter, half and all of the steps.

    python -m experiments.sweep --config=experiments/configs/takeoff.py:demo --workdir=work/takeoff --seeds=10
    python -m experiments.takeoff --runs='work/takeoff/*' --out=work/takeoff_figures

A run's setting is its name in front of `_nN_sSEED`. Runs that go on count as far as they have come. With
--out also JSON lines, Markdown and a figure, and with --archive each finished run as one file.
"""

import json

from absl import flags

from sleep_jax.config import ConfigError, check
from sleep_jax.experiments import cli, figures
from sleep_jax.report import takeoff
from sleep_jax.report.load import RunError

RUNS = flags.DEFINE_list("runs", None, "workdirs, archived runs or globs of them")
OUT = flags.DEFINE_string("out", None, "folder for table and figure. Default: the table is printed only")
THRESHOLD = flags.DEFINE_float("threshold", 0.8, "exact accuracy from which on a run has taken off")
ARCHIVE = flags.DEFINE_string("archive", None, "folder for finished runs, each as one file NAME.jsonl")


def main() -> int:
  check(bool(RUNS.value), "--runs", "is required: finished runs or globs of them")
  check(0 < THRESHOLD.value <= 1, "--threshold", f"must lie in (0, 1], got {THRESHOLD.value}")
  folder = None if OUT.value is None else cli.folder_to_write("out", OUT.value)
  archive = None if ARCHIVE.value is None else cli.folder_to_write("archive", ARCHIVE.value)
  try:
    runs = figures.load_runs(RUNS.value)
  except RunError as error:
    raise ConfigError(str(error)) from error
  found = takeoff.starts(runs, THRESHOLD.value)
  check(bool(found), "--runs", "none of them has an evaluation yet")
  rows = takeoff.rows_of(found)
  text = takeoff.table(rows, THRESHOLD.value)
  print(text, end="")
  if archive is not None:
    figures.archive_finished(runs, archive)
  if folder is None:
    return cli.DONE
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "takeoff.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
  (folder / "takeoff.md").write_text(text, encoding="utf-8")
  if any(start.reached >= start.steps for start in found):
    for path in takeoff.figure(found).save(folder):
      print(f"wrote {path}")
  return cli.DONE


if __name__ == "__main__":
  cli.run(main)
