"""The demo's plan, its estimate of the time left, and what it says on the way."""

import random

import pytest

from sleep_jax.experiments import config_file, eta
from sleep_jax.experiments.board import Board, planned

CONFIG = config_file.CONFIGS / "rule110.py"


def test_the_longest_runs_come_first_and_work_is_steps_times_passes():
  ledgers = planned(f"{CONFIG}:tiny", 2)
  assert list(ledgers) == ["n4_s0", "n4_s1", "n2_s0", "n2_s1", "n1_s0", "n1_s1"]
  assert [r.work for r in ledgers.values()] == [80, 80, 40, 40, 20, 20]
  works = {name: r.work for name, r in planned(f"{CONFIG}:demo", 1).items()}
  # about the same compute for every N, and as many tokens
  assert works == {"n4_s0": 3200, "n2_s0": 3200, "n1_s0": 3200, "short_n2_s0": 1600, "short_n1_s0": 800}
  assert list(works)[3:] == ["short_n2_s0", "short_n1_s0"]


def simulate(works, jobs, seconds_per_work, start_s, at):
  """Ledgers of runs after `at` core-seconds each, in order, `jobs` at a time; and the true time left."""
  runs, free = [eta.Ledger(work=w, steps=100) for w in works], [0.0] * jobs
  ends = []
  for run in runs:
    begin = min(free)
    whole = start_s + seconds_per_work * run.work
    free[free.index(begin)] = begin + whole
    ends.append(begin + whole)
    spent = max(0.0, min(at - begin, whole))
    if spent == 0.0:
      continue
    run.starting = min(spent, start_s)
    if spent >= start_s:
      run.reach(0)
      run.stepping = spent - start_s
      run.step = int(100 * run.stepping / (whole - start_s))
    run.ended = spent == whole
  return runs, max(ends) - at


@pytest.mark.parametrize("seed", range(20))
def test_the_estimate_is_near_what_a_simulation_takes(seed):
  rng = random.Random(seed)
  jobs = rng.choice([1, 2, 4])
  works = [rng.uniform(50, 150) for _ in range(jobs * rng.randint(2, 5))]
  pace, start = rng.uniform(0.1, 3.0), rng.uniform(1, 30)
  runs, left = simulate(works, jobs, pace, start, at=start + 20 * pace + rng.uniform(0.2, 1.5) * 100 * pace)
  guess = eta.remaining_s(runs, jobs)
  longest = start + pace * max(
    works
  )  # by which an order in whole runs may be worse than cores that never idle
  assert left - longest <= guess <= left + 0.1 * longest


def test_nothing_is_known_before_steps_were_timed_and_nothing_is_left_at_the_end():
  runs = [eta.Ledger(work=10, steps=10), eta.Ledger(work=10, steps=10)]
  assert eta.remaining_s(runs, 2) is None
  runs[0].spend(5.0), runs[0].reach(1), runs[0].spend(2.0)
  assert eta.remaining_s(runs, 2) is None
  runs[0].reach(2)  # 2 seconds a step: 16 left here, 20 and a start of 5 there
  assert eta.remaining_s(runs, 2) == pytest.approx(25.0)
  assert eta.remaining_s(runs, 1) == pytest.approx(41.0)
  for run in runs:
    run.ended = True
  assert eta.remaining_s(runs, 2) == 0.0 and eta.done_share(runs) == 1.0


class Time:
  def __init__(self):
    self.s = 0.0

  def __call__(self) -> float:
    return self.s


@pytest.fixture
def board(tmp_path):
  """A board of two runs of equal work on one core, its clock and what it said."""
  time, said = Time(), []
  ledgers = {name: eta.Ledger(work=100, steps=100) for name in ("a", "b")}
  return Board(ledgers, tmp_path / "logs", 1, now=time, say=said.append), time, said


def test_the_board_says_few_lines_with_one_estimate_for_all_runs(board, tmp_path):
  board, time, said = board
  board.started("a")
  for step in range(0, 101, 2):  # a second a step
    time.s = 10.0 + step
    board.line("a", f"step {step:>3}/100  loss 0.5\n")
  board.line("a", "eval step 100: exact 47.3 % (best constant 27.5 %)\n")
  board.ended("a", 0)
  lines = [line for line in said if "% of all" in line]
  assert 5 <= len(lines) <= 8
  assert "% of all, time left not known yet" not in lines[-1]
  assert lines[-1].startswith(" 50 % of all, about 2 min left") or "about" in lines[-1]
  assert said[-1] == "a done, 1 of 2: exact 47.3 % (best constant 27.5 %)"
  assert len((tmp_path / "logs" / "a.txt").read_text().splitlines()) == 52
  assert not any("loss" in line for line in said)


def test_the_board_shows_the_last_lines_of_a_run_that_failed(board):
  board, _, said = board
  board.started("a")
  for number in range(9):
    board.line("a", f"line {number}\n")
  board.ended("a", 1)
  assert said[-1].splitlines() == ["a ended with exit code 1", *(f"    line {i}" for i in range(4, 9))]
