"""Writes the job file of a run for a cluster to stdout. Nothing is submitted.

    python -m launch.render --target=gke --hardware=v6e:4x4 --slices=2 \\
      --config=experiments/configs/rule110.py:fig2b --image=REPOSITORY/sleep_jax@sha256:... > job.yaml
    python -m launch.render --target=slurm --hardware=h200:4x8 \\
      --config=experiments/configs/rule110.py:fig2b --workdir=/shared/work/fig2b > job.sbatch
    python -m launch.render --target=slurm --hardware=h200:8 --sweep \\
      --config=experiments/configs/rule110.py:fig2b --workdir=/shared/work/fig2b > array.sbatch

Every job runs launch.preflight and then the experiment of the config file, changed by
--config.GROUP.FIELD=VALUE. Exit code 2, the user's mistake, ends a job; 1 and 3 restart it, and it resumes.
With --sweep every run of the preset gets a folder in --workdir: an array job on Slurm, one JobSet each on
GKE. Those that are finished, as far as --workdir can be seen from here, are left out.
"""

import pathlib
import re
import shlex
import sys
from collections.abc import Mapping

from absl import flags

from sleep_jax import config
from sleep_jax.config import check, nearest, shown
from sleep_jax.experiments import cli, config_file, runner
from sleep_jax.launch import hardware, problem, templates
from sleep_jax.launch.hardware import Hardware

CONFIG = cli.define_config_flag()
TARGET = flags.DEFINE_string("target", None, "slurm, gke or tpu_vm")
HARDWARE = flags.DEFINE_string("hardware", None, "CHIP:TOPOLOGY, such as v6e:4x4 or h200:4x8")
SLICES = flags.DEFINE_integer("slices", 1, "slices of a TPU pod, on GKE", lower_bound=1)
IMAGE = flags.DEFINE_string("image", None, "NAME@sha256:DIGEST of the container, on GKE and TPU VMs")
NAME = flags.DEFINE_string("name", None, "of the job; none: from the config's file and preset")
WORKDIR = flags.DEFINE_string(
  "workdir", None, "on storage that all hosts share; on GKE and TPU VMs below /runs, none: /runs/NAME"
)
CLAIM = flags.DEFINE_string("claim", "sleep-jax", "on GKE: the volume claim that is mounted at /runs")
SAVE = flags.DEFINE_float(
  "save_seconds", 60.0, "that a save takes; launch.preflight measures it", lower_bound=0
)
RESTARTS = flags.DEFINE_integer("max_restarts", 20, "after exit codes 1 and 3", lower_bound=0)
SWEEP = flags.DEFINE_bool("sweep", False, "all runs of the preset, each in a folder of --workdir")
SEEDS = flags.DEFINE_integer("seeds", 1, "with --sweep: seeds 0 .. SEEDS - 1 of each run", lower_bound=1)

TARGETS = ("slurm", "gke", "tpu_vm")
MOUNT = "/runs"
DIGEST = re.compile(r"[\w./:-]+@sha256:[0-9a-f]{64}")
LABEL = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
LONGEST_NAME = 40  # Kubernetes adds the names of the parts, and has room for 63 characters in all


def commands(
  row: Hardware, runs: Mapping[str, Mapping[str, object]], parent: str
) -> dict[str, tuple[str, str]]:
  """Name of a run -> arguments of Python for its preflight and for itself, as a shell takes them."""
  module, _ = config_file.load(CONFIG.path)
  check(
    hasattr(module, "EXPERIMENT"), "--config", f"{CONFIG.path} says no EXPERIMENT, the module that trains"
  )
  found = {}
  for name, own in runs.items():
    folder = str(pathlib.PurePosixPath(parent, name)) if SWEEP.value else parent
    changes = {key: str(value).replace("{run}", name) for key, value in (CONFIG.changes | dict(own)).items()}
    shared = [f"--config={_packaged(CONFIG.path)}", f"--workdir={folder}", "--distributed"]
    shared += [f"--config.{key}={value}" for key, value in changes.items()]
    checks = [
      "-m",
      "sleep_jax.launch.preflight",
      f"--hardware={row.name}",
      f"--slices={SLICES.value}",
      *shared,
    ]
    for word in shared:
      check(word.isprintable(), word.partition("=")[0], f"must be printable text, got {shown(word)}")
    found[name] = shlex.join(checks), shlex.join(["-m", module.EXPERIMENT, *shared])
  return found


def _packaged(path: str) -> str:
  """FILE.py:PRESET as the image knows it: a config of this package by its name, whatever folder we are in."""
  file, preset = config_file.find(path)
  if pathlib.Path(file).resolve().parent == config_file.CONFIGS.resolve():
    file = pathlib.Path(file).name
  return file if preset is None else f"{file}:{preset}"


def _job_name() -> str:
  """--name, or one from the config; on all targets one that Kubernetes takes."""
  name = NAME.value
  if name is None:
    file, preset = config_file.find(CONFIG.path)
    words = f"{pathlib.Path(file).stem}-{preset}" if preset else pathlib.Path(file).stem
    name = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")[:LONGEST_NAME].strip("-")
  fits = LABEL.fullmatch(name) and len(name) <= LONGEST_NAME
  what = f"must be at most {LONGEST_NAME} of a-z, 0-9 and -, and begin with a letter, got {shown(name)}"
  check(bool(fits), "--name", what)
  return name


def check_target(target: str, row: Hardware) -> None:
  """Raises `ConfigError` where a target does not have such hardware, or needs another image."""
  check(target in TARGETS, "--target", f"unknown value {shown(target)}; {nearest(target, TARGETS)}")
  tpu = row.chip.platform == "tpu"
  check(
    tpu or SLICES.value == 1, "--slices", f"is for TPUs; {row.name} has nodes, such as {row.chip.name}:4x8"
  )
  check(
    SLICES.value == 1 or target == "gke", "--slices", f"must be 1 for --target={target}; gke takes several"
  )
  check(not (tpu and target == "slurm"), "--target", f"slurm is for GPUs; for {row.name} take gke or tpu_vm")
  check(tpu or target != "tpu_vm", "--target", f"tpu_vm is for TPUs; for {row.name} take gke or slurm")
  check(
    not (target == "tpu_vm" and row.chip.name == "tpu7x"),
    "--target",
    f"{row.name} has no TPU VM interface; take gke",
  )
  if target != "slurm":
    known = ", ".join(f"{row.chip.name}:{size}" for size in hardware.TOPOLOGIES[row.chip.name][1:3])
    machine = row.machine is not None
    check(machine, "--hardware", f"Google Cloud has no machine for {row.name}; there are {known} and larger")
  if target == "slurm":
    check(IMAGE.value is None, "--image", "is for gke and tpu_vm; Slurm runs $PYTHON")
    return
  image = cli.required("image", IMAGE.value)
  check(
    DIGEST.fullmatch(image) is not None,
    "--image",
    f"must be NAME@sha256:DIGEST with 64 hexadecimal digits, as `docker push` prints it, or restarts may run"
    f" another program; got {shown(image)}",
  )


def check_mesh(row: Hardware) -> None:
  """Raises `ConfigError` where the config's mesh or batch does not divide over the hardware."""
  values = CONFIG.value.to_dict()
  mesh = config.from_dict(config.MeshConfig, values.get("mesh", {}), "mesh.")
  training = {
    name: x for name, x in values.get("train", {}).items() if name in ("batch_size", "microbatches")
  }
  problem.check_division(mesh, config.from_dict(config.TrainConfig, training, "train."), row, SLICES.value)


def runs(parent: str) -> dict[str, Mapping[str, object]]:
  """Name -> what it changes of the config, of every run that is not finished; without --sweep of the one."""
  if not SWEEP.value:
    return {"": {}}
  todo = runner.commands(CONFIG.path, parent, SEEDS.value, CONFIG.changes)
  module, preset = config_file.load(CONFIG.path)
  every = module.sweep(preset, SEEDS.value)
  done = {name for name in todo if runner.status(pathlib.Path(parent, name), todo[name]).startswith("done")}
  print(f"{len(every)} runs, {len(done)} done already", file=sys.stderr)
  return {name: changes for name, changes in every.items() if name not in done}


def render(target: str, row: Hardware, name: str, found: Mapping[str, tuple[str, str]]) -> str:
  """The job file.

  Args:
    found: of `commands`.
  """
  values: dict[str, object] = {
    "hardware": row.name,
    "hosts": row.hosts,
    "slices": SLICES.value,
    "chip": row.chip.name,
    "chips_per_host": row.chips_per_host,
    "accelerator": row.chip.gke_accelerator,
    "topology": row.topology,
    "image": IMAGE.value,
    "claim": CLAIM.value,
    "mount": MOUNT,
    "grace": templates.grace(SAVE.value),
    "max_restarts": RESTARTS.value,
    "name": name,
  }
  if target == "slurm":
    values |= {"job": "A_%a" if SWEEP.value else "j", "runs": _cases(found)}
    values["array"] = f"\n#SBATCH --array=0-{len(found) - 1}" if SWEEP.value else ""
    return templates.fill("slurm/train.sbatch.tmpl", values)
  texts = []
  for run, (preflight, train) in found.items():
    own = {"name": _of_run(name, run), "preflight": f"python {preflight}", "train": f"python {train}"}
    if target == "tpu_vm":
      own |= {key: shlex.quote(own[key]) for key in ("preflight", "train")}
      texts.append(templates.fill("tpu_vm/train.sh.tmpl", values | own))
    else:
      texts.append(templates.fill(f"gke/{row.chip.platform}.yaml.tmpl", values | own))
  return "---\n".join(texts)


def _cases(found: Mapping[str, tuple[str, str]]) -> str:
  """The lines of a shell's `case` that choose a run by its number."""
  lines: list[str] = []
  for number, (preflight, train) in enumerate(found.values()):
    lines += [f"  {number})", f"    preflight=({preflight})", f"    train=({train})", "    ;;"]
  return "\n".join(lines)


def _of_run(name: str, run: str) -> str:
  """The name of one job of several."""
  return f"{name}-{re.sub(r'[^a-z0-9]+', '-', run.lower()).strip('-')}" if run else name


def main() -> int:
  cli.required("config", CONFIG.value)
  target = cli.required("target", TARGET.value)
  row = hardware.find(cli.required("hardware", HARDWARE.value))
  check_target(target, row)
  check_mesh(row)
  name = _job_name()
  parent = WORKDIR.value
  if target != "slurm":
    parent = f"{MOUNT}/{name}" if parent is None else parent
    below = pathlib.PurePosixPath(parent).is_relative_to(MOUNT)
    check(
      below and ".." not in parent.split("/"),
      "--workdir",
      f"must lie in {MOUNT} on {target}, got {shown(parent)}",
    )
  parent = cli.required("workdir", parent)
  check(
    parent.startswith("/"),
    "--workdir",
    f"must be the same on all hosts, an absolute path, got {shown(parent)}",
  )
  check(target != "tpu_vm" or not SWEEP.value, "--sweep", "is for slurm and gke")
  left = runs(parent)
  if left:
    print(render(target, row, name, commands(row, left, parent)), end="")
  return cli.DONE


if __name__ == "__main__":
  cli.run(main)
