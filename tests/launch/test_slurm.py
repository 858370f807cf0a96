"""The job file for Slurm on a real Slurm of two nodes, in the tests' own namespaces (`slurm_cluster`).

The script is submitted as `launch.render` writes it. Its $PYTHON is a wrapper that lets JAX run on two
simulated CPU devices a node, where the script asks for eight GPUs, or a stand-in that does what a test says.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from sleep_jax.launch import hardware
from tests import forked, torture
from tests.launch import slurm_cluster
from tests.launch.slurm_cluster import GPUS, MEMORY_MB

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CONFIG = "--config=experiments/configs/rule110.py:tiny"
TWO = "--hardware=h200:2x8"
CHANGES = {"steps": 60, "save_every": 10, "eval_every": 30, "eval_sequences": 32, "eval_batch_size": 32}
DEVICES = 2  # of a node: collectives of sixteen on a small machine take seconds a step
TRAIN, PREFLIGHT = "sleep_jax.experiments.rule110", "sleep_jax.launch.preflight"

# The preflight refuses CPU devices where GPUs were asked for: it is asked for as many devices of any kind.
WRAPPER = f"""#!/bin/bash
echo "$2 $SLURM_PROCID $SLURMD_NODENAME $JAX_PLATFORMS $CUDA_VISIBLE_DEVICES" >> "$STARTS"
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=${{DEVICES:-{DEVICES}}}
for word; do
  case $word in
    {TWO}) word=--devices={2 * DEVICES} ;;
  esac
  words+=("$word")
done
exec {sys.executable} "${{words[@]}}"
"""

# Does what the variable of its module says.
STAND_IN = """#!/bin/bash
case $2 in
  *preflight) echo "preflight $SLURM_PROCID" >> "$STARTS"; eval "${PREFLIGHT:-}" ;;
  *) echo "train $SLURM_PROCID ${4##*/}" >> "$STARTS"; eval "${TRAIN:-}" ;;
esac
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
  lacking = slurm_cluster.lacking()
  if lacking:
    pytest.skip(lacking)
  with slurm_cluster.Cluster(tmp_path_factory.mktemp("slurm")) as started:
    yield started


@pytest.fixture(scope="module")
def render(tmp_path_factory):
  with forked.Experiment("sleep_jax.launch.render", tmp_path_factory.mktemp("render")) as experiment:
    yield experiment.run


class Job:
  """A job file in a folder of its own, with a run's workdir beside it."""

  def __init__(self, cluster, render, folder, *arguments, config=CONFIG, hardware=TWO, python=WRAPPER):
    folder.mkdir(exist_ok=True)
    self.cluster, self.folder, self.workdir = cluster, folder, folder / "run"
    self.script, self.python, self.starts = folder / "job.sbatch", folder / "python", folder / "starts"
    sizes = [f"--config.train.{name}={value}" for name, value in CHANGES.items()]
    ended = render(
      *(config, "--target=slurm", hardware, f"--workdir={self.workdir}", "--name=job"), *sizes, *arguments
    )
    assert ended.code == 0, ended.err
    self.script.write_text(ended.out)
    self.python.write_text(python)
    self.python.chmod(0o755)

  def submit(self, *options, **environment):
    """Hands it in; its number."""
    environment = forked.environment(PYTHON=str(self.python), STARTS=str(self.starts), **environment)
    return self.cluster.submit(self.script, *options, **environment)

  def said(self, number):
    path = self.folder / f"job-{number}.out"
    return path.read_text() if path.exists() else ""

  def ended(self, number):
    """Waits until it is over, or requeued: its state, exit code:signal and restarts."""
    found = self.cluster.ended(number)
    return found["JobState"], found["ExitCode"], found["Restarts"]

  def started(self):
    """The lines of what was started, in the order of their text."""
    return sorted(self.starts.read_text().splitlines()) if self.starts.exists() else []

  def saved(self, number, step):
    """Waits until a step of the run is saved."""
    for _ in slurm_cluster.ticks(f"step {step}"):
      if (self.workdir / "checkpoints" / str(step) / "manifest.json").exists():
        return
      assert self.cluster.job(number).get("JobState") not in slurm_cluster.FINAL, self.said(number)


@pytest.fixture
def job(cluster, render, tmp_path):
  def make(*arguments, **options):
    return Job(cluster, render, tmp_path / "job", *arguments, **options)

  yield make
  cluster.clear()


@pytest.fixture(scope="module")
def whole(cluster, render, tmp_path_factory):
  """A run of two nodes that nobody stopped, and its job's number."""
  made = Job(cluster, render, tmp_path_factory.mktemp("whole"))
  number = made.submit()
  assert made.ended(number) == ("COMPLETED", "0:0", "0"), made.said(number)
  return made, number


def test_two_nodes_train_one_model(cluster, whole):
  made, number = whole
  found, said = cluster.job(number), made.said(number)
  assert (found["NodeList"], found["NumTasks"]) == ("n[1-2]", "2")
  gpus = ",".join(map(str, range(GPUS)))
  assert made.started() == [
    f"{module} {index} n{index + 1} cuda {gpus}" for module in (TRAIN, PREFLIGHT) for index in range(2)
  ]
  environment = json.loads((made.workdir / "env.json").read_text())
  assert (environment["processes"], environment["devices"]) == (2, ["cpu"] * 2 * DEVICES)
  assert said.count(" ok ") == 6 and "exact " in said and "failed" not in said, said
  assert "noticed later" not in said  # the processes hear of each other's end


def looks(pid):
  """Whether a process is stopped, and whether SIGTERM waits for it."""
  lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
  found = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
  return found["State"].startswith("T"), bool(int(found["ShdPnd"], 16) >> (signal.SIGTERM - 1) & 1)


def stop(pid):
  os.kill(pid, signal.SIGSTOP)
  while not looks(pid)[0]:
    time.sleep(0.01)


def held_until_term(pid, ask):
  """Stops one process of a run until SIGTERM has come to all: the run cannot end before, on any machine.

  Now and then it goes on for a moment, or the others would give it up. Where Slurm preempts a job it sends
  SIGCONT too.

  Args:
    pid: of the process.
    ask: called when it is stopped; lets SIGTERM come, now or later.
  """
  stop(pid)
  ask()
  came = False
  while not came:
    for _ in range(500):
      stopped, waits = looks(pid)
      came = waits or not stopped
      if came:
        break
      time.sleep(0.01)
    else:
      os.kill(pid, signal.SIGCONT)
      time.sleep(0.005)
      stop(pid)
  stop(pid)
  time.sleep(3)  # JAX looks for a signal once a second
  os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("why", ["time limit", "preemption"])
def test_a_stopped_run_is_requeued_and_ends_as_one_that_nobody_stopped(cluster, job, whole, why):
  made = job("--save_seconds=0")
  urgent = made.folder / "urgent.sh"
  urgent.write_text("#!/bin/bash\n")
  others = []

  def preempt():
    others.append(cluster.submit(urgent, "--partition=urgent", "--nodes=2", "--exclusive"))

  number = made.submit(*(["--time=5"] if why == "time limit" else []))
  made.saved(number, 10)
  held_until_term(slurm_cluster.task(number, TRAIN, 1), preempt if why == "preemption" else lambda: None)
  ended, said = made.ended(number), made.said(number)
  assert ended == ("PENDING", "0:0", "1"), said
  assert "stopped by SIGTERM; saved step " in said and "exit code 3 after 0 restarts: requeued" in said, said
  assert all(cluster.ended(other)["JobState"] == "COMPLETED" for other in others)
  cluster.run("scontrol", "update", f"JobId={number}", "TimeLimit=60")
  cluster.release(number)
  assert made.ended(number) == ("COMPLETED", "0:0", "1"), made.said(number)
  assert "resuming at step " in made.said(number)
  torture._same_ends(made.workdir, whole[0].workdir)


def test_a_run_that_loses_a_task_is_requeued_within_the_limit(cluster, job, whole):
  made = job("--max_restarts=1")
  number = made.submit()
  made.saved(number, 10)
  os.kill(slurm_cluster.task(number, TRAIN, 1), signal.SIGKILL)
  assert made.ended(number) == ("PENDING", "0:0", "1"), made.said(number)
  cluster.release(number)
  made.saved(number, 40)
  os.kill(slurm_cluster.task(number, TRAIN, 0), signal.SIGKILL)
  state, _, restarts = made.ended(number)
  assert (state, restarts) == ("FAILED", "1"), made.said(number)
  assert "resuming at step " in made.said(number)
  again = made.submit()  # by hand
  assert cluster.ended(again)["JobState"] == "COMPLETED", made.said(again)
  torture._same_ends(made.workdir, whole[0].workdir)


def test_a_mistake_in_the_config_ends_the_job(job, cluster, tmp_path):
  """In a config file of the user's, made after the job file was written."""
  own = tmp_path / "mine.py"
  own.write_text((forked.ROOT / "experiments/configs/rule110.py").read_text())
  made = job(config=f"--config={own}:tiny")
  own.write_text(own.read_text().replace("window=6)", "window=-6)"))
  number = made.submit()
  ended, said = made.ended(number), made.said(number)
  assert ended == ("FAILED", "2:0", "0"), said
  assert "error: model.window: " in said and "Traceback" not in said, said
  assert [line.split()[0] for line in made.started()] == [PREFLIGHT] * 2 and not made.workdir.exists()


def test_the_workdir_of_another_run_ends_the_job(cluster, job, whole):
  made = job("--config.seed=1")
  made.workdir.mkdir()
  config = (whole[0].workdir / "config.json").read_text()
  (made.workdir / "config.json").write_text(config)
  number = made.submit()
  assert made.ended(number) == ("FAILED", "2:0", "0"), made.said(number)
  assert "was made with another configuration: seed" in made.said(number)
  assert len(made.started()) == 4 and not (made.workdir / "metrics.jsonl").exists()


def test_the_preflight_comes_first_and_stops_a_job_that_has_too_few_devices(cluster, job):
  made = job()
  number = made.submit(DEVICES="1")
  ended, said = made.ended(number), made.said(number)
  assert ended == ("FAILED", "2:0", "0"), said
  (line,) = (line for line in said.splitlines() if line.startswith("error: "))
  assert "devices: 4 were asked for, the processes have 2; each of 2 process(es) sees 1, not 2" in line
  assert [line.split()[0] for line in made.started()] == [PREFLIGHT] * 2 and not made.workdir.exists()


@pytest.mark.parametrize(
  ("codes", "state"),
  [
    ((0, 0), ("COMPLETED", "0:0", "0")),
    ((2, 2), ("FAILED", "2:0", "0")),
    ((2, 1), ("FAILED", "2:0", "0")),  # the first one's mistake; the other says that it lost a process
    ((1, 1), ("PENDING", "0:0", "1")),
    ((3, 3), ("PENDING", "0:0", "1")),
  ],
)
def test_exit_codes_of_processes_that_do_not_end_together(cluster, job, codes, state):
  """The last one has the time to end by itself: killed, it would turn a mistake into a failure."""
  made = job(python=STAND_IN)
  train = f"if [ $SLURM_PROCID = 1 ]; then sleep 3; exit {codes[1]}; fi; exit {codes[0]}"
  number = made.submit(TRAIN=train)
  assert made.ended(number) == state, made.said(number)


def test_a_cancelled_job_does_not_come_back(cluster, job):
  made = job(python=STAND_IN)
  number = made.submit(TRAIN="trap 'exit 3' TERM; while :; do sleep 0.1; done")
  for _ in slurm_cluster.ticks("training"):
    if any(line.startswith("train") for line in made.started()):
      break
  cluster.run("scancel", number)
  state, _, restarts = made.ended(number)
  assert (state, restarts) == ("CANCELLED", "0"), made.said(number)
  time.sleep(5)
  assert cluster.job(number)["JobState"] == "CANCELLED"


def test_a_run_that_is_not_saved_in_time_is_requeued(cluster, job):
  """Slurm then kills it; the next start goes on from the checkpoint before."""
  made = job("--save_seconds=0", python=STAND_IN)
  number = made.submit("--time=1", TRAIN="trap '' TERM; while :; do sleep 0.1; done")
  assert made.ended(number) == ("PENDING", "0:0", "1"), made.said(number)
  assert "srun: forcing job termination" in made.said(number)


def test_term_during_the_preflight_requeues_the_job(cluster, job):
  """There is no time left for training, whatever the preflight says."""
  made = job(python=STAND_IN)
  number = made.submit(PREFLIGHT="trap '' TERM; sleep 4", TRAIN="sleep 600")
  for _ in slurm_cluster.ticks("the preflight"):
    if len(made.started()) == 2:
      break
  cluster.run("scancel", "--signal=TERM", "--batch", number)
  assert made.ended(number) == ("PENDING", "0:0", "1"), made.said(number)
  assert not any(line.startswith("train") for line in made.started())


def test_runs_of_a_sweep_stop_and_start_each_by_itself(cluster, job):
  """Slurm gives one of an array's tasks the number of the whole array."""
  made = job("--sweep", hardware="--hardware=h200:8", python=STAND_IN)
  train = "trap 'exit 3' TERM; until [ -e ${STARTS%/*}/done ]; do sleep 0.1; done"
  array = made.submit("--array=0-1", TRAIN=train)
  for _ in slurm_cluster.ticks("both runs"):
    if sum(line.startswith("train") for line in made.started()) == 2:
      break
  numbers = {cluster.job(f"{array}_{i}")["JobId"]: f"{array}_{i}" for i in range(2)}
  one = numbers.pop(array)
  (other,) = numbers.values()
  cluster.run("scancel", "--signal=TERM", "--batch", one)
  assert cluster.ended(one)["Restarts"] == "1", made.said(one)
  time.sleep(3)
  found = cluster.job(other)
  assert (found["JobState"], found["Restarts"]) == ("RUNNING", "0"), made.said(other)
  (made.folder / "done").touch()
  cluster.release(one)
  assert [cluster.ended(x)["JobState"] for x in (one, other)] == ["COMPLETED"] * 2
  trained = [line.split()[2] for line in made.started() if line.startswith("train")]
  assert sorted(map(trained.count, set(trained))) == [1, 2], trained


def test_a_job_has_all_memory_of_its_nodes(cluster, job):
  """--exclusive alone gives all processors, and the memory that a partition gives by default."""
  made = job(python=STAND_IN)
  number = made.submit()
  made.ended(number)
  assert f"mem={2 * MEMORY_MB}M" in cluster.job(number)["TRES"].split(",")


@pytest.mark.parametrize("name", [n for n in hardware.names() if hardware.find(n).chip.platform == "gpu"])
def test_slurm_accepts_the_job_of_every_gpu_row(cluster, job, name):
  made = job("--config.train.batch_size=256", hardware=f"--hardware={name}")
  done = cluster.run("sbatch", "--test-only", "--partition=large", str(made.script))
  nodes = hardware.find(name).hosts
  assert done.returncode == 0 and " to start at " in done.stderr, done.stderr
  assert f"on nodes c{'[1-' if nodes > 1 else '1'}" in done.stderr, done.stderr


def test_slurm_accepts_the_array_of_a_sweep(cluster, job):
  made = job("--sweep", hardware="--hardware=h200:8")
  done = cluster.run("sbatch", "--test-only", str(made.script))
  assert done.returncode == 0 and " to start at " in done.stderr, done.stderr


def test_slurm_refuses_what_the_cluster_does_not_have(cluster, job):
  """--test-only can fail, and so the tests above."""
  made = job("--config.train.batch_size=256", hardware="--hardware=h200:4x8")
  done = cluster.run("sbatch", "--test-only", "--partition=debug", str(made.script))
  assert done.returncode != 0 and "not available" in done.stderr, done.stderr


def processes_of(folder):
  """Numbers of the processes that know a cluster by its folder."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
    with contextlib.suppress(OSError):
      if f"SLURM_CONF={folder}/slurm.conf".encode() in path.read_bytes().split(b"\0"):
        found.append(int(path.parent.name))
  return found


@pytest.mark.parametrize("end", ["closed", "killed"])
def test_nothing_of_a_cluster_stays(cluster, tmp_path, end):
  """Also where the process that started it is killed."""
  code = "import pathlib, sys; from tests.launch.slurm_cluster import Cluster\n"
  code += "with Cluster(pathlib.Path(sys.argv[1])) as c:\n"
  code += "  print(c.submit(pathlib.Path(sys.argv[2])), flush=True); input()"
  script = tmp_path / "job.sh"
  script.write_text("#!/bin/bash\nsleep 600\n")
  folder = tmp_path / "cluster"
  folder.mkdir()
  starter = subprocess.Popen(
    [sys.executable, "-c", code, str(folder), str(script)],
    cwd=forked.ROOT,
    env=forked.environment(),
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  )
  assert starter.stdout.readline().strip().isdigit()
  assert len(processes_of(folder)) >= 4  # unshare, its child, three daemons
  if end == "killed":
    starter.kill()
  starter.communicate(b"\n" if end == "closed" else None, timeout=60)
  for _ in slurm_cluster.ticks("the end of the cluster"):
    if not processes_of(folder):
      break
  assert str(folder) not in pathlib.Path("/proc/self/mounts").read_text()
