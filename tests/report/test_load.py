"""Runs are read as they lie on disk; what is damaged is named in one line, whatever the damage."""

import copy
import json
import os
import random
import threading

import pytest

from sleep_jax.experiments import figures
from sleep_jax.report import claims, load, page, tables
from tests.report import fake_runs

ONE = [(100, 0.28), (200, 0.32)]


def test_a_torn_last_line_is_left_out(tmp_path):
  fake_runs.write(tmp_path / "a", 1, ONE, tail='{"kind": "eval", "step": 300, "tok')
  (run,) = load.load_runs(tmp_path / "a")
  assert [row["step"] for row in run.evals] == [100, 200]


def test_a_damaged_line_before_the_last_is_an_error_that_names_it(tmp_path):
  more = json.dumps(fake_runs.evaluation(300, 0.5, 1)) + "\n"
  fake_runs.write(tmp_path / "a", 1, ONE, tail="not json\n" + more)
  with pytest.raises(load.RunError, match="metrics.jsonl line 3"):
    load.load_runs(tmp_path / "a")


def test_of_a_step_that_was_repeated_the_later_row_counts(tmp_path):
  again = fake_runs.evaluation(200, 0.77, 1)
  fake_runs.write(tmp_path / "a", 1, [*ONE, (300, 0.9)], extra=[again])
  (run,) = load.load_runs(tmp_path / "a")
  assert [(row["step"], row["exact"]) for row in run.evals] == [(100, 0.28), (200, 0.77), (300, 0.9)]


def test_globs_paths_and_files_between_runs(tmp_path):
  for name, passes in (("n4", 4), ("n1", 1)):
    fake_runs.write(tmp_path / name, passes, ONE)
  (tmp_path / "notes.txt").write_text("no run")
  read = load.load_runs([tmp_path / "*", tmp_path / "n1"])
  assert [run.name for run in read] == ["n1", "n4"]  # by N, each once


def test_what_is_no_run_is_named(tmp_path):
  (tmp_path / "empty").mkdir()
  with pytest.raises(load.RunError, match="empty is no run: it has no config.json"):
    load.load_runs(tmp_path / "*")
  with pytest.raises(load.RunError, match="no run matches"):
    load.load_runs(str(tmp_path / "nothing*"))
  fake_runs.write(tmp_path / "a", 1, ONE)
  (tmp_path / "a" / "config.json").write_text("{")
  with pytest.raises(load.RunError, match="config.json is damaged"):
    load.load_runs(tmp_path / "a")


def test_a_depth_is_a_field_of_the_experiment_that_the_run_is_of(tmp_path):
  fake_runs.write(tmp_path / "a", 1, ONE, t=7)
  (known,), (unknown,) = fake_runs.read(tmp_path / "a"), load.load_runs(tmp_path / "a")
  assert (known.experiment.title, known.depth) == ("Rule 110", 7)
  assert (unknown.experiment.title, unknown.depth) == ("", None)


def test_an_archived_run_is_the_run(tmp_path):
  root = "/home/someone"
  words = [f"{root}/experiments/rule110.py", f"--config={root}/experiments/configs/a.py:b", "--workdir=a b"]
  env = {"host": "secret-host", "command": words}
  extra = [fake_runs.sleep_row(200, 2, 4), {"kind": "train", "step": 150, "loss": 0.5}]
  fake_runs.write(tmp_path / "n4", 4, ONE, extra=extra, env=env)
  (run,) = fake_runs.read(tmp_path / "n4")
  path = load.archive(run, tmp_path / "results")
  assert path == tmp_path / "results" / "n4.jsonl"
  (again,) = fake_runs.read(tmp_path / "results" / "*.jsonl")
  assert (again.name, again.config, again.experiment) == ("n4", run.config, run.experiment)
  assert again.rows == {kind: rows for kind, rows in run.rows.items() if kind != "train"}
  assert "secret" not in path.read_text() and "someone" not in path.read_text()
  typed = "python -m experiments.rule110 --config=experiments/configs/a.py:b '--workdir=a b'"
  assert again.env == {"command": typed}
  assert load.archive(again, tmp_path / "twice").read_text() == path.read_text()


def test_a_file_of_rows_without_its_run_is_refused(tmp_path):
  (tmp_path / "a.jsonl").write_text(json.dumps(fake_runs.evaluation(100, 0.5, 1)) + "\n")
  with pytest.raises(load.RunError, match=r"a.jsonl is no archived run: its first row is not of kind 'run'"):
    load.load_runs(tmp_path / "*.jsonl")


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "env.json"])
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_folder_or_pipe_in_a_file_s_place_is_named_and_nothing_waits(tmp_path, name, kind):
  path = fake_runs.write(tmp_path / "a", 1, ONE) / name
  path.unlink(missing_ok=True)
  path.mkdir() if kind == "folder" else os.mkfifo(path)
  said = []

  def read():
    with pytest.raises(load.RunError) as error:
      load.load_runs(tmp_path / "a")
    said.append(str(error.value))

  reader = threading.Thread(target=read, daemon=True)
  reader.start()
  reader.join(20)
  assert len(said) == 1 and name in said[0] and "\n" not in said[0]


WRONG = [
  None,
  True,
  -1,
  2**63,
  10**400,
  1e308,
  "NaN",
  "Infinity",
  "text",
  "",
  [],
  [1, "a"],
  {},
  {"a": [None]},
]


def places(value, path=()):
  """Every place in nested JSON: keys from the outside in."""
  yield path
  children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
  for key, child in children:
    yield from places(child, (*path, key))


def changed(value, path, wrong):
  """The JSON with `wrong` in one place."""
  if not path:
    return wrong
  value = copy.copy(value)
  value[path[0]] = changed(value[path[0]], path[1:], wrong)
  return value


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")  # a label of 400 digits leaves no room
@pytest.mark.parametrize(
  ("seed", "cases"), [(0, 12), *(pytest.param(s, 60, marks=pytest.mark.slow) for s in range(1, 6))]
)
def test_a_wrong_type_in_any_place_is_one_line_or_does_no_harm(tmp_path, seed, cases):
  """Config, environment and rows with a wrong value somewhere: tables, claims, figures and page all cope."""
  rng = random.Random(seed)
  cost = {
    "kind": "cost",
    "step": 200,
    "wake_ms_per_answer": 0.1,
    "sleep_ms_per_window": 0.2,
    "state_bytes": 8,
  }
  cost |= {"wake_ms_per_answer_p10": 0.05, "wake_ms_per_answer_p90": 0.3}
  extra = [fake_runs.sleep_row(200, 2, 4), cost, {"kind": "done", "step": 200, "cpu_s": 3.0}]
  env = {"command": ["a.py", "--x"], "backend": "cpu", "versions": {"jax": "1"}, "git": None}
  fake_runs.write(tmp_path / "n1", 1, ONE)
  fake_runs.write(tmp_path / "n4", 4, ONE, extra=extra, env=env)
  run = tmp_path / "n4"
  rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  whole = {"config": fake_runs.config(4), "env": env, "rows": rows}
  spots = [path for path in places(whole) if path]
  for path in rng.sample(spots, cases):
    wrong = rng.choice(WRONG)
    broken = changed(whole, path, wrong)
    (run / "config.json").write_text(json.dumps(broken["config"]))
    (run / "env.json").write_text(json.dumps(broken["env"]))
    lines = broken["rows"] if isinstance(broken["rows"], list) else [broken["rows"]]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    try:
      runs = fake_runs.read(tmp_path / "n*")
      tables.to_markdown(tables.summary_table(runs)), tables.to_markdown(tables.equal_compute_table(runs))
      claims.claim(runs), claims.compute_claim(runs), claims.caveats(runs)
      figures.drawings(runs), figures.about_sleep(runs)
      page.write_html(tmp_path / "page.html", runs)
      load.archive(runs[-1], tmp_path / "archive")
    except load.RunError as error:
      assert "\n" not in str(error), (path, wrong)
    except Exception as error:
      raise AssertionError(f"{path} = {wrong!r:.40}: {type(error).__name__}: {error}") from error
