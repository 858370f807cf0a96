"""The checks before a run that `launch.preflight` makes: each says what is wrong, in every process alike."""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sleep_jax import config, train
from sleep_jax.config import Config
from sleep_jax.cost import footprint
from sleep_jax.experiments import cli
from sleep_jax.launch import gathering
from sleep_jax.launch.hardware import Hardware
from sleep_jax.runtime import checkpoint, files, processes

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# Not every process reads a file at once after another has written it: file servers keep what they know.
SETTLE_S = 10.0


class Checks:
  """What was checked, how long it took, and what is wrong; the same in every process."""

  def __init__(self, timeout_s: float):
    self._timeout_s = timeout_s
    self.problems: list[tuple[str, int]] = []

  @contextmanager
  def timed(self, what: str) -> Iterator[None]:
    """Times a check, says how it went, and ends the process where it hangs."""
    before, begun = len(self.problems), time.monotonic()
    alarm = threading.Timer(self._timeout_s, _hangs, (what, self._timeout_s))
    alarm.daemon = True
    alarm.start()
    try:
      yield
    finally:
      alarm.cancel()
    verdict = "ok" if len(self.problems) == before else "FAILED"
    print(f"{what:32} {verdict:8} {time.monotonic() - begun:8.2f} s", flush=True)

  def fail(self, problem_: str, code: int = cli.USER_MISTAKE) -> None:
    """Notes what is wrong, and the exit code for it."""
    self.problems.append((problem_, code))

  @property
  def code(self) -> int:
    """0; 2 if anything must be changed; 1 if the cluster failed."""
    codes = {code for _, code in self.problems}
    return cli.USER_MISTAKE if cli.USER_MISTAKE in codes else max(codes, default=cli.DONE)


def _hangs(what: str, seconds: float) -> None:
  print(f"failed: {what}: no answer for {seconds:g} s", file=sys.stderr, flush=True)
  os._exit(cli.FAILED)  # whatever hangs hears nothing else


def facts(values: Mapping[str, Any]) -> dict[str, Any]:
  """What a process knows of itself, for the others to compare."""
  text = json.dumps(values, sort_keys=True, default=str)
  here = jax.local_devices()
  return {
    "host": platform.node(),
    "platform": here[0].platform,
    "kind": here[0].device_kind,
    "devices": len(here),
    "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
    "config": {"digest": hashlib.sha256(text.encode()).hexdigest(), "values": flat(values)},
  }


def flat(values: Mapping[str, Any], path: str = "") -> dict[str, str]:
  """Nested values by dotted key, as text."""
  found: dict[str, str] = {}
  for name, value in values.items():
    if isinstance(value, Mapping):
      found |= flat(value, f"{path}{name}.")
    else:
      found[path + name] = repr(list(value) if isinstance(value, tuple) else value)
  return found


def wrong_devices(
  everybody: Sequence[Mapping[str, Any]], row: Hardware | None, slices: int, devices: int | None
) -> list[str]:
  """What is wrong with the devices of all processes; one line each.

  Args:
    everybody: `facts` of each process.
    row: the hardware that was asked for. None: it has no name.
    slices: of it.
    devices: in all, that were asked for. None: not said.
  """
  found, total = [], sum(x["devices"] for x in everybody)
  by_process = [f"{x['host']} has {x['devices']}" for x in everybody]
  unequal = len({x["devices"] for x in everybody}) > 1
  if unequal:
    found.append(f"devices: processes have different numbers: {', '.join(by_process[:8])}")
  kinds = {x["kind"] for x in everybody}
  if len(kinds) > 1:
    found.append(f"devices: processes have different kinds: {', '.join(sorted(kinds))}")
  asked = devices if row is None else row.devices * slices
  if row is not None:
    others = {x["platform"] for x in everybody} - {row.chip.platform}
    if others:
      found.append(
        f"devices: --hardware={row.name} is a {row.chip.platform}, but JAX runs on {', '.join(others)}"
      )
  if asked is not None and total != asked:
    hint = ""
    if not unequal and total < asked and asked % len(everybody) == 0:
      each = asked // len(everybody)
      hint = (
        f"; each of {len(everybody)} process(es) sees {total // len(everybody)}, not {each}: under"
        " Slurm ask for --gpus-per-node, not for --gpus-per-task, or set JAX_LOCAL_DEVICE_IDS"
      )
    found.append(f"devices: {asked} were asked for, the processes have {total}{hint}")
  return found


def differing(everybody: Sequence[Mapping[str, Any]]) -> list[str]:
  """What versions and config fields differ between processes; one line each."""
  found, first = [], everybody[0]
  for index, other in enumerate(everybody[1:], 1):
    for name, version in other["versions"].items():
      known = first["versions"].get(name)
      if version != known:
        found.append(f"versions: {name} is {version} on {other['host']}, {known} on {first['host']}")
    if other["config"]["digest"] != first["config"]["digest"]:
      ours, theirs = first["config"]["values"], other["config"]["values"]
      keys = [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
      shown = ", ".join(
        f"{key} is {theirs.get(key)}, {ours.get(key)} in process 0" for key in sorted(keys)[:3]
      )
      found.append(f"config: differs in process {index} ({other['host']}): {shown}")
  return found


def check_workdir(checks: Checks, folder: Path, needed: int) -> None:
  """Whether every process can write beside the workdir and reads there what the others wrote, and its room.

  Args:
    folder: to be used, and removed again.
    needed: bytes of the checkpoints.
  """
  index, count = jax.process_index(), jax.process_count()
  told = gathering.everybody("token", {"token": secrets.token_hex(8), "folder": str(folder)})
  token, mine = told[0]["token"], {"error": None, "seen": []}
  try:
    folder.mkdir(parents=True, exist_ok=True)
    files.write_file(folder / f"{token}.{index}", token)
  except OSError as e:
    mine["error"] = files.why(e)
  gathering.everybody("written", {})
  if mine["error"] is None:
    expected, until = {f"{token}.{i}" for i in range(count)}, time.monotonic() + SETTLE_S
    while True:
      seen = {path.name for path in folder.glob(f"{token}.*")}
      if seen >= expected or time.monotonic() > until:
        break
      time.sleep(0.2)
    mine["seen"] = sorted(int(name.rpartition(".")[2]) for name in seen & expected)
    usage = shutil.disk_usage(folder)
    mine["free"] = usage.free
  reports = gathering.everybody("seen", mine)
  for i, other in enumerate(reports):
    where = f"--workdir: process {i}"
    if other["error"] is not None:
      checks.fail(f"{where} cannot write beside {told[i]['folder']}: {other['error']}")
    elif len(other["seen"]) < count and not any(x["error"] for x in reports):
      lacking = ", ".join(str(j) for j in range(count) if j not in other["seen"])
      checks.fail(
        f"{where} does not see what process(es) {lacking} wrote beside {told[i]['folder']}: not shared"
      )
    elif other["free"] < needed:
      checks.fail(
        f"--workdir: {other['free'] / 1e9:,.2f} GB are free, but train.keep_checkpoints and the one being"
        f" written take {needed / 1e9:,.2f} GB"
      )
      break


def check_collective(checks: Checks, mesh: jax.sharding.Mesh) -> None:
  """Whether a sum over all devices is right."""
  count = mesh.size
  layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "model")))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  numbers = jax.make_array_from_callback((count,), layout, lambda at: jnp.arange(count)[at])
  total = jax.jit(jnp.sum, out_shardings=whole)(numbers)
  got, wanted = int(total.addressable_data(0)), count * (count - 1) // 2
  if got != wanted:
    checks.fail(f"collective: the sum over {count} devices is {got}, not {wanted}", cli.FAILED)


def check_checkpoint(checks: Checks, cfg: Config, mesh: jax.sharding.Mesh, folder: Path) -> None:
  """Whether the run's own state comes back as it was saved."""
  fresh = config.replace(cfg, train={"init_from": None})  # weights of a checkpoint take no other room
  tx = train.optimization(fresh).tx
  start = functools.partial(train.init_state, fresh, tx)
  with jax.set_mesh(mesh):
    with checks.timed("the first state"):
      state = jax.block_until_ready(train.first_state(fresh, tx))
    with checkpoint.Checkpoints(folder / "checkpoints", keep=1, report=_say_nothing) as saved:
      with checks.timed("save"):
        saved.save(0, state, block=True)
      with checks.timed("restore"):
        found = saved.restore(jax.eval_shape(start))
        if found is None or not _same(state, found[1]):
          checks.fail("checkpoint: what was restored is not what was saved", cli.FAILED)


def _same(a: Any, b: Any) -> bool:
  plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
  equal = jax.jit(lambda a, b: jnp.all(jnp.array([jnp.array_equal(plain(x), plain(y)) for x, y in zip(
    jax.tree.leaves(a), jax.tree.leaves(b), strict=True)])))  # fmt: skip
  return bool(equal(a, b))


def _say_nothing(line: str) -> None:
  del line


def on_disk(checks: Checks, cfg: Config, mesh: jax.sharding.Mesh, folder: Path) -> None:
  """The checks that write: they clear up behind themselves."""
  tx = train.optimization(cfg).tx
  size = footprint.size(jax.eval_shape(lambda: _arrays(train.init_state(cfg, tx))))
  try:
    with checks.timed("workdir"):
      check_workdir(checks, folder, size * (cfg.train.keep_checkpoints + 1))
    if not checks.problems:
      with checks.timed("collective"):
        check_collective(checks, mesh)
      check_checkpoint(checks, cfg, mesh, folder)
  finally:
    gathering.everybody("done", {})
    if processes.primary():
      shutil.rmtree(folder, ignore_errors=True)


def _arrays(state: train.TrainState) -> train.TrainState:
  """The state with its key as numbers, whose bytes can be counted."""
  return state.replace(key=jax.random.key_data(state.key))
