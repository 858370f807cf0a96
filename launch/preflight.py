"""Checks a cluster before a run: on every host, in the processes that will train.

    python -m launch.preflight --hardware=h200:4x8 --config=experiments/configs/rule110.py:fig2b \\
      --workdir=/shared/work/fig2b --distributed
    python -m launch.local_multiprocess --processes=2 -- -m launch.preflight --devices=2 \\
      --config=experiments/configs/rule110.py:tiny --workdir=work/two

As many devices as asked for, everywhere the same versions and the same config, a workdir that all hosts
share, with room for the checkpoints; one collective; one save and one restore of the run's own state. Each
with its time: `launch.render --save_seconds` takes that of the save. Exit code: 0 all is well, 1 the cluster
failed, 2 something must be changed before a run can begin. Nothing is left in the workdir.
"""

import sys
from pathlib import Path

from absl import flags

from sleep_jax import train
from sleep_jax.config import check
from sleep_jax.experiments import cli
from sleep_jax.launch import checks, gathering, problem
from sleep_jax.launch.hardware import find
from sleep_jax.runtime import processes

CONFIG = cli.define_config_flag()
cli.define_process_flags()
WORKDIR = cli.define_folder_flag()
HARDWARE = flags.DEFINE_string(
  "hardware", None, "CHIP:TOPOLOGY that was asked for, such as v6e:4x4 or h200:4x8"
)
SLICES = flags.DEFINE_integer("slices", 1, "of --hardware", lower_bound=1)
DEVICES = flags.DEFINE_integer(
  "devices", None, "devices in all, of hardware that has no name here", lower_bound=1
)
TIMEOUT = flags.DEFINE_float("timeout_s", 600.0, "after which a check that hangs has failed", lower_bound=1.0)


def main() -> int:
  values = cli.required("config", CONFIG.value).to_dict()
  target = Path(cli.required("workdir", WORKDIR.value)).absolute()
  row = None if HARDWARE.value is None else find(HARDWARE.value)
  check(
    row is None or DEVICES.value is None, "--devices", "says nothing beside --hardware; give one of the two"
  )
  made, folder = checks.Checks(TIMEOUT.value), target.with_name(f".{target.name}.preflight")
  with made.timed("devices, versions, config"):
    everybody = gathering.everybody("facts", checks.facts(values))
    problems = checks.wrong_devices(everybody, row, SLICES.value, DEVICES.value) + checks.differing(everybody)
    for line in problems:
      made.fail(line)
  if not made.problems:
    cfg = problem.read(CONFIG.path, values).cfg
    mesh = train.check_fits(cfg)
    checks.on_disk(made, cfg, mesh, folder)
  if processes.primary():
    for line, _ in made.problems:
      print(f"error: {line}", file=sys.stderr)
  return made.code


if __name__ == "__main__":
  cli.run(main)
