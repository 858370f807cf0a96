"""The GPU check without a GPU: it says so; what it computes and writes, on small shapes and the CPU."""

import csv

import numpy as np
import pytest

from sleep_jax.kernels.measure import bench, gpu_check
from sleep_jax.kernels.measure.gpu_check import PEER, Error, Time

SMALL = (2, 9, 2, 16, 8)


def test_without_a_hopper_gpu_one_line_and_code_2(capsys):
  assert gpu_check.main([]) == 2
  printed = capsys.readouterr()
  assert printed.err.startswith("gpu_check: ") and printed.err.count("\n") == 1 and not printed.out
  assert "needs" in printed.err


@pytest.mark.parametrize("option", ["--shapes=R,Q", "--rounds=0"])
def test_a_wrong_option_is_refused(option, capsys):
  with pytest.raises(SystemExit) as stopped:
    gpu_check.main([option])
  assert stopped.value.code == 2 and option.split("=")[0] in capsys.readouterr().err


def test_errors_are_those_of_bfloat16(monkeypatch):
  """The XLA form rounds o and the gradients of q, k, v to bfloat16 and nothing else."""
  monkeypatch.setitem(gpu_check.SHAPES, "R", SMALL)
  rows = gpu_check.errors(["R"], ["xla"])
  assert [(e.shape, e.decay, e.name) for e in rows] == [("R", "weak", "xla"), ("R", "strong", "xla")]
  for e in rows:
    assert 1e-4 < e.o < 5e-3 and 1e-4 < e.dv < 5e-3
    assert max(e.S, e.dg, e.db, e.dS) < 1e-5
    assert e.worst() <= gpu_check.TOLERANCE


def test_nan_is_an_error():
  assert not Error("R", "weak", "xla", *[0.0] * 7, np.nan).worst() <= gpu_check.TOLERANCE


def test_times_are_of_one_call_and_one_token_head(monkeypatch):
  monkeypatch.setitem(gpu_check.SHAPES, "R", SMALL)
  monkeypatch.setattr(gpu_check, "SPAN", 0.5)
  inputs, cotangents = gpu_check.make_inputs(SMALL, 1.0)
  (row,) = gpu_check.race("R", "grad", [gpu_check.jax_contestant("xla", "grad", inputs, cotangents)], 3)
  assert (row.name, row.mode, row.rounds) == ("xla", "grad", 3)
  assert 0 < row.min_ms <= row.median_ms
  assert row.ns == pytest.approx(1e6 * row.median_ms / (2 * 9 * 2))


def a_time(shape, mode, name, ns):
  return Time(shape, mode, name, 5, 10, 2.0, 1.0, ns)


def test_goals_compare_with_the_peer_and_with_the_numbers_asked_for():
  times = [a_time("L", "forward", "pallas_gpu", 0.9), a_time("L", "forward", PEER, 1.8)]
  times += [a_time("L", "grad", "pallas_gpu", 4.5), a_time("L", "grad", PEER, 7.2)]
  times += [a_time("R", "grad", "xla", 3.0), a_time("R", "grad", PEER, 1.2)]
  lines = gpu_check.goals(times)
  assert "* L forward, at most 1.0 ns a token-head: 0.90 ns, met" in lines
  assert "* L grad, at most 4.0 ns a token-head: 4.50 ns, missed" in lines
  assert f"* L forward, pallas_gpu at least 1.8 times as fast as {PEER}: 2.00 times, met" in lines
  assert f"* L grad, pallas_gpu at least 1.8 times as fast as {PEER}: 1.60 times, missed" in lines
  assert f"* R grad, xla at least 0.5 times as fast as {PEER}: 0.40 times, missed" in lines
  assert f"* D forward, pallas_gpu at least 2.0 times as fast as {PEER}: not measured" in lines
  assert len(lines) == 2 + 2 * 3 * len(bench.MODES)


def test_writes_what_it_measured(tmp_path):
  found = [Error("R", "weak", "pallas_gpu", *np.arange(1, 9) / 1000)]
  times = [a_time("L", "forward", "pallas_gpu", 0.9)]
  text = gpu_check.markdown(found, times, {"device": "a made-up one"})
  gpu_check.write(tmp_path / "deep" / "gpu", found, times, text)
  table = (tmp_path / "deep" / "gpu.md").read_text(encoding="utf-8")
  assert "| R | weak | pallas_gpu | 1e-03 |" in table
  assert "| L | forward | pallas_gpu | 2.000 | 1.000 | 0.90 | 5 | 10 |" in table
  assert "0.90 ns, met" in table
  with open(tmp_path / "deep" / "gpu_errors.csv", newline="", encoding="utf-8") as file:
    (row,) = csv.DictReader(file)
  assert float(row["dS"]) == 0.008 and row["decay"] == "weak"
  with open(tmp_path / "deep" / "gpu_times.csv", newline="", encoding="utf-8") as file:
    (row,) = csv.DictReader(file)
  assert float(row["ns"]) == 0.9 and row["calls"] == "10"


def test_nothing_is_timed_where_something_is_wrong(monkeypatch, capsys):
  wrong = Error("R", "weak", "pallas_gpu", *[0.0] * 7, 0.5)
  monkeypatch.setattr(gpu_check, "missing", lambda: None)
  monkeypatch.setattr(gpu_check, "errors", lambda shapes: [wrong])
  assert gpu_check.main(["--shapes=R"]) == 1
  printed = capsys.readouterr()
  assert "nothing was timed" in printed.err and "ns a token-head" not in printed.out
