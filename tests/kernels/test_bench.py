"""The benchmark: what it writes can be read, it measures what it says, and a mistyped name is refused."""

import csv
import functools

import jax
import numpy as np
import pytest
from matplotlib.image import imread

from sleep_jax.kernels.common import dispatch
from sleep_jax.kernels.measure import bench, chart, peers, shapes


def test_writes_one_row_per_contestant_with_its_error(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(bench.SHAPES, "E", (2, 5, 1, 4, 3))
  bench.main(
    [
      "--shapes=E",
      "--rule=kda",
      "--impl=xla,reference,pallas_gpu",
      "--rounds=2",
      f"--out={tmp_path / 'deep' / 'table'}",
    ]
  )
  with open(tmp_path / "deep" / "table.csv", newline="", encoding="utf-8") as file:
    rows = list(csv.DictReader(file))
  assert [(r["mode"], r["name"]) for r in rows] == [
    ("forward", "xla"),
    ("forward", "reference"),
    ("grad", "xla"),
    ("grad", "reference"),
  ]
  for r in rows:
    assert 0 < float(r["wall_min"]) <= float(r["wall_median"]) and int(r["rounds"]) == 2
    assert 0 < float(r["error"]) < 1e-5
  table = (tmp_path / "deep" / "table.md").read_text(encoding="utf-8")
  assert table.count("\n| kda | E |") == 4 and "\n* GLIBC_TUNABLES: " in table
  said = capsys.readouterr()
  assert said.out.count("\n| kda | E |") == 4
  assert "kda: without pallas_gpu: kda: 'pallas_gpu' runs on gpu, not on cpu" in said.err
  assert imread(tmp_path / "deep" / "table.png").std() > 0  # bars, not a blank page


def test_a_chart_needs_the_benchmarks_table(tmp_path, capsys):
  (tmp_path / "other.csv").write_text("rule,shape\n")
  with pytest.raises(SystemExit) as stopped:
    chart.main([str(tmp_path / "other.csv")])
  assert stopped.value.code == 2 and "needs the CSV of kernels.bench" in capsys.readouterr().err


def test_who_needs_too_much_memory_is_left_out(monkeypatch, capsys):
  monkeypatch.setitem(bench.SHAPES, "E", (2, 5, 1, 4, 3))
  rows = bench.race("delta", "E", "forward", ["reference"], rounds=1, seconds=1.0, max_gb=-1.0)
  assert rows == [] and "delta: without reference: it needs" in capsys.readouterr().err


def test_half_precision_is_judged_by_what_it_was_given(monkeypatch):
  """The error in bfloat16 is that of rounding the output, 2^-9; the rounding of the inputs is not counted."""
  monkeypatch.setitem(bench.SHAPES, "E", (2, 1, 1, 4, 3))
  (row,) = bench.race("delta", "E", "forward", ["xla"], rounds=1, seconds=1.0, dtype="bfloat16")
  assert 1e-5 < row.error <= 2.0**-8


@pytest.mark.parametrize("rule", shapes.RULES)
def test_inputs_are_what_the_rule_takes(rule):
  named, cotangents = shapes.make_inputs(rule, (2, 5, 3, 4, 6), decay=20.0)
  o, S = jax.eval_shape(functools.partial(dispatch.call, shapes.RULES[rule]), *named.values())
  assert [x.shape for x in cotangents] == [o.shape, S.shape]
  assert all(x.dtype == np.float32 for x in named.values())
  np.testing.assert_allclose(np.linalg.norm(named["k"], axis=-1), 1, rtol=1e-5)
  if "g" in named:
    assert np.all(named["g"] <= 0) and 10 < -np.mean(named["g"]) < 30


@pytest.mark.peers
@pytest.mark.parametrize("rule", peers.TRANSFORMERS)
@pytest.mark.parametrize("mode", bench.MODES)
def test_the_peers_compute_the_same(rule, mode, monkeypatch):
  """Scales, layouts and the order of gradients are translated rightly."""
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  monkeypatch.setitem(bench.SHAPES, "E", (2, 9, 2, 4, 3))
  rows = bench.race(rule, "E", mode, peers.NAMES, rounds=1, seconds=1.0)
  assert len(rows) == 3 and all(r.error < 1e-5 for r in rows)


@pytest.mark.parametrize("option", ["--shapes=Q", "--impl=numpy", "--rule=mamba", "--mode=backward"])
def test_a_wrong_name_is_refused(option, capsys):
  with pytest.raises(SystemExit) as stopped:
    bench.main([option])
  assert stopped.value.code == 2 and "is none of" in capsys.readouterr().err
