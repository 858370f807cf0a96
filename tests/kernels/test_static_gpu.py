"""What is read out of the compilers' dumps, and what counts as worse than the committed table."""

import csv
import dataclasses

import pytest

from sleep_jax.kernels.measure import static_gpu
from sleep_jax.kernels.measure.static_gpu import Kernel, Memory

REPORT = """ptxas info    : Compiling entry function 'kernel_mosaic_gpu_kernel' for 'sm_90a'
    0 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 144 registers, used 2 barriers, 1 bytes smem
"""
WALK = Kernel("walk", 64, "sm_90a", 200, 0, 90000)


def test_reads_a_report_of_ptxas():
  assert static_gpu.read_ptxas(REPORT) == ("sm_90a", 144, 32)
  with pytest.raises(ValueError, match="not a report"):
    static_gpu.read_ptxas(REPORT.replace("registers", "things"))


def test_pairs_the_dumps_of_a_kernel_by_name(tmp_path):
  """Each kind of dump has a count of its own."""
  for name, registers, shared, i in (("walk", 144, 9, 0), ("walk", 144, 9, 3), ("walk_keep", 77, 10, 1)):
    (tmp_path / f"{name}_{i}.ptxas").write_text(REPORT.replace("144", str(registers)))
    (tmp_path / f"{name}_{i + 2}.resources.txt").write_text(f"Resources(smem_scratch_bytes={shared}, x=1)")
  want = [Kernel("walk", 64, "sm_90a", 144, 32, 9), Kernel("walk_keep", 64, "sm_90a", 77, 32, 10)]
  assert static_gpu.read_dumps(tmp_path, 64) == want


@pytest.mark.parametrize(
  "change,said",
  [
    ({"registers": 220}, None),
    ({"registers": 221}, "registers 200 -> 221"),
    ({"shared": 99001}, "shared 90000 -> 99001"),
    ({"spills": 8}, "spills 8 bytes"),
    ({"K": 128}, "not in the table"),
  ],
)
def test_a_tenth_more_or_a_spill_is_a_regression(change, said):
  lines = static_gpu.regressions([dataclasses.replace(WALK, **change)], [WALK])
  assert (not lines) if said is None else any(said in line for line in lines)


def test_a_kernel_that_is_gone_is_a_regression():
  assert static_gpu.regressions([], [WALK]) == ["walk K=64: in the table, but not compiled"]


def test_the_committed_table_is_a_budget_without_spills():
  kernels = static_gpu.budget()
  assert {k.K for k in kernels} == set(static_gpu.pallas_gpu.WIDTHS)
  assert not static_gpu.regressions(kernels, kernels)


def test_writes_both_tables(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(static_gpu, "measure", lambda: ([WALK], [Memory("R", "grad", "xla", 12.5)]))
  assert static_gpu.main([f"--out={tmp_path / 'deep' / 'gpu'}"]) == 0
  text = (tmp_path / "deep" / "gpu.md").read_text(encoding="utf-8")
  assert "| walk | 64 | sm_90a | 200 | 0 | 90000 |" in text and "| R | grad | xla | 12.5 |" in text
  assert text.strip() == capsys.readouterr().out.strip()
  assert static_gpu.budget(tmp_path / "deep" / "gpu") == [WALK]
  with open(tmp_path / "deep" / "gpu_memory.csv", newline="", encoding="utf-8") as file:
    assert [float(row["temp_mb"]) for row in csv.DictReader(file)] == [12.5]


def test_without_the_compilers_one_line_and_code_2(monkeypatch, capsys):
  monkeypatch.setattr(static_gpu.sys, "path", [])
  assert static_gpu.main([]) == 2
  printed = capsys.readouterr()
  assert printed.err.startswith("static_gpu: needs the CUDA plugin") and printed.err.count("\n") == 1
