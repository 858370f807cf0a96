"""The table of accelerators: its rows fit together, and what is not in it gets the nearest name."""

import pytest

from sleep_jax.config import ConfigError
from sleep_jax.cost import flops
from sleep_jax.launch import hardware

# name -> chips, hosts, chips a host, devices, machine type: the documentation's own tables, by hand.
DOCUMENTED = {
  "v5e:1x1": (1, 1, 1, 1, "ct5lp-hightpu-1t"),
  "v5e:2x2": (4, 1, 4, 4, "ct5lp-hightpu-4t"),
  "v5e:2x4": (8, 1, 8, 8, "ct5lp-hightpu-8t"),
  "v5e:16x16": (256, 64, 4, 256, "ct5lp-hightpu-4t"),
  "v5p:2x2x1": (4, 1, 4, 4, "ct5p-hightpu-4t"),
  "v5p:2x2x2": (8, 2, 4, 8, "ct5p-hightpu-4t"),
  "v5p:4x4x4": (64, 16, 4, 64, "ct5p-hightpu-4t"),
  "v5p:8x16x16": (2048, 512, 4, 2048, "ct5p-hightpu-4t"),
  "v6e:4x4": (16, 4, 4, 16, "ct6e-standard-4t"),
  "tpu7x:2x2x1": (4, 1, 4, 8, "tpu7x-standard-4t"),
  "tpu7x:4x4x4": (64, 16, 4, 128, "tpu7x-standard-4t"),
  "h100:8": (8, 1, 8, 8, "a3-highgpu-8g"),
  "h200:4x8": (32, 4, 8, 32, "a3-ultragpu-8g"),
  "b200:2x8": (16, 2, 8, 16, "a4-highgpu-8g"),
}
DEVICE_KINDS = {  # as JAX calls them
  "v5e": "TPU v5 lite",
  "v5p": "TPU v5",
  "v6e": "TPU v6 lite",
  "h100": "NVIDIA H100 80GB HBM3",
  "h200": "NVIDIA H200",
}


@pytest.mark.parametrize("name", hardware.names())
def test_every_row_fits_together(name):
  row = hardware.find(name)
  assert row.name == name
  assert row.chips == row.hosts * row.chips_per_host
  assert row.devices == row.hosts * row.devices_per_host == row.chips * row.chip.devices
  assert row.device_memory * row.devices == row.chip.memory * row.chips
  if row.hosts > 1:
    assert row.chips_per_host == (4 if row.chip.platform == "tpu" else 8)
    assert row.machine
  assert (row.aot is None) == (row.chip.name == "b200")


@pytest.mark.parametrize(("name", "said"), DOCUMENTED.items())
def test_rows_are_the_documented_ones(name, said):
  row = hardware.find(name)
  assert (row.chips, row.hosts, row.chips_per_host, row.devices, row.machine) == said


@pytest.mark.parametrize("chip", hardware.CHIPS.values(), ids=lambda chip: chip.name)
def test_every_figure_has_a_source(chip):
  figures = {"memory", "peak", "bandwidth", "link", "watts", "devices", "gke_accelerator", "machines"}
  assert {name for name in figures if getattr(chip, name) is not None} == set(chip.sources)
  assert all(source.startswith("https://") for source in chip.sources.values())


@pytest.mark.parametrize(("chip", "kind"), DEVICE_KINDS.items())
def test_peaks_are_those_that_throughput_is_measured_against(chip, kind):
  assert hardware.CHIPS[chip].peak == flops.peak_flops(kind)


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("v6:4x4", "the nearest chip is v6e"),
    ("v5:2x2", "the nearest chip is v5"),
    ("h300:8", "the nearest chip is h"),
    ("", "there is no ''; the nearest chip is"),
    ("v5p:4x4x5", "v5p has no topology '4x4x5'; the nearest is v5p:4x4x4"),
    ("v6e:3x3", "the nearest is v6e:2x4"),
    ("v5e:32x32", "the nearest is v5e:16x16"),
    ("h200:3x8", "the nearest is h200:"),
    ("v5p:4x4xx", "the nearest is v5p:4x4x"),
    ("v5p:0x4", "the nearest is v5p:"),
    ("v5p:", "v5p has no topology ''; known: 1x1x1,"),
    ("v5p", "v5p needs one, v5p:TOPOLOGY; known: 1x1x1,"),
  ],
)
def test_what_is_unknown_gets_the_nearest_name(name, said):
  with pytest.raises(ConfigError) as caught:
    hardware.find(name)
  assert str(caught.value).startswith("--hardware: ") and said in str(caught.value)
  assert "\n" not in str(caught.value)


def test_names_are_read_in_any_case():
  assert (
    hardware.find(" V5P:4x4x4") is hardware.find(" V5P:4x4x4") and hardware.find("H200:8").name == "h200:8"
  )


@pytest.mark.aot
# To list thousands of devices takes the compiler minutes.
@pytest.mark.parametrize(
  "name", [n for n in hardware.names() if hardware.find(n).aot and hardware.find(n).chips <= 512]
)
def test_the_compiler_knows_every_slice(name):
  from sleep_jax.launch import aot

  row = hardware.find(name)
  if not aot.available(row.chip.platform):
    pytest.skip("needs libtpu, or the CUDA plugin and ptxas (make test-aot)")
  devices = aot.devices(row)
  assert len(devices) == row.devices
  assert devices[0].device_kind == DEVICE_KINDS.get(row.chip.name, "TPU7x")


@pytest.mark.parametrize(("chip", "kind"), DEVICE_KINDS.items())
def test_a_device_is_found_by_its_kind(chip, kind):
  assert hardware.of_device(kind) is hardware.CHIPS[chip]


@pytest.mark.parametrize("kind", ["cpu", "", "NVIDIA H100 PCIe", "NVIDIA H200 MIG 1g.18gb", "TPU v4", "h200"])
def test_figures_of_another_device_are_absent(kind):
  assert hardware.of_device(kind) is None
