"""One process becomes one of several, before any device is touched: by flags, or as the cluster says."""

import os
import re
import secrets
import socket
from collections.abc import Callable, Mapping

import jax
from jax._src import distributed  # no public name says where the first process was found

from sleep_jax.runtime import peers, processes
from sleep_jax.runtime.files import RunFailedError
from sleep_jax.runtime.peers import PeerError, Peers

# What the start of a process on a cluster sets, all or none of it, and which of it are numbers.
_TOGETHER = (
  ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
  ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
  ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"),
)
_NUMBERS = (
  *("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"),
  *("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
  *("TPU_WORKER_ID", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID", "JOB_COMPLETION_INDEX"),
  *("JAX_COORDINATOR_PORT", "JAX_PARTITION_INDEX", "JAX_SLICE_INDEX"),
)
_CLUSTER_S = 30.0  # that processes which JAX has brought together have to call each other
_MARGIN_S = 60  # by which JAX gives up later than we do: it would end the process with a page of C++


def join(
  address: str | None, count: int | None, index: int | None, report: Callable[[str], None]
) -> Peers | None:
  """Meets the other processes and starts JAX's service for all of them.

  Args:
    address, count, index: HOST:PORT of the first process, how many there are, and which one this is. All
      None: the cluster says so.
    report: takes a line about who is waited for.

  Returns:
    The connections to the others; None if there is one process only, or if they cannot reach each other.

  Raises:
    PeerError: naming the flag or the variable, if these do not fit.
    RunFailedError: if the others do not come.
  """
  _check_environment(os.environ)
  devices = slurm_devices(os.environ)
  met, asked = None, {}
  if address is not None:
    assert count is not None and index is not None  # the command line has asked for all three
    host, port = peers.parse_address(address)
    met = peers.meet(host, port, index, count, report)
    asked = {"coordinator_address": address, "num_processes": count, "process_id": index}
    listens_at = peers.own_address(host, port) if index == 0 else None
    if listens_at:  # or JAX would listen on all interfaces
      asked["coordinator_bind_address"] = (
        f"[{listens_at}]:{port}" if ":" in listens_at else f"{listens_at}:{port}"
      )
  limit = peers.ends_in(
    peers.START_S, f"failed: --distributed: the processes did not find each other in {peers.START_S:.0f} s"
  )
  try:
    limit_s = round(peers.START_S) + _MARGIN_S
    jax.distributed.initialize(**asked, local_device_ids=devices, initialization_timeout=limit_s)
    if met is None:
      met = _meet_on_a_cluster(report)
  except jax.errors.JaxRuntimeError as e:
    raise RunFailedError(f"--distributed: {' '.join(str(e).split())[:300]}") from e
  except (KeyError, IndexError, TypeError, ValueError, RuntimeError, ImportError, OSError) as e:
    if "initialize backend" in str(e):  # the machine's fault, not that of what was asked for
      raise
    told = " ".join(f"{type(e).__name__}: {e}".split())[:300]
    if address is None:
      told = _half_set(os.environ) or (
        "no cluster was found here; give coordinator_address, num_processes, process_id"
        if "should be defined" in told or "must be defined" in told
        else told
      )
    raise PeerError(f"--distributed: {told}") from e
  finally:
    limit.cancel()
  return met


def _meet_on_a_cluster(report: Callable[[str], None]) -> Peers | None:
  """Connects processes that JAX has brought together: the first one says where it can be reached."""
  count, index = jax.process_count(), jax.process_index()
  if count == 1:
    return None

  def place() -> tuple[str, int, str]:
    host = _routed_address()
    with socket.create_server((host, 0)) as free:
      return host, free.getsockname()[1], secrets.token_hex(16)

  try:
    host, port, secret = processes.agree(place, OSError)
    return peers.meet(host, port, index, count, report, wait_s=_CLUSTER_S, secret=secret)
  except (PeerError, RunFailedError, OSError) as e:
    report(f"{e}; the run goes on, and the end of a process is noticed later")
    return None


def _routed_address() -> str:
  """The address of this machine towards other ones, or the name by which they have found it.

  Compute nodes often have no way out of their own network, and so no address towards the world.
  """
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
    try:
      asking.connect(("192.0.2.1", 9))  # an address that is nobody's; a datagram socket sends nothing by this
      return asking.getsockname()[0]
    except OSError:
      address = distributed.global_state.coordinator_address
      if address is None:
        raise
      return address.rpartition(":")[0].strip("[]")


def slurm_devices(environ: Mapping[str, str]) -> list[int] | None:
  """Which of the GPUs that a Slurm task sees it should take; None: Slurm says nothing of GPUs.

  JAX would take the one with the task's number on its node, without a word: of an 8-GPU node that runs one
  task, one GPU; and none where each task is bound to a GPU of its own.

  Args:
    environ: of the task.

  Raises:
    PeerError: if the node's GPUs cannot be shared out equally among its tasks.
  """
  visible = environ.get("CUDA_VISIBLE_DEVICES", "")
  count = len(list(filter(None, visible.split(","))))
  if "CUDA_VISIBLE_DEVICES" not in environ:
    on_node = environ.get("SLURM_GPUS_ON_NODE", "")
    count = int(on_node) if on_node.isdecimal() else 0
  if "SLURM_STEP_NODELIST" not in environ or "JAX_LOCAL_DEVICE_IDS" in environ or not count:
    return None
  tasks = _tasks_here(environ)
  if count == 1 or tasks == 1:
    return list(range(count))
  if count % tasks:
    raise PeerError(
      f"--distributed: {count} GPUs cannot be shared out among {tasks} Slurm tasks of a node; start one a"
      " node, or one a GPU"
    )
  each, local = count // tasks, int(environ.get("SLURM_LOCALID", "0"))
  return list(range(local * each, (local + 1) * each))


def _tasks_here(environ: Mapping[str, str]) -> int:
  """Tasks of this step on this node. Slurm lists them by node, as `2(x3),1`."""
  counts: list[int] = []
  for number, repeated in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "1")):
    counts += [int(number)] * int(repeated or 1)
  node = int(environ.get("SLURM_NODEID", "0"))
  return counts[node] if node < len(counts) else 1


def _check_environment(environment: Mapping[str, str]) -> None:
  """Raises PeerError for what would end the process from C++."""
  for name in _NUMBERS:
    value = environment.get(name)
    if value is not None and not (value.isascii() and value.isdecimal() and len(value) < 19):
      raise PeerError(f"--distributed: the variable {name} must be a number, got {value!r:.80}")
  port = environment.get("JAX_COORDINATOR_PORT")
  if port is not None and not 1 <= int(port) <= 65535:
    raise PeerError(f"--distributed: the variable JAX_COORDINATOR_PORT must lie in 1..65535, got {port}")
  for name in ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS"):
    if name in environment:
      try:
        peers.parse_address(environment[name])
      except PeerError as e:
        told = str(e).partition(": ")[2]
        raise PeerError(f"--distributed: the variable {name}: {told}") from e
  ids = environment.get("JAX_LOCAL_DEVICE_IDS")
  if ids and not all(x.strip().isdecimal() for x in ids.split(",")):
    raise PeerError(f"--distributed: the variable JAX_LOCAL_DEVICE_IDS must be numbers, got {ids!r:.80}")


def _half_set(environment: Mapping[str, str]) -> str | None:
  """Which variable of a cluster is missing beside others that are there."""
  for names in _TOGETHER:
    there = [name for name in names if name in environment]
    if there and len(there) < len(names):
      missing = ", ".join(name for name in names if name not in environment)
      return f"{there[0]} is set here, but not {missing}: start every process as the cluster does (srun, say)"
  return None
