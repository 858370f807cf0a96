"""Draws what finished or unfinished runs allow, from their JSON lines alone, and prints the tables.

    python -m experiments.figures --runs='work/fig2b/*' --out=figures

Every figure is written as PNG, SVG and the CSV of what it draws; `all` adds report.html, one page that needs
nothing else. With --archive each finished run is also kept as one file, NAME.jsonl, from which all of it can
be drawn again. A few seconds; no accelerator is touched.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from sleep_jax.config import ConfigError
from sleep_jax.experiments import cli, figures
from sleep_jax.experiments.figures import depo, gsm_infinite, memory, rule110
from sleep_jax.report import accuracy, changes, costs, page
from sleep_jax.report.load import Run, RunError
from sleep_jax.report.tables import equal_compute_table, summary_table, to_markdown

DRAW = {
  "2a": rule110.figure_2a,
  "2b": rule110.figure_2b,
  "3": depo.figure_3,
  "4": gsm_infinite.figure_4,
  "cost": costs.costs,
  "demo": accuracy.demo_curves,
  "memory": memory.figure,
  "sleep": changes.sleep_changes,
}
RUNS = flags.DEFINE_list("runs", None, "workdirs, archived runs or globs of them, separated by commas")
OUT = flags.DEFINE_string("out", "figures", "folder that the files are written to")
ARCHIVE = flags.DEFINE_string("archive", None, "folder for finished runs, each as one file NAME.jsonl")
FIGURE = flags.DEFINE_enum("figure", "all", ["all", *DRAW], "what to draw")


def draw(runs: Sequence[Run], out: Path, which: str) -> list[Path]:
  """Writes the figures; `all` is every one that the runs allow, and report.html.

  Raises:
    RunError: the runs do not allow the figure that was asked for, or, for `all`, any.
  """
  if which != "all":
    return DRAW[which](runs).save(out)
  curves = figures.drawings(runs)
  others = figures.about_sleep(runs)
  if not curves and not others:
    raise RunError("nothing to draw yet: none of the runs has an evaluation")
  paths = [path for drawing in [*curves, *others] for path in drawing.save(out)]
  return [*paths, page.write_html(out / "report.html", runs, curves, others)]


def main() -> int:
  out = cli.folder_to_write("out", OUT.value)
  archive = None if ARCHIVE.value is None else cli.folder_to_write("archive", ARCHIVE.value)
  try:
    runs = figures.load_runs(cli.required("runs", RUNS.value))
    print(to_markdown(summary_table(runs)))
    equal = [row for row in equal_compute_table(runs) if row["equal_cpu_s"] is not None]
    if len(equal) > 1:
      print(f"At equal CPU seconds:\n\n{to_markdown(equal)}")
    for path in draw(runs, out, FIGURE.value):
      print(path)
    if archive is not None:
      figures.archive_finished(runs, archive)
  except RunError as error:
    raise ConfigError(str(error)) from error
  return cli.DONE


if __name__ == "__main__":
  cli.run(main)
