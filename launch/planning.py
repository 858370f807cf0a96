"""Plans of a run on accelerators: whether it fits, what it takes, and the search for what would fit."""

import copy
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from sleep_jax.config import Config, ConfigError
from sleep_jax.cost import need
from sleep_jax.launch import aot, estimate, hardware, problem
from sleep_jax.launch.hardware import Hardware

ROOM = (
  0.9  # of a device's memory, that what is counted from shapes may take: there is scratch memory beside it
)
TRIES = 4  # programs that a search compiles
DAY = 86400.0


@dataclasses.dataclass(frozen=True)
class Plan:
  """One run on some hardware.

  Attributes:
    hardware: where.
    mesh: devices on the axes `data` and `model`.
    sequences, tokens, steps: of a step, of its longest sequences, and of the run.
    fits: whether it does.
    needed: bytes a device. None: the compiler refused the program and did not say.
    memory: bytes that a device has.
    room: those that a step may take of them.
    bytes: the same by kind; empty where the compiler refused.
    on_host: bytes a device that lie in the host's memory (`sleep.remat` = `offload`).
    source: where that is from.
    compiling: what compiling took, `seconds` by the clock, `cpu_seconds` and `host_bytes`, the most memory of
      this machine. None: nothing was compiled.
    work: what a step costs.
    collectives: kind -> [times, bytes a device] a step. None: nothing was compiled.
    changes: of the config, by dotted key.
  """

  hardware: Hardware
  mesh: tuple[int, int]
  sequences: int
  tokens: int
  steps: int
  fits: bool
  needed: int | None
  memory: int
  room: int
  bytes: dict[str, int]
  on_host: int
  source: str
  compiling: dict[str, float] | None
  work: estimate.Work
  collectives: dict[str, Any] | None
  changes: dict[str, Any]

  @property
  def verdict(self) -> str:
    """`fits: ...`, or by how much it does not."""
    if self.needed is None:
      return f"does not fit {gigabytes(self.memory)} a device"
    used = f"{gigabytes(self.needed)} of {gigabytes(self.memory)} a device"
    if self.fits:
      return f"fits: {used}"
    free = "" if self.room == self.memory else ", of which a tenth stays free for scratch"
    return f"does not fit, by {gigabytes(self.needed - self.room)}: {used}{free}"

  def tokens_per_s(self, efficiency: float) -> float:
    """Tokens that are read a second, at some share of the roofline."""
    return efficiency * self.sequences * self.tokens / self.work.least

  def days(self, efficiency: float) -> float:
    """Days of the whole run; evaluations and checkpoints are not in it."""
    return self.steps * self.work.least / efficiency / DAY

  def cost(self, efficiency: float, *, watts: float | None, price: float | None) -> dict[str, float | None]:
    """Energy of the chips, in kWh, and the price of the run; None where a figure for it is not known.

    Args:
      watts: of a chip. None: what the hardware's table says.
      price: of a chip and hour.
    """
    watts, hours = self.hardware.chip.watts if watts is None else watts, 24 * self.days(efficiency)
    chips = self.hardware.chips
    return {
      "energy_kwh": None if watts is None else chips * hours * watts / 1000,
      "price": None if price is None else chips * hours * price,
    }

  def as_dict(self, efficiency: float) -> dict[str, Any]:
    """Everything, as JSON can hold it."""
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    values |= {"hardware": self.hardware.name, "chips": self.hardware.chips, "hosts": self.hardware.hosts}
    values |= {"work": dataclasses.asdict(self.work), "limit": self.work.limit, "efficiency": efficiency}
    return values | {
      "seconds_at_best": self.work.least,
      "tokens_per_s_at_best": self.tokens_per_s(1.0),
      "days": self.days(efficiency),
    }


class Planner:
  """Plans one config on any hardware.

  Args:
    path, values: as of `problem.read`.
    minutes: a compiler's time for each program. None: nothing is compiled.
  """

  def __init__(self, path: str, values: Mapping[str, Any], minutes: float | None):
    self._path, self._values, self._minutes = path, values, minutes
    self.asked = self._read({})

  def check_possible(self) -> None:
    """Raises `ConfigError` if the run needs more memory than any hardware of the table has."""
    rows = map(hardware.find, hardware.names())
    most = max(rows, key=lambda row: row.chips * row.chip.memory)
    try:
      need.check(self.asked.cfg, self.asked.tokens, available=most.chips * most.chip.memory)
    except ConfigError as e:
      largest = f"of memory of {most.name}, the largest hardware of the table"
      raise ConfigError(str(e).replace("of memory here", largest)) from None

  def plan(self, row: Hardware, changes: Mapping[str, Any] | None = None) -> Plan:
    """The plan of the run, changed, on some hardware.

    Raises:
      ConfigError: where the devices or the batch do not divide, or a change does not fit.
    """
    changes = dict(changes or {})
    asked = self._read(changes)
    sizes, source, collectives = estimate.bytes_by_kind(asked, row), "counted from shapes", None
    compiling: dict[str, float] | None = None
    needed: int | None = sum(sizes.values())
    on_host = estimate.bytes_on_host(asked, row)
    room = int(ROOM * row.device_memory)
    fits = needed <= room
    least = need.total(asked.cfg, asked.tokens) / row.devices
    if self._minutes is not None and _compiler(row) and least <= row.device_memory:
      try:
        found = aot.compile_step(self._path, self._nested(changes), row, minutes=self._minutes)
      except aot.CompileError as e:
        say(f"{row.name}: {e}; counted from shapes instead")
      else:
        level = f" at JAX_OPTIMIZATION_LEVEL={found['level']}" if found["level"] else ""
        compiling = {name: found[name] for name in ("seconds", "cpu_seconds", "host_bytes")}
        memory = gigabytes(found["host_bytes"])
        source = f"compiled in {found['seconds']:.0f} s with {memory} of memory here{level}"
        sizes, collectives = found.get("bytes", {}), found.get("collectives")
        if row.chip.platform == "tpu":  # a GPU's compiler refuses nothing, and knows no scratch memory
          room = found.get("had", row.device_memory)
        needed = sum(sizes.values()) if sizes else found.get("needed")
        on_host = found.get("on_host", on_host)
        fits = bool(sizes) and needed <= room
    return Plan(
      hardware=row,
      mesh=problem.check_division(asked.cfg.mesh, asked.cfg.train, row),
      sequences=asked.cfg.train.batch_size,
      tokens=asked.tokens,
      steps=asked.cfg.train.steps,
      fits=fits,
      needed=needed,
      memory=row.device_memory,
      room=room,
      bytes=sizes,
      on_host=on_host,
      source=source,
      compiling=compiling,
      work=estimate.work(asked, row, collectives),
      collectives=collectives,
      changes=changes,
    )

  def search(self, row: Hardware) -> Plan:
    """The plan of the run as it is, if it fits; otherwise of the change that costs least and does.

    Raises:
      ConfigError: if nothing that was tried fits.
    """
    try:
      plan: Plan | None = self.plan(row)
    except ConfigError as e:
      plan = None
      say(f"as it is: {e}")
    if plan is not None and plan.fits:
      return plan
    if plan is not None:
      say(f"as it is: {plan.verdict} ({plan.source})")
    tried, smallest = 0, None
    for size, changes in self._candidates(row):
      smallest = size if smallest is None else min(size, smallest)
      if size > ROOM * row.device_memory or tried == TRIES:
        continue
      plan, tried = self.plan(row, changes), tried + 1
      say(f"{' '.join(f'{name}={value}' for name, value in changes.items())}: {plan.verdict} ({plan.source})")
      if plan.fits:
        return plan
    least = "no mesh divides it" if smallest is None else f"the smallest takes {gigabytes(smallest)} a device"
    raise ConfigError(
      f"--hardware: no microbatches, remat or mesh that was tried makes this config fit {row.name},"
      f" {gigabytes(row.device_memory)} a device ({least}); take larger hardware or a smaller batch"
    )

  def _candidates(self, row: Hardware) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields bytes a device, from shapes, and changes of the config, the fastest first.

    What is moved to the host comes last, as no time is counted for moving it.
    """
    found = []
    for changes in _changes(self.asked.cfg, row):
      try:
        asked = self._read(changes)
        size = sum(estimate.bytes_by_kind(asked, row, affine=True).values())
      except ConfigError:
        continue
      seconds, last = estimate.work(asked, row).least, asked.cfg.sleep.remat == "offload"
      found.append((last, seconds, asked.cfg.train.microbatches, len(found), size, changes))
    for *_, size, changes in sorted(found, key=lambda item: item[:4]):
      yield size, changes

  def _read(self, changes: Mapping[str, Any]) -> problem.Problem:
    return problem.read(self._path, self._nested(changes))

  def _nested(self, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The values with changes by dotted key."""
    values = copy.deepcopy(dict(self._values))
    for name, value in changes.items():
      group, _, field = name.partition(".")
      values.setdefault(group, {})[field] = value
    return values


def _changes(cfg: Config, row: Hardware) -> Iterator[dict[str, Any]]:
  """Yields settings of `microbatches`, `remat` and the mesh that divide; what stays as it is is left out."""
  sizes = [m for m in (1, 2, 4, 8) if row.devices % m == 0 and row.devices // m % row.hosts == 0]
  for axis, remat in itertools.product(sizes, estimate.RECOMPUTED):
    data = row.devices // axis
    if cfg.train.batch_size % data:
      continue
    rows = cfg.train.batch_size // data
    for parts in (n for n in range(1, rows + 1) if rows % n == 0):
      wanted = {
        "mesh.data": (data, cfg.mesh.data if cfg.mesh.data != -1 else row.devices // cfg.mesh.model),
        "mesh.model": (axis, cfg.mesh.model),
        "sleep.remat": (remat, cfg.sleep.remat),
        "train.microbatches": (parts, cfg.train.microbatches),
      }
      yield {name: new for name, (new, old) in wanted.items() if new != old}


def _compiler(row: Hardware) -> bool:
  """Whether the step can be compiled for the hardware here."""
  return row.aot is not None and aot.available(row.chip.platform)


def gigabytes(size: float) -> str:
  """`17.18 GB`, `0.003 GB`."""
  return f"{size / 1e9:,.3f} GB" if size < 1e9 else f"{size / 1e9:,.2f} GB"


def say(line: str) -> None:
  """A line about how a plan is made, beside the plan itself on stdout."""
  print(line, file=sys.stderr, flush=True)
