"""The accelerators that runs are planned and launched on: one table, every figure with its source.

A name is `CHIP:TOPOLOGY`: of a TPU the slice as Google Cloud writes it (`v5p:4x4x4`), of a GPU the number of
GPUs of one node (`h200:8`), or nodes x GPUs (`h200:4x8`). What no source says is absent (None).
"""

import dataclasses
import difflib
import functools
import math

from sleep_jax.config import ConfigError, shown

GB, GIB = 10**9, 2**30
DOCS = "https://docs.cloud.google.com/"
# Labels, machine types and chips a machine; TPU pages of Google Cloud give HBM in GiB or call it GB.
GKE_PLAN = "https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus"
TOOLKIT = "https://github.com/GoogleCloudPlatform/cluster-toolkit/blob/main/examples/"
NVIDIA = "https://www.nvidia.com/en-us/data-center/"


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of accelerator.

  Attributes:
    name: as it is asked for.
    platform: `tpu` or `gpu`.
    memory: bytes of HBM a chip.
    peak: dense bfloat16 FLOP/s a chip.
    bandwidth: bytes/s between a chip and its HBM.
    link: bytes/s between a chip and its peers in the slice or node, both directions.
    watts: of a chip at most. None: not said.
    devices: JAX devices a chip.
    gke_accelerator: value of GKE's node label.
    machines: machine type by the chips that it has. Slices of several machines take those with 4 chips.
    sources: field -> where its figure is from.
  """

  name: str
  platform: str
  memory: int
  peak: float
  bandwidth: float
  link: float
  watts: float | None
  devices: int
  gke_accelerator: str
  machines: dict[int, str]
  sources: dict[str, str]


def _tpu(name: str, page: str, label_page: str = GKE_PLAN, **figures) -> Chip:
  """A chip whose figures are all on one page of the TPU's documentation, and its machines on another."""
  said = ("memory", "peak", "bandwidth", "link", "devices")
  sources = dict.fromkeys(said, DOCS + page) | {"gke_accelerator": label_page, "machines": label_page}
  return Chip(name, "tpu", watts=None, sources=sources, **({"devices": 1} | figures))


def _gpu(name: str, page: str, label_page: str, **figures) -> Chip:
  """Likewise of a GPU; the data sheets count two directions of NVLink and, in FLOP/s, sparsity (halved)."""
  said = ("memory", "peak", "bandwidth", "link", "watts", "devices")
  sources = dict.fromkeys(said, NVIDIA + page) | {"gke_accelerator": label_page, "machines": label_page}
  return Chip(name, "gpu", devices=1, sources=sources, **figures)


CHIPS = {
  chip.name: chip
  for chip in (
    _tpu(
      "v5e",
      "tpu/docs/v5e",
      memory=16 * GIB,
      peak=197e12,
      bandwidth=819e9,
      link=400e9,
      gke_accelerator="tpu-v5-lite-podslice",
      machines={1: "ct5lp-hightpu-1t", 4: "ct5lp-hightpu-4t", 8: "ct5lp-hightpu-8t"},
    ),
    _tpu(
      "v5p",
      "tpu/docs/v5p",
      memory=95 * GIB,
      peak=459e12,
      bandwidth=2765e9,
      link=1200e9,
      gke_accelerator="tpu-v5p-slice",
      machines={4: "ct5p-hightpu-4t"},
    ),
    _tpu(
      "v6e",
      "tpu/docs/v6e",
      memory=32 * GIB,
      peak=918e12,
      bandwidth=1638e9,
      link=800e9,
      gke_accelerator="tpu-v6e-slice",
      machines={1: "ct6e-standard-1t", 4: "ct6e-standard-4t", 8: "ct6e-standard-8t"},
    ),
    _tpu(
      "tpu7x",
      "tpu/docs/tpu7x",
      TOOLKIT + "gke-tpu-7x/gke-tpu-7x-job.yaml",
      memory=192 * GIB,
      peak=2307e12,
      bandwidth=7380e9,
      link=1200e9,
      devices=2,
      gke_accelerator="tpu7x",
      machines={4: "tpu7x-standard-4t"},
    ),
    _gpu(
      "h100",
      "h100/",
      DOCS + "compute/docs/gpus",
      memory=80 * GB,
      peak=989e12,
      bandwidth=3350e9,
      link=900e9,
      watts=700,
      gke_accelerator="nvidia-h100-80gb",
      machines={8: "a3-highgpu-8g"},
    ),
    _gpu(
      "h200",
      "h200/",
      DOCS + "compute/docs/gpus",
      memory=141 * GB,
      peak=989e12,
      bandwidth=4800e9,
      link=900e9,
      watts=700,
      gke_accelerator="nvidia-h200-141gb",
      machines={8: "a3-ultragpu-8g"},
    ),
    _gpu(
      "b200",
      "dgx-b200/",
      DOCS + "compute/docs/gpus",
      memory=180 * GB,
      peak=2250e12,
      bandwidth=8000e9,
      link=1800e9,
      watts=1000,
      gke_accelerator="nvidia-b200",
      machines={8: "a4-highgpu-8g"},
    ),
  )
}

HOPPER = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}  # and `device_kind`

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
NODES = ("1", "8", "2x8", "4x8", "8x8", "16x8", "32x8")
# One chip of a v5p, and one GPU of a node, can be planned for; Google Cloud has no machine with so few.
TOPOLOGIES = {
  "v5e": FLAT,
  "v5p": ("1x1x1", *CUBES),
  "v6e": FLAT,
  "tpu7x": CUBES,
  "h100": NODES,
  "h200": NODES,
  "b200": NODES,
}


@dataclasses.dataclass(frozen=True)
class Hardware:
  """A slice of a TPU pod, or nodes of GPUs.

  Attributes:
    chip: what it is made of.
    topology: its arrangement, as in its name.
    chips: in all.
    hosts: machines, each of which runs one process.
  """

  chip: Chip
  topology: str
  chips: int
  hosts: int

  @property
  def name(self) -> str:
    """CHIP:TOPOLOGY."""
    return f"{self.chip.name}:{self.topology}"

  @property
  def chips_per_host(self) -> int:
    return self.chips // self.hosts

  @property
  def devices(self) -> int:
    """JAX devices in all."""
    return self.chips * self.chip.devices

  @property
  def devices_per_host(self) -> int:
    return self.devices // self.hosts

  @property
  def device_memory(self) -> int:
    """Bytes of HBM a JAX device."""
    return self.chip.memory // self.chip.devices

  @property
  def machine(self) -> str | None:
    """The machine type of its hosts in Google Cloud; None: it has none with so many chips."""
    return self.chip.machines.get(self.chips_per_host)

  @property
  def aot(self) -> str | None:
    """Name of the topology for JAX's compiler without a device; None: the compiler does not know the chip."""
    if self.chip.platform == "tpu":
      return self.name
    return f"1x{self.hosts}x{self.chips_per_host}" if self.chip.name in HOPPER else None


def names() -> list[str]:
  """Every row of the table, `CHIP:TOPOLOGY`."""
  return [f"{chip}:{topology}" for chip, known in TOPOLOGIES.items() for topology in known]


@functools.cache
def find(name: str) -> Hardware:
  """A row of the table.

  Args:
    name: `CHIP:TOPOLOGY`, in upper or lower case.

  Raises:
    ConfigError: for an unknown chip or topology, naming the nearest one.
  """
  wanted, colon, topology = name.strip().lower().partition(":")
  if wanted not in CHIPS:
    (near,) = difflib.get_close_matches(wanted, CHIPS, 1, 0.0)
    raise ConfigError(
      f"--hardware: there is no {shown(name)}; the nearest chip is {near}; known: {', '.join(CHIPS)}"
    )
  chip, known = CHIPS[wanted], TOPOLOGIES[wanted]
  if topology not in known:
    what = (
      f"{wanted} has no topology {shown(topology)}" if colon else f"{wanted} needs one, {wanted}:TOPOLOGY"
    )
    near = f"; the nearest is {wanted}:{_nearest_topology(topology, known)}" if topology else ""
    raise ConfigError(f"--hardware: {what}{near}; known: {', '.join(known)}")
  chips = _size(topology)
  if chip.platform == "gpu":
    hosts = chips // 8 or 1
  else:  # one machine if there is one of this size, else machines with 4 chips
    hosts = 1 if chips in chip.machines else max(chips // 4, 1)
  return Hardware(chip, topology, chips, hosts)


def _size(topology: str) -> int:
  return math.prod(map(int, topology.split("x")))


def _nearest_topology(topology: str, known: tuple[str, ...]) -> str:
  """The known one with the nearest number of chips; of text that is no topology the most alike."""
  parts = topology.split("x")
  if all(part.isdecimal() and 0 < int(part) < 10**6 for part in parts):
    return min(known, key=lambda other: abs(math.log(_size(other) / _size(topology))))
  return difflib.get_close_matches(topology, known, 1, 0.0)[0]


_KINDS = {  # `jax.Device.device_kind` -> the chip, of whose JAX devices it is one
  "TPU v5 lite": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6 lite": "v6e",
  **{kind: chip for chip, kind in HOPPER.items()},
  "NVIDIA B200": "b200",
}


def of_device(kind: str) -> Chip | None:
  """The chip that a device of JAX is; None if no row of the table is exactly that one.

  Args:
    kind: its `device_kind`. Other models of a chip (a PCIe card, a slice of one) have other figures.
  """
  return CHIPS.get(_KINDS.get(kind, ""))
