"""Which seeds have taken off, by when: of made-up runs whose answer is known by hand."""

import csv

import pytest

from sleep_jax.report import takeoff
from tests.report import fake_runs


@pytest.fixture
def runs(tmp_path):
  """Seeds of setting `a` take off at 100, 300 and never; of `b` at 400, and one has come to step 200 only."""
  steps = (100, 200, 300, 400)
  exact = {
    "a_n2_s0": (0.85, 0.5, 0.9, 0.95),  # that it fell back for a while does not count
    "a_n2_s1": (0.3, 0.4, 0.8, 0.9),
    "a_n2_s2": (0.3, 0.4, 0.5, 0.79),
    "b_n2_s0": (0.3, 0.3, 0.3, 0.99),
    "b_n2_s1": (0.3, 0.3),
  }
  for name, values in exact.items():
    points = list(zip(steps, values, strict=False))
    fake_runs.write(tmp_path / name, 2, points, seed=int(name[-1]), steps=400)
  return fake_runs.read(str(tmp_path / "*"))


def test_counts_by_hand(runs):
  a, b = takeoff.rows_of(takeoff.starts(runs, 0.8))
  assert (a["setting"], a["num_passes"], a["seeds"], a["steps"]) == ("a", 2, 3, 400)
  assert [a[f"off_{s}"] for s in ("0.25", "0.5", "0.75", "1")] == [1, 1, 2, 2]
  assert [a[f"of_{s}"] for s in ("0.25", "0.5", "0.75", "1")] == [3, 3, 3, 3]
  assert a["median_step"] == 200
  assert a["median_cpu_s"] == pytest.approx(200 * fake_runs.CPU_S_PER_STEP[2])
  assert a["exact"] == [0.95, 0.9, 0.79]
  # A run that is only half done says nothing of what comes later.
  assert [b[f"off_{s}"] for s in ("0.25", "0.5", "0.75", "1")] == [0, 0, 0, 1]
  assert [b[f"of_{s}"] for s in ("0.25", "0.5", "0.75", "1")] == [2, 2, 1, 1]
  # Wilson's interval for 2 of 3, from a table.
  assert (a["low_1"], a["high_1"]) == pytest.approx((0.2077, 0.9385), abs=1e-4)


def test_the_threshold_decides(runs):
  a, _ = takeoff.rows_of(takeoff.starts(runs, 0.79))
  assert a["off_1"] == 3
  a, b = takeoff.rows_of(takeoff.starts(runs, 0.96))
  assert (a["off_1"], a["median_step"], b["off_1"]) == (0, None, 1)


def test_the_demos_runs_are_the_plain_setting(tmp_path):
  fake_runs.write(tmp_path / "n4_s3", 4, [(100, 0.9)], seed=3, steps=100)
  (start,) = takeoff.starts(fake_runs.read(tmp_path / "n4_s3"), 0.8)
  assert (start.setting, start.num_passes, start.seed, start.step) == ("plain", 4, 3, 100)


def test_table_and_figure_say_the_same(runs, tmp_path):
  found = takeoff.starts(runs, 0.8)
  rows = takeoff.rows_of(found)
  text = takeoff.table(rows, 0.8)
  assert "| a | 2 | 400 | 1 of 3 | 1 of 3 | 2 of 3 | 2 of 3 | 21-94 % | 200 | 28 | 95.0, 90.0, 79.0 |" in text
  drawing = takeoff.figure(found)
  drawing.save(tmp_path / "out")
  with open(tmp_path / "out" / "takeoff.csv", newline="") as file:
    drawn = list(csv.DictReader(file))
  ends = {row["setting"]: float(row["off_percent"]) for row in drawn}
  assert ends == {"a": pytest.approx(200 / 3), "b": 100}  # of `b` one run has ended
  assert {row["seeds"] for row in drawn if row["setting"] == "b"} == {"1"}


def test_the_legend_names_the_settings_of_every_panel(tmp_path):
  """Also one that was not run with the largest N, beside whose panel the legend stands."""
  for name, n in (("few_n1_s0", 1), ("both_n1_s0", 1), ("both_n4_s0", 4)):
    fake_runs.write(tmp_path / name, n, [(100, 0.9)], seed=0, steps=100)
  found = takeoff.starts(fake_runs.read(tmp_path / "*"), 0.8)
  legend = takeoff.figure(found).figure.axes[-1].get_legend()
  assert sorted(text.get_text() for text in legend.get_texts()) == ["both", "few"]
