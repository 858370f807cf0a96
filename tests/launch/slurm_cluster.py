"""A private Slurm of two nodes on this machine, for tests. Nothing of it stays when it is closed.

The daemons and the jobs run in network, mount and process namespaces of their own. The first process there
holds a pipe from the test. When the test closes it, or dies, that process ends; Linux then kills all others
of the namespace, and its mounts and its network go too.

Each node has eight GPUs as far as Slurm can see: it counts devices, all of which are /dev/null here.
"""

import contextlib
import os
import pathlib
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping

GPUS, MEMORY_MB = 8, 2000  # of a node
WAIT_S = 600.0  # longer than a small run takes on a busy machine
SLURM = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
PROGRAMS = (*SLURM, "unshare", "nsenter", "mount", "ip", "bash")
INSTALL = "apt-get install --no-install-recommends slurm-wlm iproute2 util-linux"
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
NAMESPACES = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")

# The nodes' names need an address beside 127.0.0.1: Slurm resolves no name where there is no other.
START = """
set -eu
ip link set lo up
ip address add 10.250.0.1/32 dev lo
mount --bind hosts /etc/hosts
slurmctld -D >>log 2>&1 &
slurmd -D -N n1 >>log 2>&1 &
slurmd -D -N n2 >>log 2>&1 &
echo started
read -r _ || true
"""

CONF = """
ClusterName=tests
SlurmctldHost=localhost
SlurmctldPort=16817
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
ReturnToService=2
SlurmdParameters=config_overrides
MinJobAge=100000
GresTypes=gpu
DefMemPerNode=100
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ResumeProgram=/bin/true
SuspendProgram=/bin/true
SuspendTime=600
SuspendExcParts=debug,urgent
NodeName=DEFAULT CPUs=2 RealMemory={memory} Gres=gpu:{gpus}
NodeName=n1 NodeHostname=localhost NodeAddr=n1 Port=17001 State=UNKNOWN
NodeName=n2 NodeHostname=localhost NodeAddr=n2 Port=17002 State=UNKNOWN
NodeName=c[1-32] State=CLOUD
PartitionName=debug Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=300
PartitionName=urgent Nodes=n1,n2 PriorityTier=2
PartitionName=large Nodes=c[1-32]
"""


def lacking() -> str | None:
  """What is missing for a cluster on this machine; None: nothing."""
  missing = [name for name in PROGRAMS if shutil.which(name) is None]
  if missing:
    return f"needs {', '.join(missing)}: {INSTALL}"
  if os.geteuid() != 0:
    return "needs root: Slurm's daemons run as root, in namespaces of their own"
  tried = subprocess.run(["unshare", *NAMESPACES, "true"], capture_output=True, text=True, check=False)
  if tried.returncode:
    return f"needs namespaces (a container must be privileged): {tried.stderr.strip()}"
  return None


class Cluster:
  """A running Slurm. A context manager.

  Args:
    folder: for everything that it writes.

  Raises:
    RuntimeError: where it does not start, with the end of its log.
  """

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    self._environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    for name in ("state", "spool-n1", "spool-n2"):
      (folder / name).mkdir()
    for number in range(GPUS):
      (folder / f"gpu{number}").symlink_to(os.devnull)  # Slurm wants a device
    (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, memory=MEMORY_MB, gpus=GPUS))
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n10.250.0.1 n1 n2 {socket.gethostname()}\n")
    self._process = subprocess.Popen(
      ["unshare", *NAMESPACES, "bash", "-c", START],
      cwd=folder,
      env=self._environment,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=(folder / "log").open("w"),
      start_new_session=True,  # a Ctrl-C is the test's
    )
    try:
      started = self._process.stdout.readline() == b"started\n"
      deadline = time.monotonic() + 60
      while not started or self.call("sinfo", "-h", "-t", "idle", "-p", "debug", "-o", "%D").strip() != "2":
        if not started or time.monotonic() > deadline:
          raise RuntimeError(f"Slurm does not start:\n{self.log()}")
        time.sleep(0.3)
    except BaseException:
      self.close()
      raise

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def close(self) -> None:
    """Ends every process of the cluster and of its jobs, and waits until they are gone."""
    self._process.stdin.close()
    try:
      self._process.wait(30)
    except subprocess.TimeoutExpired:
      self._process.kill()  # its child is killed with it
      self._process.wait()
    self._process.stdout.close()

  def log(self) -> str:
    """The end of what the daemons wrote."""
    return "\n".join((self._folder / "log").read_text(errors="replace").splitlines()[-40:])

  def run(
    self, *words: str, cwd: pathlib.Path | None = None, **environment: str
  ) -> subprocess.CompletedProcess:
    """A command in the cluster's namespaces, to its end."""
    inside = (f"--target={self._process.pid}", "--net", "--mount")
    inside += (f"--pid=/proc/{self._process.pid}/ns/pid_for_children",)
    return subprocess.run(
      ["nsenter", *inside, "env", f"--chdir={cwd or self._folder}", *words],
      env=self._environment | environment,
      capture_output=True,
      text=True,
      timeout=120,
      check=False,
    )

  def call(self, *words: str) -> str:
    """What a command of Slurm prints; nothing where it fails, as it may while a daemon is busy."""
    done = self.run(*words)
    return done.stdout if done.returncode == 0 else ""

  def submit(self, script: pathlib.Path, *options: str, **environment: str) -> str:
    """Hands a job file in; the job's number. The job writes its output beside the file."""
    done = self.run("sbatch", "--parsable", *options, str(script), cwd=script.parent, **environment)
    if done.returncode:
      raise RuntimeError(f"sbatch: {done.stderr}\n{self.log()}")
    return done.stdout.strip()

  def job(self, number: str) -> dict[str, str]:
    """What Slurm says of a job, by name; of one in an array the number is ARRAY_TASK."""
    return dict(re.findall(r"(\S+?)=(\S*)", self.call("scontrol", "--oneliner", "show", "job", number)))

  def until(self, number: str, holds: Callable[[Mapping[str, str]], bool]) -> dict[str, str]:
    """Waits until something holds of a job; what Slurm says of it then."""
    for _ in ticks(f"job {number}"):
      found = self.job(number)
      if found and holds(found):
        return found
    raise AssertionError("ticks never end")

  def ended(self, number: str) -> dict[str, str]:
    """Waits until a job is over, for good or until Slurm starts it again."""
    return self.until(number, lambda job: job["JobState"] in FINAL or job["Reason"] == "BeginTime")

  def release(self, number: str) -> None:
    """Starts a requeued job soon. Slurm would hold it for two minutes.

    In the second in which a job was ended, a node takes it for that one and does not start it.
    """
    time.sleep(3)
    self.run("scontrol", "update", f"JobId={number}", "StartTime=now")
    self.until(number, lambda job: job["JobState"] != "PENDING")

  def clear(self) -> None:
    """Cancels all jobs, and waits until they are gone."""
    self.run("scancel", "--user=root")
    for _ in ticks("the end of all jobs"):
      if not self.call("squeue", "--noheader"):
        return


def ticks(what: str) -> Iterator[None]:
  """Moments to look at something; raises where it takes too long."""
  deadline = time.monotonic() + WAIT_S
  while time.monotonic() < deadline:
    yield
    time.sleep(0.2)
  raise TimeoutError(f"{what}: nothing came in {WAIT_S:.0f} s")


def task(number: str, module: str, index: int) -> int:
  """The process of a job's task that runs a module, once it has started.

  Args:
    number: of the job.
    module: that Python runs with -m.
    index: of the process in the run.
  """
  wanted = {f"SLURM_JOB_ID={number}".encode(), f"SLURM_PROCID={index}".encode()}
  for _ in ticks(f"task {index} of job {number}"):
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
      with contextlib.suppress(OSError):
        words = (folder / "cmdline").read_bytes().split(b"\0")
        named = words[1:3] == [b"-m", module.encode()]
        if named and wanted <= set((folder / "environ").read_bytes().split(b"\0")):
          return int(folder.name)
  raise AssertionError("ticks never end")
