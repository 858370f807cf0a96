"""Keeps the demo's runs in the repository and writes the README's table from them.

    python -m experiments.demo --seeds=5 --workdir=work/demo
    python -m experiments.publish --runs='work/demo/*_s*' --out=results/rule110/demo --readme=README.md

Each run becomes one file, NAME.jsonl, with its config and environment; figures and table.md are drawn from
these files alone. Without --runs, everything is made anew from the files that lie in --out.
"""

import pathlib
import re

from absl import flags

from sleep_jax.config import ConfigError, check
from sleep_jax.experiments import cli, figures
from sleep_jax.report import accuracy, comparison, load, tables
from sleep_jax.report.load import Run, RunError
from sleep_jax.runtime import files

RUNS = flags.DEFINE_list("runs", None, "finished workdirs or globs of them; none: those already in --out")
OUT = flags.DEFINE_string("out", "results/rule110/demo", "folder of the runs' files, figures and table.md")
README = flags.DEFINE_string("readme", None, "file whose block between the markers is replaced")

BEGIN = "<!-- demo: written by `python -m experiments.publish`, do not edit -->"
END = "<!-- demo: end -->"


def main() -> int:
  out = cli.folder_to_write("out", OUT.value)
  if README.value:
    replaced(content(pathlib.Path(README.value)), "")
  try:
    if RUNS.value:
      runs = figures.load_runs(RUNS.value)
      unfinished = ", ".join(r.name for r in runs if not r.rows.get("done"))
      check(not unfinished, "--runs", f"not finished: {unfinished}")
      for run in runs:
        load.archive(run, out)
    runs = figures.load_runs(str(out / "*.jsonl"))
    for drawing in [accuracy.side_by_side(runs), *figures.drawings(runs), *figures.about_sleep(runs)]:
      for path in drawing.save(out):
        path.unlink() if path.suffix == ".svg" else print(path)
    (out / "table.md").write_text(table(runs), encoding="utf-8")
    print(out / "table.md")
    if README.value:
      readme = pathlib.Path(README.value)
      text = replaced(content(readme), block(runs, OUT.value))
      readme.write_text(text, encoding="utf-8", newline="")
      print(readme)
  except RunError as error:
    raise ConfigError(str(error)) from error
  return cli.DONE


def table(runs: list[Run]) -> str:
  """The comparison as Markdown, with what was run below it."""
  return f"{tables.markdown(*comparison.comparison(runs))}\n{comparison.note(runs)} {provenance(runs)}\n"


def provenance(runs: list[Run]) -> str:
  """When, with which code and which jax the runs were made, as far as they recorded it."""
  days = sorted({str(r.env.get("started", ""))[:10] for r in runs} - {""})
  commits = sorted({_commit(r) for r in runs} - {""})
  versions = {str(r.env["versions"].get("jax")) for r in runs if isinstance(r.env.get("versions"), dict)}
  parts = [f"Measured on {' to '.join(sorted({days[0], days[-1]}))}" if days else "Date not recorded"]
  parts += [f"commit {', '.join(commits)}"] if commits else []
  parts += [f"jax {', '.join(sorted(versions))}"] if versions else []
  return f"{comparison.seeds_of(runs).capitalize()}. {', '.join(parts)}."


def _commit(run: Run) -> str:
  git = run.env.get("git")
  if not isinstance(git, dict) or not isinstance(git.get("commit"), str):
    return ""
  return git["commit"][:7] + (" (changed)" if git.get("dirty") else "")


def block(runs: list[Run], folder: str) -> str:
  """What stands between the README's markers: figure, table and where they are from."""
  picture = (
    f"![Exact answers by passes of sleep, for the same data and for the same compute]({folder}/demo.png)"
  )
  return f"{BEGIN}\n{picture}\n\n{table(runs)}{END}"


def content(readme: pathlib.Path) -> str:
  """The text of --readme.

  Raises:
    ConfigError: if it is no file, or none in UTF-8.
  """
  try:
    with open(files.open_file(readme), encoding="utf-8", newline="") as file:
      return file.read()
  except (OSError, UnicodeDecodeError) as e:
    why = files.why(e) if isinstance(e, OSError) else "it is not UTF-8"
    raise ConfigError(f"--readme: {files.shown(readme)} cannot be read: {why}") from e


def replaced(text: str, new: str) -> str:
  """`text` with another block between its markers.

  Raises:
    ConfigError: if it has no markers, or more than one pair.
  """
  pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
  check(len(pattern.findall(text)) == 1, "--readme", "needs the demo's two markers once")
  return pattern.sub(lambda _: new, text)


if __name__ == "__main__":
  cli.run(main)
