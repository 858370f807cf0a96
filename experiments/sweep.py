"""Runs, or lists, all runs of a preset; skips the finished and resumes the broken.

    python -m experiments.sweep --config=experiments/configs/rule110.py:fig2a --workdir=work/fig2a --list
    python -m experiments.sweep --config=experiments/configs/rule110.py:fig2a --workdir=work/fig2a
    python -m experiments.sweep --config=experiments/configs/gsm_infinite.py:ouro_sliding \\
      --config.pretrained.folder='work/stage1/{run}' --workdir=work/stage2

Rerun the same command until it says that all are done. --config.GROUP.FIELD=VALUE holds for every run; in it
{run} is the run's name.
"""

import shlex

from absl import flags

from sleep_jax.experiments import cli, runner

CONFIG = cli.define_config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "each run gets a folder in it")
JOBS = flags.DEFINE_integer(
  "jobs", 1, "runs at a time; on a CPU each gets its own share of the cores", lower_bound=1
)
SEEDS = flags.DEFINE_integer("seeds", 1, "seeds 0 .. SEEDS - 1 of each run", lower_bound=1)
LIST = flags.DEFINE_bool("list", False, "only say what there is to do")


def main() -> int:
  cli.required("config", CONFIG.value)
  folder = cli.folder_to_write("workdir", cli.required("workdir", WORKDIR.value))
  todo = runner.commands(CONFIG.path, str(folder), SEEDS.value, CONFIG.changes)
  states = {name: runner.status(folder / name, todo[name]) for name in todo}
  if LIST.value:
    for name, command in todo.items():
      print(f"{name:16} {states[name]:20} {shlex.join(command)}")
    return cli.DONE
  return runner.execute(todo, states, JOBS.value)


if __name__ == "__main__":
  cli.run(main)
