"""The documented commands for Depo and GSM-Infinite, from nothing to table and figure, only shorter."""

import csv
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from sleep_jax.runtime import metrics

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tasks.md").read_text()
COMMANDS = re.findall(r"^    python (-m experiments\..*)$", PAGE, re.MULTILINE)


def run(folder: pathlib.Path, words: str, *flags: str) -> str:
  """Runs the one command of docs/tasks.md that has `words`, in `folder` for `work`; what it prints."""
  (command,) = [c for c in COMMANDS if words in c]
  arguments = [a.replace("=work/", f"={folder}/") for a in shlex.split(command)]
  done = subprocess.run(
    [sys.executable, *arguments, *flags],
    cwd=ROOT,
    env={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | os.environ,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def last_eval(folder: pathlib.Path) -> dict:
  return [r for r in metrics.read(folder / "metrics.jsonl") if r["kind"] == "eval"][-1]


@pytest.mark.slow
def test_depo_learns_one_hop_and_is_tabled_and_drawn(tmp_path):
  steps = [f"--config.train.{name}=200" for name in ("steps", "eval_every", "save_every")]  # of 1000
  said = run(tmp_path, "experiments.depo", *steps)
  row = last_eval(tmp_path / "depo" / "n2")
  assert row["step"] == 200
  assert row["k1_low"] > 0.8 > row["k2_high"], row  # two hops need all 1000
  rows = [line.split() for line in said.splitlines()[-2:]]
  assert [(r[0], r[3]) for r in rows] == [(str(k), f"{row[f'k{k}_exact']:.1%}") for k in (1, 2)]
  run(tmp_path, "--figure=3")
  drawn = list(csv.DictReader(open(tmp_path / "figures" / "figure_3.csv")))
  assert {r["k"] for r in drawn} == {"1", "2"}
  assert float([r for r in drawn if r["kind"] == "curve"][-1]["value"]) == row["k2_answer_loss"]
  assert (tmp_path / "figures" / "figure_3.png").stat().st_size > 10_000


@pytest.mark.slow
def test_gsm_infinite_goes_from_data_to_tables_and_figure(tmp_path):
  steps = [f"--config.train.{name}=100" for name in ("steps", "eval_every", "save_every")]  # of 1000
  said = run(tmp_path, "experiments.gsm_infinite ", *steps)
  row = last_eval(tmp_path / "gsm" / "n2")
  assert row["step"] == 100
  assert row["low"] > 1.5 * row["const_exact"], row  # far beyond a constant; not yet beyond the shortcut
  for op in (2, 3):
    assert row[f"op{op}_majority"] < row[f"op{op}_shortcut"] < 1
    assert row[f"op{op}_asked"] == 256
  assert row["faithful_op2_asked"] + row["faithful_op3_asked"] == 512
  lines = said.splitlines()[-8:]
  assert [line.split(",")[1].split()[0] for line in lines[::4]] == ["balanced", "faithful"]
  for prefix, table in (("", lines[2:4]), ("faithful_", lines[6:])):
    for op, line in zip((2, 3), table, strict=True):
      shown = [f"{row[f'{prefix}op{op}_{name}']:.1%}" for name in ("exact", "majority", "shortcut")]
      assert [line.split()[i] for i in (2, -2, -1)] == shown
  run(tmp_path, "--figure=4")
  drawn = {
    (r["operations"], r["series"]) for r in csv.DictReader(open(tmp_path / "figures" / "figure_4.csv"))
  }
  series = ("N = 2", "commonest answer", "commonest number")
  assert drawn == {(op, name) for op in ("2", "3") for name in series}
  assert (tmp_path / "figures" / "figure_4.png").stat().st_size > 10_000
