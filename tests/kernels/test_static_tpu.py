"""The reader of the TPU compiler's numbers, on texts as that compiler writes them."""

import importlib.util
import json
import os
import re

import pytest

from sleep_jax.kernels.measure import processes, static_tpu

HLO = """
HloModule jit_f

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion.1 = f32[8]{0} fusion(%a), kind=kLoop, calls=%fused.1, backend_config={"estimated_cycles":"100"}
  %while.2 = (s32[], f32[8]) while(%t), condition=%inner_condition, body=%inner_body
}

%inner_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion.2 = f32[8]{0} fusion(%a), kind=kLoop, calls=%fused.1, backend_config={"estimated_cycles":"7"}
}

%inner_condition (p: (s32[], f32[8])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(5)
  ROOT %lt.1 = pred[] compare(%i, %constant.3), direction=LT
}

%condition.1 (p: (s32[], f32[8])) -> pred[] {
  %constant.4 = s32[]{:T(128)} constant(32), metadata={}
  ROOT %lt.2 = pred[] compare(%i, %constant.4), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %fusion.3 = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused.1, backend_config={"estimated_cycles":"1000"}
  %while.1 = (s32[], f32[8]) while(%t), condition=%condition.1, body=%body.1
}
"""


def test_estimated_cycles_multiplies_loops_out():
  assert static_tpu.estimated_cycles(HLO) == 1000 + 32 * (100 + 5 * 7)


def test_a_loop_without_a_trip_count_is_an_error():
  with pytest.raises(RuntimeError, match="no trip count in the loop condition %inner_condition"):
    static_tpu.estimated_cycles(HLO.replace("constant(5)", "parameter(0)"))


def test_read_dump(tmp_path):
  schedule = "Schedule analysis:\n\ttotal scheduled bundles:    3\n\tempty scheduled bundles:    1\n"
  use = "== CAPACTIY:\nMXU, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU\n 4 3 3 1 1 2\n== UTILIZATION:\n"
  (tmp_path / "17-k.1-71-schedule-analysis_final_bundles.txt").write_text(schedule)
  path = tmp_path / "17-k.1-70-final_hlo-static-per-bundle-utilization.txt"
  path.write_text(use + "1 2 2 1 1 0\n0 3 1 0 0 0\n0 0 0 1 1 2\n")
  assert static_tpu.read_dump(tmp_path, "k") == (3, 2, 3)
  with pytest.raises(RuntimeError, match="0 files schedule-analysis_final_bundles of other"):
    static_tpu.read_dump(tmp_path, "other")


def test_over_budget():
  row = static_tpu.Row("v5e", "128/256", "backward", 11.5, 900, 0.05, 0.1, 0.0)
  budget = {"cycles": 10.0, "spill_stores": 0.049}
  assert static_tpu.over_budget([row], {row.key: budget}) == [
    "v5e 128/256 backward: cycles is 11.5, budget 10"
  ]
  assert static_tpu.over_budget([row], {row.key: budget | {"cycles": 10.5}}) == []


def test_every_kernel_has_a_budget():
  """Of a compiler that requirements/aot.txt names."""
  budgets = json.loads(static_tpu.BUDGETS.read_text(encoding="utf-8"))
  pinned = static_tpu.BUDGETS.parents[2] / "requirements" / "aot.txt"
  versions = re.findall(r"^libtpu==([\d.]+)", pinned.read_text(encoding="utf-8"), re.M)
  assert budgets and set(budgets) <= set(versions)
  for version, found in budgets.items():
    assert {f"v5e 128/256 {kernel}" for kernel in static_tpu.KERNELS} <= set(found), version


def test_without_libtpu(monkeypatch, capsys):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert static_tpu.main([]) == 2
  assert capsys.readouterr().err == f"static_tpu: {static_tpu.NO_LIBTPU}\n"


def test_a_child_process_is_found_from_any_folder(tmp_path, monkeypatch):
  """By the name that is installed, whatever lies in the folder that the command was called in."""
  (tmp_path / "sleep_jax.py").write_text("raise ImportError('another one')")
  monkeypatch.chdir(tmp_path)
  done = processes.run_module(static_tpu.MODULE, "--help", environment=os.environ)
  assert done.returncode == 0 and "--write-budgets" in done.stdout, done.stderr
