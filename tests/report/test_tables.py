"""Tables say what the rows say, and name what was not measured."""

import pytest

from sleep_jax.report import claims, comparison, tables
from tests.report import fake_runs

FOUR = [(100, 0.40), (200, 0.59)]


def test_the_table_is_of_the_last_evaluation_and_invents_nothing(tmp_path):
  cost = {
    "kind": "cost", "step": 200, "wake_ms_per_answer": 1.25, "wake_ms_per_answer_p10": 1.0,
    "wake_ms_per_answer_p90": 2.0, "sleep_ms_per_window": 8.5, "state_bytes": 16384,
  }  # fmt: skip
  tokens = 290 * fake_runs.TOKENS_PER_STEP
  later = {"kind": "train", "step": 290, "tokens": tokens, "loss": 0.1, "cpu_s": 99.0}
  fake_runs.write(tmp_path / "a", 4, FOUR, extra=[cost, later])
  fake_runs.write(tmp_path / "b", 4, [], seed=1, extra=[later])
  done, begun = tables.summary_table(fake_runs.read(tmp_path / "*"))
  assert done == {
    "run": "a", "num_passes": 4, "depth": "t = 4", "seed": 0, "muon_lr": 3e-3, "steps": 200,
    "tokens": 665_600, "exact": 0.59, "bit": 0.59**0.5, "const_exact": 0.278, "const_bit": 0.527,
    "cpu_s": pytest.approx(55.0), "wake_ms_per_answer": (1.25, 1.0, 2.0),
    "sleep_ms_per_window": (8.5, None, None), "state_bytes": 16384,
  }  # fmt: skip
  assert (begun["steps"], begun["cpu_s"]) == (290, 99.0)
  for key in ("exact", "bit", "const_exact", "wake_ms_per_answer", "state_bytes"):
    assert begun[key] is None
  header, rule, first, second = tables.to_markdown([done, begun]).splitlines()
  assert header.count("|") == rule.count("|") == first.count("|") == second.count("|")
  assert "| 59.0 % |" in first and "| 1.25 (1 - 2) | 8.5 |" in first and "not measured" not in first
  assert second.count("not measured") == 7


def test_equal_compute_takes_what_all_runs_spent(tmp_path):
  fake_runs.write(tmp_path / "n1", 1, [(100, 0.28), (400, 0.38)])  # 7.5 and 30 CPU s
  fake_runs.write(tmp_path / "n1_long", 1, [(400, 0.42), (800, 0.70)], lr=0.01)  # 30 and 60
  fake_runs.write(tmp_path / "n4", 4, [(100, 0.40), (200, 0.59), (400, 0.98)])  # 27.5, 55, 110
  table = {row["run"]: row for row in tables.equal_compute_table(fake_runs.read(tmp_path / "*"))}
  assert {row["equal_cpu_s"] for row in table.values()} == {30.0}
  equal = {name: row["equal_exact"] for name, row in table.items()}
  assert equal == {"n1": 0.38, "n1_long": 0.42, "n4": 0.40}
  assert table["n4"]["equal_at"] == pytest.approx(27.5)
  assert {row["longest_cpu_s"] for row in table.values()} == {60.0}
  longest = {name: row["longest_exact"] for name, row in table.items()}
  assert longest == {"n1": None, "n1_long": 0.70, "n4": 0.59}


def test_shorter_runs_count_at_their_end_and_longer_ones_on_their_way(tmp_path):
  fake_runs.write(tmp_path / "n1", 1, [(360, 0.3), (1440, 0.8)], steps=1440)  # 108 CPU s
  fake_runs.write(tmp_path / "n1_other", 1, [(360, 0.3), (1440, 0.7)], steps=1440, lr=0.01)
  fake_runs.write(tmp_path / "n1_short", 1, [(180, 0.3), (360, 0.4)], steps=360)  # 27
  fake_runs.write(tmp_path / "n2", 2, [(360, 0.7), (720, 0.9)], steps=720)  # 101
  fake_runs.write(tmp_path / "n2_short", 2, [(360, 0.6)], steps=360)  # 50
  fake_runs.write(tmp_path / "n4", 4, [(360, 0.98)], steps=360)  # 99
  runs = fake_runs.read(tmp_path / "*")
  assert {run.name for run in tables.longest(runs)} == {"n1", "n1_other", "n2", "n4"}
  headers, rows = comparison.comparison(runs)
  assert headers == ["exact answers", "N = 1", "N = 2", "N = 4"]
  assert rows[:4] == [
    ["after the same 1.2 M tokens", "40.0 %", "70.0 %", "98.0 %"],
    ["CPU seconds for it", "27", "50", "99"],
    ["after the same 1,440 passes asleep", "80.0 %", "90.0 %", "98.0 %"],
    ["CPU seconds for it", "108", "101", "99"],
  ]
  assert "N = 1: 40.0 %, N = 2: 70.0 %, N = 4: 98.0 %" in claims.claim(runs)
  assert "is behind N = 2 (80.0 % against 90.0 % after 1,440 passes)" in claims.compute_claim(runs)


def test_a_setting_that_one_seed_was_run_with_does_not_beat_one_that_all_were(tmp_path):
  for seed, exact in enumerate((0.5, 0.6, 0.7)):
    fake_runs.write(tmp_path / f"n1_s{seed}", 1, [(400, exact)], steps=400, seed=seed)
    fake_runs.write(tmp_path / f"n1_slow_s{seed}", 1, [(400, exact - 0.1)], steps=400, seed=seed, lr=1e-3)
  fake_runs.write(tmp_path / "n1_lucky", 1, [(400, 0.99)], steps=400, lr=1e-2)
  fake_runs.write(tmp_path / "n2_s0", 2, [(400, 0.9)], steps=400)
  _, rows = comparison.comparison(fake_runs.read(tmp_path / "*"))
  assert rows[0][1].startswith("60.0 %") and rows[1][1] == "50.0, 60.0, 70.0"


def test_seeds_of_unequal_length_stay_together_where_none_was_run_for_several(tmp_path):
  fake_runs.write(tmp_path / "s0", 1, [(400, 0.3)], steps=400)
  fake_runs.write(tmp_path / "s1", 1, [(800, 0.4)], steps=800, seed=1)
  fake_runs.write(tmp_path / "s2", 2, [(400, 0.5)], steps=400)
  runs = fake_runs.read(tmp_path / "*")
  assert tables.longest(runs) == runs
  fake_runs.write(tmp_path / "short", 1, [(400, 0.4)], steps=400, seed=1)
  runs = fake_runs.read(tmp_path / "*")
  assert {run.name for run in tables.longest(runs)} == {"s1", "s2"}
