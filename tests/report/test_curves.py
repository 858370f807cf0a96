"""What makes runs one curve, what is averaged, and what the intervals are."""

import json
import math

import numpy as np
import pytest
import scipy.stats

from sleep_jax.report import curves, intervals
from tests.report import fake_runs

ONE, TWO, FOUR = [(100, 0.28), (200, 0.32)], [(100, 0.33), (200, 0.52)], [(100, 0.40), (200, 0.59)]


@pytest.mark.parametrize("freedom", [*range(1, 41), 60, 100, 1000])
def test_quantiles_are_student_s(freedom):
  assert intervals.quantile(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=2e-3)


@pytest.mark.parametrize("count", [2, 3, 5, 30])
def test_the_interval_of_a_mean_is_student_s(count):
  values = np.random.default_rng(count).normal(50, 4, count)
  want = scipy.stats.t.interval(0.95, count - 1, loc=values.mean(), scale=scipy.stats.sem(values))
  assert intervals.of_mean(list(values)) == pytest.approx(want, rel=1e-3)


def test_an_interval_covers_the_true_mean_nineteen_times_in_twenty():
  rng = np.random.default_rng(0)
  ends = np.array([intervals.of_mean(list(rng.normal(3.0, 2.0, 5))) for _ in range(4000)])
  covered = np.mean((ends[:, 0] < 3.0) & (3.0 < ends[:, 1]))
  assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_an_interval_stays_in_its_range_and_one_value_has_none():
  assert intervals.of_mean([10.0, 90.0], 0.0, 100.0) == (0.0, 100.0)
  assert all(map(math.isnan, intervals.of_mean([5.0])))
  with pytest.raises(ValueError, match="at least one degree"):
    intervals.quantile(0)


def test_one_seed_has_the_interval_of_its_held_out_set(tmp_path):
  fake_runs.write(tmp_path / "a", 1, ONE, per_eval={"low": 0.2, "high": 0.5})
  (curve,) = curves.curves(fake_runs.read(tmp_path / "a"))
  assert (curve.low, curve.high) == (pytest.approx((20.0, 20.0)), pytest.approx((50.0, 50.0)))
  fake_runs.write(tmp_path / "old", 1, ONE, per_eval={"low": None, "high": None})
  (curve,) = curves.curves(fake_runs.read(tmp_path / "old"))
  assert not curve.has_interval and curve.mean == pytest.approx((28.0, 32.0))


def test_several_seeds_have_the_interval_of_their_mean(tmp_path):
  for seed, shift in enumerate((0.0, 0.03, 0.09)):
    fake_runs.write(tmp_path / f"s{seed}", 2, [(step, exact + shift) for step, exact in TWO], seed=seed)
  (curve,) = curves.curves(fake_runs.read(tmp_path / "*"))
  assert curve.mean == pytest.approx((37.0, 56.0))
  reach = scipy.stats.t.ppf(0.975, 2) * np.std([0, 3, 9], ddof=1) / np.sqrt(3)
  assert curve.low == pytest.approx((37.0 - reach, 56.0 - reach), rel=1e-3)
  assert curve.high == pytest.approx((37.0 + reach, 56.0 + reach), rel=1e-3)
  assert [values[1] for values in curve.seeds] == pytest.approx([52.0, 55.0, 61.0])


def test_a_mean_is_drawn_only_where_every_seed_was_evaluated(tmp_path):
  fake_runs.write(tmp_path / "s0", 2, [(100, 0.3), (200, 0.5), (300, 0.7)], seed=0)
  fake_runs.write(tmp_path / "s1", 2, [(100, 0.4), (300, 0.9), (400, 0.95)], seed=1)
  (curve,) = curves.curves(fake_runs.read(tmp_path / "*"))
  assert curve.x == (100 * fake_runs.TOKENS_PER_STEP, 300 * fake_runs.TOKENS_PER_STEP)
  assert curve.mean == pytest.approx((35.0, 80.0))


def test_against_compute_the_same_points_stand_at_the_mean_of_their_cpu_seconds(tmp_path):
  fake_runs.write(tmp_path / "s0", 2, TWO, seed=0, per_eval={"cpu_s": 10.0})
  fake_runs.write(tmp_path / "s1", 2, TWO, seed=1, per_eval={"cpu_s": 30.0})
  (curve,) = curves.curves(fake_runs.read(tmp_path / "*"), "cpu_s")
  assert curve.x == (20.0, 20.0)
  assert curve.mean == pytest.approx([100 * exact for _, exact in TWO])


def test_seeds_without_a_common_evaluation_are_a_curve_each(tmp_path):
  fake_runs.write(tmp_path / "s0", 2, [(100, 0.3)], seed=0)
  fake_runs.write(tmp_path / "s1", 2, [(150, 0.4)], seed=1)
  drawn = curves.curves(fake_runs.read(tmp_path / "*"))
  assert [curve.label for curve in drawn] == ["N = 2, seed 0", "N = 2, seed 1"]


def test_rows_without_a_number_are_no_points(tmp_path):
  missing = fake_runs.evaluation(300, 0.5, 1)
  del missing["exact"]
  extra = [missing, fake_runs.evaluation(400, 0.5, 1) | {"exact": "NaN"}]
  fake_runs.write(tmp_path / "a", 1, ONE, extra=extra)
  (curve,) = curves.curves(fake_runs.read(tmp_path / "a"))
  assert len(curve.x) == 2


def test_what_was_changed_beside_n_is_in_the_label(tmp_path):
  fake_runs.write(tmp_path / "a", 1, ONE, lr=0.003)
  fake_runs.write(tmp_path / "b", 1, ONE, lr=0.01)
  fake_runs.write(tmp_path / "c", 1, ONE, lr=0.01, steps=1600)
  fake_runs.write(tmp_path / "d", 4, FOUR, lr=0.003)
  labels = [label for label, _ in curves.settings(fake_runs.read(tmp_path / "*"))]
  assert labels == [
    "N = 1, Muon lr 0.003",
    "N = 1, Muon lr 0.01, 400 steps",
    "N = 1, Muon lr 0.01, 1600 steps",
    "N = 4, Muon lr 0.003",
  ]


def test_a_depth_goes_by_the_experiment_s_letter(tmp_path):
  for t in (2, 8):
    fake_runs.write(tmp_path / f"t{t}", 1, ONE, t=t)
  assert [s for s, _ in curves.settings(fake_runs.read(tmp_path / "*"))] == ["N = 1, t = 2", "N = 1, t = 8"]


def test_what_a_run_began_with_is_named_by_its_last_name(tmp_path):
  for n, points in ((1, ONE), (4, FOUR)):
    path = fake_runs.write(tmp_path / f"n{n}", n, points) / "config.json"
    config = json.loads(path.read_text())
    config["train"]["init_from"] = f"/far/away/stage1/n{n}_s0"
    path.write_text(json.dumps(config))
  labels = [label for label, _ in curves.settings(fake_runs.read(tmp_path / "*"))]
  assert labels == ["N = 1, from n1_s0", "N = 4, from n4_s0"]


def test_how_often_one_looks_makes_no_second_curve(tmp_path):
  fake_runs.write(tmp_path / "a", 1, ONE, seed=0)
  path = fake_runs.write(tmp_path / "b", 1, ONE, seed=1) / "config.json"
  config = json.loads(path.read_text())
  config["train"]["log_every"] = 99
  config["sleep"]["loops"] = "unroll"
  path.write_text(json.dumps(config))
  assert len(curves.settings(fake_runs.read(tmp_path / "*"))) == 1
