"""The whole effect from one command: trains, compares, draws.

    python -m experiments.demo --workdir=work/demo

Trains the same small hybrid with N = 1, 2 and 4 sleep passes on Rule 110: the same seed, the same data in the
same order, the best learning rate that was found for N = 1. Smaller N are given more steps, so that all take
about the same compute. Then prints one table and what it shows, and writes figures and a page. Minutes on two
CPU cores. Rerun it after an interruption: what is done is not done again.
"""

import pathlib

from absl import flags

from sleep_jax.experiments import board, cli, config_file, figures, runner
from sleep_jax.report import claims, comparison, page

WORKDIR = flags.DEFINE_string(
  "workdir", "work/demo", "each run gets a folder in it; figures, logs and report.html too"
)
SIZE = flags.DEFINE_enum(
  "size", "demo", ["demo", "tiny"], "tiny: seconds of training, shows only that the parts fit"
)
SEEDS = flags.DEFINE_integer("seeds", 1, "seeds 0 .. SEEDS - 1 of each run", lower_bound=1)
JOBS = flags.DEFINE_integer("jobs", 2, "runs at a time", lower_bound=1)

CONFIG = config_file.CONFIGS / "rule110.py"


def main() -> int:
  folder = cli.folder_to_write("workdir", WORKDIR.value)
  ledgers = board.planned(f"{CONFIG}:{SIZE.value}", SEEDS.value)
  commands = runner.commands(f"{CONFIG}:{SIZE.value}", str(folder), SEEDS.value)
  todo = {name: commands[name] for name in ledgers}
  states = {name: runner.status(folder / name, todo[name]) for name in todo}
  for name, ledger in ledgers.items():
    ledger.ended = states[name].startswith("done")
  watch = board.Board(ledgers, folder / "logs", JOBS.value)
  code = runner.execute(todo, states, JOBS.value, watch, share=True)
  if code != cli.DONE:
    return code
  return summarize(folder, list(todo))


def summarize(folder: pathlib.Path, names: list[str]) -> int:
  """Prints the table and the claims; writes figures and the page."""
  runs = figures.load_runs([folder / name for name in names])
  print(f"\n{comparison.aligned(comparison.comparison(runs))}\n{comparison.note(runs)}\n")
  for text in filter(None, (claims.claim(runs), claims.compute_claim(runs), *claims.caveats(runs))):
    print(text)
  curves, about_sleep = figures.drawings(runs), figures.about_sleep(runs)
  for drawing in [*curves, *about_sleep]:
    drawing.save(folder / "figures")
  written = page.write_html(folder / "report.html", runs, curves, about_sleep, command="make demo")
  print(f"\nfigures in {folder / 'figures'}, all of it in {written}")
  return cli.DONE


if __name__ == "__main__":
  cli.run(main)
