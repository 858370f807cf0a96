"""The checks before a run, each with a fault planted; two real processes on this machine."""

import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import pytest

from sleep_jax.launch import checks
from sleep_jax.launch.hardware import find
from sleep_jax.runtime import joining
from tests import compiling

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "--config=experiments/configs/rule110.py:tiny"


def told(**changes):
  values = {"sleep": {"num_passes": 2}, "seed": 0, "model": {"blocks": ("attn", "gdn")}}
  config = changes.pop("config", values)
  found = {
    "host": "n1",
    "platform": "gpu",
    "kind": "NVIDIA H200",
    "devices": 8,
    "versions": {"python": "3.12.1", "jax": "0.12.0"},
    "config": {"digest": json.dumps(config), "values": checks.flat(config)},
  }
  return found | changes


@pytest.mark.parametrize(
  ("everybody", "row", "slices", "devices", "said"),
  [
    ([told()] * 4, "h200:4x8", 1, None, []),
    ([told(platform="tpu", devices=4)] * 8, "v6e:4x4", 2, None, []),
    ([told(platform="tpu", devices=8)] * 2, "tpu7x:2x2x2", 1, None, []),
    ([told(devices=2)] * 2, None, 1, 4, []),
    ([told(devices=2)] * 2, None, 1, None, []),
    (  # what JAX does by itself under Slurm with one task a node
      [told(devices=1)] * 4,
      "h200:4x8",
      1,
      None,
      ["32 were asked for, the processes have 4; each of 4 process(es) sees 1, not 8: under Slurm ask"],
    ),
    ([told()] * 3, "h200:4x8", 1, None, ["devices: 32 were asked for, the processes have 24"]),
    ([told()] * 2, None, 1, 8, ["devices: 8 were asked for, the processes have 16"]),
    (
      [told(), told(host="n2", devices=7)],
      "h200:2x8",
      1,
      None,
      ["different numbers: n1 has 8, n2 has 7", "16 were asked for, the processes have 15"],
    ),
    ([told(), told(kind="NVIDIA H100")], "h200:2x8", 1, None, ["different kinds: NVIDIA H100, NVIDIA H200"]),
    ([told(platform="cpu")], "h200:8", 1, None, ["--hardware=h200:8 is a gpu, but JAX runs on cpu"]),
  ],
)
def test_devices_are_as_asked(everybody, row, slices, devices, said):
  found = checks.wrong_devices(everybody, row and find(row), slices, devices)
  assert len(found) == len(said) and all(text in line for text, line in zip(said, found, strict=True)), found


@pytest.mark.parametrize(
  ("other", "said"),
  [
    (told(), []),
    (told(versions={"python": "3.12.1", "jax": "0.11.0"}), ["versions: jax is 0.11.0 on n1, 0.12.0 on n1"]),
    (
      told(config={"sleep": {"num_passes": 4}, "seed": 0, "model": {"blocks": ("attn", "gdn")}}),
      ["config: differs in process 1 (n1): sleep.num_passes is 4, 2 in process 0"],
    ),
    (told(config={"sleep": {"num_passes": 2}, "model": {"blocks": ("attn", "gdn")}}), ["seed is None, 0 in"]),
  ],
)
def test_versions_and_configs_are_equal(other, said):
  found = checks.differing([told(), other])
  assert len(found) == len(said) and all(text in line for text, line in zip(said, found, strict=True)), found


STEP = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"}


@pytest.mark.parametrize(
  ("environ", "devices"),
  [
    ({}, None),
    ({"CUDA_VISIBLE_DEVICES": "0,1"}, None),  # no Slurm
    (STEP, None),  # no GPUs
    (STEP | {"CUDA_VISIBLE_DEVICES": ""}, None),
    (STEP | {"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, list(range(8))),
    (STEP | {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, [0, 1, 2, 3]),
    (STEP | {"CUDA_VISIBLE_DEVICES": "4", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "4"}, [0]),
    (STEP | {"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "1,8", "SLURM_LOCALID": "5"}, [5]),
    (
      STEP | {"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1"},
      [4, 5, 6, 7],
    ),
    (STEP | {"SLURM_GPUS_ON_NODE": "8", "JAX_LOCAL_DEVICE_IDS": "0"}, None),  # said by hand
  ],
)
def test_a_slurm_task_takes_its_share_of_the_gpus(environ, devices):
  assert joining.slurm_devices(environ) == devices


def test_gpus_that_cannot_be_shared_out_are_refused():
  with pytest.raises(joining.PeerError, match="8 GPUs cannot be shared out among 3 Slurm tasks of a node"):
    joining.slurm_devices(STEP | {"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "3(x2)"})


def launch(folder, *arguments, own=((), ()), environment=({}, {})):
  """Two processes with flags and environments of their own: exit codes, stdout and stderr of the first."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  base = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "XLA_FLAGS": compiling.flags()}
  path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
  children = []
  for i in range(2):
    meet = (
      f"--coordinator_address=127.0.0.1:{port}",
      "--num_processes=2",
      f"--process_id={i}",
      "--distributed",
    )
    workdir = () if any("--workdir" in x for x in own[i]) else (f"--workdir={folder}/run",)
    command = (sys.executable, "-m", "launch.preflight", *workdir, *meet, *arguments, *own[i])
    env = base | {"PYTHONPATH": path} | environment[i]
    if "PYTHONPATH" in environment[i]:
      env["PYTHONPATH"] = environment[i]["PYTHONPATH"] + os.pathsep + path
    children.append(
      subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    )
  ended = [child.communicate(timeout=240) for child in children]
  err = "\n".join(line for line in ended[0][1].splitlines() if "[Gloo]" not in line)
  return [child.returncode for child in children], ended[0][0], err


@pytest.mark.slow
def test_two_healthy_processes(tmp_path):
  codes, out, err = launch(tmp_path, CONFIG, "--devices=4")
  assert codes == [0, 0], out + err
  checked = ("devices, versions, config", "workdir", "collective", "the first state", "save", "restore")
  lines = [line for line in out.splitlines() if re.search(r" ok +[\d.]+ s$", line)]
  assert [line[:32].strip() for line in lines] == list(checked)
  assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
  ("arguments", "own", "said"),
  [
    (
      ("--devices=16",),
      ((), ()),
      "error: devices: 16 were asked for, the processes have 4; each of 2 process(es)",
    ),
    (("--hardware=h200:2x8",), ((), ()), "error: devices: --hardware=h200:2x8 is a gpu, but JAX runs on cpu"),
    ((), ((), ("--config.sleep.num_passes=3",)), "sleep.num_passes is 3, 1 in process 0"),
    (("--config.train.keep_checkpoints=1000000000",), ((), ()), "error: --workdir: "),
    ((), ((), ("--workdir=OTHER/run",)), "does not see what process(es) "),
    ((), ((), ("--workdir=/proc/sys/run",)), "error: --workdir: process 1 cannot write beside /proc/sys"),
  ],
)
def test_a_planted_fault_is_named(tmp_path, arguments, own, said):
  own = [[x.replace("OTHER", f"{tmp_path}/other") for x in flags] for flags in own]
  codes, _, err = launch(tmp_path, CONFIG, *arguments, own=own)
  assert codes == [2, 2], err
  assert said in err and all(line.startswith("error: ") for line in err.splitlines()), err


@pytest.mark.slow
def test_other_versions_are_named(tmp_path):
  fake = tmp_path / "packages" / "optax-9.9.9.dist-info"
  fake.mkdir(parents=True)
  (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: optax\nVersion: 9.9.9\n")
  changed = ({}, {"PYTHONPATH": str(fake.parent)})
  codes, _, err = launch(tmp_path, CONFIG, environment=changed)
  assert codes == [2, 2] and "error: versions: optax is 9.9.9 on " in err, err
  shutil.rmtree(fake.parent)
  assert os.listdir(tmp_path) == []
