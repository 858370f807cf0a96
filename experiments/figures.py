"""Draws what finished or unfinished runs allow, from their JSON lines alone, and prints the tables.

    python -m experiments.figures --runs='work/fig2b/*' --out=figures

Every figure is written as PNG, SVG and the CSV of what it draws; `all` adds report.html, one page that needs
nothing else. A few seconds; no accelerator is touched.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from sleep_jax.config import ConfigError
from sleep_jax.experiments import cli
from sleep_jax.report import figures, figures_depo, figures_gsm_infinite, page
from sleep_jax.report.runs import Run, RunError, equal_compute_table, load_runs, summary_table, to_markdown

RUNS = flags.DEFINE_list("runs", None, "workdirs or globs of workdirs, separated by commas")
OUT = flags.DEFINE_string("out", "figures", "folder that the files are written to")
FIGURE = flags.DEFINE_enum("figure", "all", ["all", "2a", "2b", "3", "4", "demo", "sleep"], "what to draw")

DRAW = {
  "2a": figures.figure_2a,
  "2b": figures.figure_2b,
  "3": figures_depo.figure_3,
  "4": figures_gsm_infinite.figure_4,
  "demo": figures.demo_curves,
  "sleep": figures.sleep_changes,
}


def draw(runs: Sequence[Run], out: Path, which: str) -> list[Path]:
  """Writes the figures; `all` is every one that the runs allow, and report.html.

  Raises:
    RunError: the runs do not allow the figure that was asked for, or, for `all`, any.
  """
  if which != "all":
    return DRAW[which](runs).save(out)
  drawings = page.drawings(runs)
  if any(r.rows.get("sleep") for r in runs):
    drawings.append(figures.sleep_changes(runs))
  if figures_depo.hops(runs):
    drawings.append(figures_depo.figure_3(runs))
  if figures_gsm_infinite.operations(runs):
    drawings.append(figures_gsm_infinite.figure_4(runs))
  if not drawings:
    raise RunError("nothing to draw yet: none of the runs has an evaluation")
  paths = [path for drawing in drawings for path in drawing.save(out)]
  return [*paths, page.write_html(out / "report.html", runs)]


def main() -> int:
  try:
    runs = load_runs(cli.required("runs", RUNS.value))
    print(to_markdown(summary_table(runs)))
    equal = [row for row in equal_compute_table(runs) if row["equal_cpu_s"] is not None]
    if len(equal) > 1:
      print(f"At equal CPU seconds:\n\n{to_markdown(equal)}")
    for path in draw(runs, Path(OUT.value), FIGURE.value):
      print(path)
  except RunError as error:
    raise ConfigError(str(error)) from error
  except (FileExistsError, NotADirectoryError, PermissionError) as error:
    raise ConfigError(f"--out: cannot write there: {error}") from error
  return cli.DONE


if __name__ == "__main__":
  cli.run(main)
