"""Whole runs of two processes: one dies, the other says which and ends, and the same command goes on."""

import signal
import subprocess
import sys
import time

import pytest

from sleep_jax.runtime import metrics
from tests import forked
from tests.runtime import test_peers

STEPS = 60


def rule110(folder, port, count, index, cluster):
  """One of the processes of a run, that finds the others by its flags or as Open MPI's variables say."""
  address = f"127.0.0.1:{port}"
  flags = (f"--coordinator_address={address}", f"--num_processes={count}", f"--process_id={index}")
  mpi = {"OMPI_COMM_WORLD_SIZE": str(count), "OMPI_COMM_WORLD_RANK": str(index)}
  mpi |= {"OMPI_COMM_WORLD_LOCAL_RANK": str(index), "JAX_COORDINATOR_PORT": str(port)}
  mpi |= {"OMPI_MCA_orte_hnp_uri": f"4096.0;tcp://{address}"}
  changes = {"steps": STEPS, "save_every": 20, "eval_every": STEPS, "log_every": 5, "batch_size": 2 * count}
  return subprocess.Popen(
    [
      *(sys.executable, "-m", "experiments.rule110", "--tensorboard=False"),
      *("--config=experiments/configs/rule110.py:tiny", f"--workdir={folder}", "--config.mesh.data=-1"),
      *(f"--config.train.{name}={value}" for name, value in changes.items()),
      *("--distributed", *(() if cluster else flags)),
    ],
    cwd=forked.ROOT,
    env=forked.environment(**(mpi if cluster else {})),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
  ("victim", "number", "cluster"),
  [(0, signal.SIGKILL, False), (1, signal.SIGSEGV, False), (0, signal.SIGKILL, True)],
)
def test_a_run_that_loses_a_process_says_which_ends_with_1_and_goes_on(tmp_path, victim, number, cluster):
  folder = tmp_path / "run"
  port = test_peers.free_port()
  children = [rule110(folder, port, 2, i, cluster) for i in range(2)]
  while not (folder / "checkpoints" / "20" / "manifest.json").exists():
    assert all(child.poll() is None for child in children)
    time.sleep(0.02)
  children[victim].send_signal(number)
  began = time.monotonic()
  code, err = test_peers.ends(children)[1 - victim]
  assert time.monotonic() - began < 60
  told = f"failed: process {victim} of 2 ended without a word: killed, or out of memory?; the same command"
  assert (code, err) == (1, f"{told} goes on from the last checkpoint\n")
  port = test_peers.free_port()
  found = test_peers.ends([rule110(folder, port, 2, i, cluster) for i in range(2)])
  assert [code for code, _ in found] == [0, 0], found
  steps = [row["step"] for row in metrics.read(folder / "metrics.jsonl") if row["kind"] == "train"]
  assert steps == list(range(5, STEPS + 1, 5))
