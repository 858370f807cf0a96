"""Finished runs tested as they are not trained: the same numbers where nothing is changed, others where it
is.
"""

import json
import pathlib
import re
import runpy
import shutil

import pytest

from sleep_jax.runtime import metrics
from tests.forked import Experiment

TRAIN = (
  # one block under loops is compiled sooner than two blocks written out
  *("--config=rule110:tiny", "--config.model.blocks=('hebbian',)", "--config.sleep.loops=scan"),
  *("--config.train.eval_sequences=128", "--config.sleep.num_passes=2", "--tensorboard=False"),
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
  """A folder with two runs of the tiny preset, of seeds 0 and 1."""
  folder = tmp_path_factory.mktemp("runs")
  with Experiment("experiments.rule110", tmp_path_factory.mktemp("scratch")) as train:
    for seed in (0, 1):
      ended = train.run(*TRAIN, f"--config.seed={seed}", f"--workdir={folder}/s{seed}", cwd=folder)
      assert ended.code == 0, ended.err
  return folder


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
  with Experiment("experiments.evaluate", tmp_path_factory.mktemp("scratch")) as experiment:
    yield experiment


def files_of(folder):
  return {path: path.read_bytes() for path in sorted(pathlib.Path(folder).rglob("*")) if path.is_file()}


def test_unchanged_it_is_the_last_evaluation_of_the_run(evaluate, ran):
  before = files_of(ran)
  ended = evaluate.run(f"--run={ran}/s0", cwd=ran)
  assert ended.code == 0, ended.err
  last = [row for row in metrics.read(ran / "s0" / "metrics.jsonl") if row["kind"] == "eval"][-1]
  line = ended.out.splitlines()[0]
  assert line == (
    f"{ran}/s0, trained with N = 2, asleep with N = 2: exact {100 * last['exact']:.1f} %"
    f" (best constant {100 * last['const_exact']:.1f} %)"
  )
  assert files_of(ran) == before, "an evaluation writes nothing into the run's folder"


def test_several_runs_and_passes_as_table_rows_and_figure(evaluate, ran, tmp_path):
  ended = evaluate.run(f"--run={ran}/s*", "--passes=1,3", f"--out={tmp_path}/out", cwd=ran)
  assert ended.code == 0, ended.err
  rows = [json.loads(line) for line in (tmp_path / "out" / "evaluation.jsonl").read_text().splitlines()]
  assert [(row["seed"], row["num_passes"]) for row in rows] == [(s, n) for s in (0, 1) for n in (1, 3)]
  assert all(row["trained_passes"] == 2 and row["step"] == 20 for row in rows)
  assert all(0 <= row["low"] <= row["exact"] <= row["high"] <= 1 for row in rows)
  assert len({row["loss"] for row in rows if row["seed"] == 0}) == 2, (
    "N at test time changes what is remembered"
  )
  table = (tmp_path / "out" / "evaluation.md").read_text()
  assert len(table.splitlines()) == 2 + 4 and table.strip() in ended.out
  assert {path.name for path in (tmp_path / "out").iterdir()} == {
    "evaluation.jsonl", "evaluation.md", "test_passes.png", "test_passes.svg", "test_passes.csv"
  }  # fmt: skip


def test_other_settings_of_the_task_and_other_held_out_sets(evaluate, ran):
  scores = {}
  for change in (
    "--config.data.rollout_steps=3",
    "--config.train.eval_sequences=512",
    "--config.sleep.num_passes=4",
  ):
    ended = evaluate.run(f"--run={ran}/s0", change, cwd=ran)
    assert ended.code == 0, ended.err
    scores[change] = ended.out.splitlines()[0].split(": ", 1)[1]
  assert len(set(scores.values())) == 3
  assert "asleep with N = 4" in ended.out


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((), "--run is required"),
    (("--run=nowhere",), "--run: nowhere is no workdir of a run, and matches none"),
    (("--run={ran}",), "is no workdir of a run"),
    (("--run={ran}/s0", "--passes=0"), "--passes: must be numbers from 1 on, got '0'"),
    (("--run={ran}/s0", "--passes=two"), "--passes: must be numbers from 1 on, got 'two'"),
    (("--run={ran}/s0", "--passes=1", "--config.sleep.num_passes=2"), "say the same thing; give one of them"),
    (("--run={ran}/s0", "--config.sleep.passes=2"), "config.sleep has no field 'passes'"),
    (("--run={ran}/s0", "--config.model.embed_dim=32"), "is another model than that of"),
    (("--run={ran}/s0", "--step=7"), "7"),
    (("--run={ran}/s0", "--out={ran}/s1"), "is the workdir of a run, nothing is written there"),
    (("--run={ran}/s0", "--config.train.eval_sequences=100"), "must divide train.eval_sequences"),
  ],
)
def test_mistakes_are_one_line(evaluate, ran, arguments, message):
  ended = evaluate.run(*(word.format(ran=ran) for word in arguments), cwd=ran)
  assert (ended.code, ended.out) == (2, ""), (ended.out, ended.err)
  [line] = ended.err.splitlines()
  assert line.startswith("error: ") and message in line


def test_a_run_named_twice_counts_once(evaluate, ran):
  ended = evaluate.run(f"--run={ran}/s0,{ran}/s*", cwd=ran)
  assert ended.code == 0, ended.err
  assert [line.partition(",")[0] for line in ended.out.splitlines()[:3]] == [f"{ran}/s0", f"{ran}/s1", ""]


def test_the_example_of_the_docs_opens_a_run(ran, tmp_path, monkeypatch):
  page = (pathlib.Path(__file__).parents[2] / "docs" / "pretrained.md").read_text()
  (block,) = [b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "load_run(" in b]
  shutil.copytree(ran / "s0", tmp_path / "work" / "n2")
  (tmp_path / "example.py").write_text(block)
  monkeypatch.chdir(tmp_path)
  found = runpy.run_path("example.py")
  assert found["run"].step == 20 and found["logits"].shape == (1, 6, 3)
