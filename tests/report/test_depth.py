"""Accuracy over depth: of made-up runs whose answer is known by hand."""

import csv
import json

import pytest

from sleep_jax.report import depth
from sleep_jax.report.load import RunError
from tests.report import fake_runs

DONE = ({"kind": "done", "step": 0},)


def write(folder, t, n, seed, points, **settings):
  name = f"t{t}_n{n}_s{seed}"
  steps = points[-1][0]
  return fake_runs.write(folder / name, n, points, t=t, seed=seed, steps=steps, extra=DONE, **settings)


@pytest.fixture
def runs(tmp_path):
  """N = 4 ends at step 100, N = 1 at step 400, at depths 1 and 8; two seeds each."""
  for t, four, one in ((1, (0.9, 1.0), (0.7, 0.9)), (8, (0.4, 0.6), (0.2, 0.3))):
    for seed in (0, 1):
      write(tmp_path, t, 4, seed, [(50, 0.1), (100, four[seed])])
      write(tmp_path, t, 1, seed, [(50, 0.05), (100, one[seed] / 2), (400, one[seed])])
  fake_runs.write(tmp_path / "t3_n1_s0", 1, [(100, 0.5)], t=3)  # goes on
  return fake_runs.read(str(tmp_path / "*"))


def test_by_hand(runs):
  found = {(p.depth, p.num_passes, p.by): p for p in depth.points(runs)}
  assert len(found) == 2 * 2 * 2
  one = found[1, 1, "tokens"]  # N = 4 came to 100 steps
  assert (one.budget, one.seeds, one.exact) == (100 * fake_runs.TOKENS_PER_STEP, (0, 1), (35.0, 45.0))
  assert one.cpu_s == pytest.approx(100 * fake_runs.CPU_S_PER_STEP[1])
  assert one.constant == pytest.approx(27.8)
  one = found[1, 1, "passes"]
  assert (one.budget, one.exact, one.mean) == (400, (70.0, 90.0), 80.0)
  # Student's t for two values: mean +- 12.706 * 20 / 2 / sqrt(2) * sqrt(2), cut at 0 and 100
  assert one.interval == (0.0, 100.0)
  assert found[8, 4, "passes"].exact == found[8, 4, "tokens"].exact == pytest.approx((40.0, 60.0))


def test_table_and_figure_say_the_same(runs, tmp_path):
  found = depth.points(runs)
  lines = depth.table(found, [], "t").splitlines()
  rows = [line for line in lines if line.startswith(("| 1 ", "| 8 "))]
  assert len(rows) == 4 and "**40.0** (0 - 100): 35.0, 45.0; 7.5 s" in rows[0] and "**50.0**" in rows[1]
  assert "not run" not in depth.table(found, depth.solved(runs), "t")
  drawing = depth.figure(found, "t")
  drawing.save(tmp_path / "out")
  with open(tmp_path / "out" / "depth.csv", newline="") as file:
    drawn = {(r["by"], r["depth"], r["num_passes"]): r for r in csv.DictReader(file)}
  assert len(drawn) == 8
  assert float(drawn["passes", "8", "1"]["exact_percent"]) == 25
  assert drawn["passes", "8", "1"]["each"] == "20.00 30.00"
  assert "N = 4 after the same tokens: 95 % at t = 1, 50 % at t = 8" in drawing.alt


def test_how_soon_a_depth_is_solved_by_hand(runs):
  soon = {(s.depth, s.num_passes): s for s in depth.solved(runs)}
  assert list(soon) == [(1, 1), (1, 4), (8, 1), (8, 4)]  # not the one that goes on
  assert soon[1, 4].tokens == (100 * fake_runs.TOKENS_PER_STEP,) * 2
  assert soon[1, 4].passes == (400, 400)
  assert soon[1, 4].cpu_s == pytest.approx((100 * fake_runs.CPU_S_PER_STEP[4],) * 2)
  assert soon[1, 1].passes == (None, 400)
  assert soon[8, 1].passes == soon[8, 4].tokens == (None, None)
  assert soon[8, 1].all_passes == (400, 400) and soon[8, 4].all_tokens == soon[1, 4].tokens
  drawing = depth.figure_soon(list(soon.values()), "t")
  assert len(drawing.rows) == 8 and drawing.rows[0] == {
    "depth": 1, "num_passes": 1, "seed": 0, "tokens": None, "passes": None, "cpu_s": None,
    "all_tokens": 400 * fake_runs.TOKENS_PER_STEP, "all_passes": 400,
  }  # fmt: skip
  assert "N = 4, passes asleep: 400 at t = 1." in drawing.alt and "N = 1, tokens: at no depth" in drawing.alt
  assert drawing.svg().startswith("<?xml")
  lines = depth.table(depth.points(runs), list(soon.values()), "t").splitlines()
  begin = lines.index("Passes asleep (steps times N) until 90 % were exact.")
  assert lines[begin + 4] == "| 1 | **-**: -, 400 | **400**: 400, 400 |"
  assert lines[begin + 5] == "| 8 | **-**: -, - | **-**: -, - |"


def test_a_depth_that_one_n_was_not_run_at_is_shown_so(tmp_path):
  write(tmp_path, 2, 4, 0, [(100, 0.5)])
  write(tmp_path, 3, 1, 0, [(100, 0.5)])
  found = depth.points(fake_runs.read(str(tmp_path / "*")))
  soon = depth.solved(fake_runs.read(str(tmp_path / "*")))
  assert depth.table(found, [], "t").count("not run") == 4
  assert depth.table(found, soon, "t").count("not run") == 8
  assert depth.figure(found, "t").rows[0]["low"] is None


def test_what_cannot_be_compared_is_named(tmp_path):
  write(tmp_path / "a", 2, 4, 0, [(100, 0.5)])
  write(tmp_path / "b", 2, 4, 0, [(100, 0.5)])
  fake_runs.write(tmp_path / "b" / "other", 4, [(100, 0.5)], t=2, extra=DONE, steps=100)
  with pytest.raises(RunError, match="depth 2: other and t2_n4_s0 have the same N and seed"):
    depth.points(fake_runs.read(str(tmp_path / "b" / "*")))
  write(tmp_path / "c", 2, 1, 0, [(100, 0.5)], lr=1e-2)
  with pytest.raises(RunError, match=r"depth 2: the runs differ in optim\.muon_lr"):
    depth.points(fake_runs.read(str(tmp_path / "a" / "*"), str(tmp_path / "c" / "*")))


def test_the_better_of_two_lengths_counts_for_the_same_tokens(runs, tmp_path):
  """N = 1 at its own end after 100 steps where that is better, and never among what is solved."""
  for seed in (0, 1):
    for t, exact in ((1, 0.3), (8, 0.25)):
      name = f"short_t{t}_n1_s{seed}"
      fake_runs.write(tmp_path / name, 1, [(50, 0.05), (100, exact)], t=t, seed=seed, steps=100, extra=DONE)
  both = fake_runs.read(str(tmp_path / "*"))
  found = {(p.depth, p.num_passes, p.by): p for p in depth.points(both)}
  assert found[1, 1, "tokens"].exact == (35.0, 45.0)  # the long ones, on their way
  assert found[8, 1, "tokens"].exact == (25.0, 25.0)
  same = {key: p for key, p in found.items() if key != (8, 1, "tokens")}
  before = {(p.depth, p.num_passes, p.by): p for p in depth.points(runs)}
  assert same == {key: p for key, p in before.items() if key in same}
  assert depth.solved(both) == depth.solved(runs)


def test_a_length_that_one_seed_was_run_for_does_not_beat_one_that_all_were(runs, tmp_path):
  fake_runs.write(tmp_path / "short_t1_n1_s0", 1, [(100, 0.99)], t=1, seed=0, steps=100, extra=DONE)
  both = fake_runs.read(str(tmp_path / "*"))
  assert len(both) == len(runs) + 1
  assert depth.points(both) == depth.points(runs)


def test_points_are_json(runs):
  import dataclasses

  assert json.loads(json.dumps(dataclasses.asdict(depth.points(runs)[0])))["num_passes"] == 1
