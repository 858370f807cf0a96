"""The benchmark: what it writes can be read, it measures what it says, and a mistyped name is refused."""

import csv

import pytest

from kernels import bench


def test_writes_one_row_per_contestant_with_its_error(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(bench.SHAPES, "E", (2, 5, 1, 4, 3))
  bench.main(["--shapes=E", "--impl=xla,reference", "--rounds=2", f"--out={tmp_path / 'deep' / 'table'}"])
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
  assert table.count("\n| E |") == 4
  assert capsys.readouterr().out.count("\n| E |") == 4


@pytest.mark.peers
@pytest.mark.parametrize("mode", bench.MODES)
def test_the_peers_compute_the_same(mode, monkeypatch):
  """Scales, layouts and the order of gradients are translated rightly."""
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  monkeypatch.setitem(bench.SHAPES, "E", (2, 9, 2, 4, 3))
  rows = bench.race("E", mode, bench.PEERS, rounds=1, seconds=1.0, decay=1.0)
  assert len(rows) == 3 and all(r.error < 1e-5 for r in rows)


@pytest.mark.parametrize("option", ["--shapes=Q", "--impl=numpy", "--mode=backward"])
def test_a_wrong_name_is_refused(option, capsys):
  with pytest.raises(SystemExit) as stopped:
    bench.main([option])
  assert stopped.value.code == 2 and "is none of" in capsys.readouterr().err
