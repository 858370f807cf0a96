"""Runs of several commits in turns: what is refused, and a table from two commits of this repository."""

import csv
import pathlib
import subprocess
import sys

import pytest

from sleep_jax.benchmarks import command, commits
from sleep_jax.config import ConfigError

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--commits=HEAD"], "name at least two"),
    (["--commits=HEAD,HEAD~1", "--presets=fig9"], "unknown fig9; known: tiny, demo, fig2b"),
    ([], "required: --commits"),
  ],
)
def test_a_mistake_is_named(words, message, capsys):
  with pytest.raises(SystemExit) as ended:
    commits.main(words)
  assert ended.value.code == 2
  assert message in capsys.readouterr().err


def test_an_unknown_commit_is_named_and_leaves_no_worktree(tmp_path):
  with pytest.raises(ConfigError, match="--commits: this clone has no commit 'no-such-thing'"):
    with commits.checkouts(["HEAD", "no-such-thing"], tmp_path):
      pass
  assert str(tmp_path) not in worktrees()


def test_a_mistake_in_any_benchmark_is_one_line(capsys):
  with pytest.raises(SystemExit) as ended:
    sys.exit(command.run(commits.main, ["--commits=HEAD,no-such-thing", "--threads=4096"]))
  out = capsys.readouterr()
  assert ended.value.code == 2
  assert out.err.startswith("error: --threads: must lie in 1..") and len(out.err.splitlines()) == 1
  for path in (ROOT / "benchmarks").glob("*.py"):
    text = path.read_text()
    assert 'if __name__ == "__main__"' not in text or "command.run(" in text, path


def worktrees():
  """The worktrees of this repository as git names them; others may come and go."""
  return subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_two_commits_side_by_side(tmp_path):
  have = subprocess.run(["git", "rev-parse", "--quiet", "--verify", "HEAD~1"], cwd=ROOT, capture_output=True)
  if have.returncode:
    pytest.skip("this clone holds one commit only")
  words = [
    "--commits=HEAD~1,HEAD",
    "--presets=tiny",
    "--passes=1",
    "--rounds=1",
    "--steps=2",
    f"--out={tmp_path}",
  ]
  assert commits.main(words) == 0
  (path,) = tmp_path.glob("commits*.csv")
  with path.open(newline="") as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 2 and rows[0]["commit"] != rows[1]["commit"]
  assert all(0 < float(row["CPU ms"]) == float(row["least"]) for row in rows)
  assert "commits." not in worktrees()
