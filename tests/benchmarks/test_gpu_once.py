"""One command for a GPU: what it runs, what it writes, what it refuses; and a dry run of every part."""

import json
import os

import jax.numpy as jnp
import pytest

from sleep_jax.benchmarks import boxes, gpu_once, gpu_parts
from sleep_jax.experiments import config_file, rule110, runner
from sleep_jax.kernels.measure import bench, gpu_check

FACTS = {"platform": "gpu", "devices": "a made-up one", "command": "`none`"}


def a_row(part, state="done", rows=(), **changes):
  line = {"part": part, "state": state, "code": 0, "seconds": 1.0, "box_s": 2.0, "rows": list(rows)}
  line |= {"tail": "", "ended": "today", "asked": {"size": "full", "dry_run": False}}
  return line | changes


def test_runs_of_a_figure_are_those_of_its_sweep(tmp_path):
  """The same folders and settings, so that either command goes on with what the other began."""
  ours = {part.name: part.command for part in gpu_once.parts(tmp_path, "full")}
  for figure, preset in (("figure_2a", "fig2a"), ("figure_2b", "fig2b")):
    swept = runner.commands(f"rule110.py:{preset}", str(tmp_path / preset), 1)
    mine = {name: line for name, line in ours.items() if name.startswith(figure)}
    assert len(mine) == len(swept)
    for theirs, line in zip(swept.values(), mine.values(), strict=True):
      asked = {word for word in theirs[3:] if not word.startswith("--config=")}
      assert asked <= set(line)
      assert f"--config=rule110.py:{preset}" in line
  assert config_file.read("rule110.py:fig2a").train.steps == 800  # 40 M tokens a run


@pytest.mark.parametrize("size", ["full", "tiny"])
def test_every_configured_run_is_one_that_the_experiment_takes(tmp_path, size):
  for part in gpu_once.parts(tmp_path, size):
    if part.name.startswith("figure_2"):
      flags = [word.removeprefix("--config") for word in part.command[3:] if word.startswith("--config")]
      values = config_file.read(flags[0].removeprefix("="))
      changes = dict(word.removeprefix(".").split("=") for word in flags[1:])
      config_file.change(values, changes)
      cfg, task = rule110.build(values.to_dict())
      task.check(cfg)


def test_the_most_valuable_comes_first_and_fits_twelve_minutes(tmp_path):
  parts = gpu_once.parts(tmp_path, "full")
  assert gpu_once.GROUPS == (
    *("kernel_errors", "kernels_fla", "attention", "figure_2a", "figure_6", "generate"),
    "figure_2b",  # takes what time there is
  )
  assert len({part.name for part in parts}) == len(parts)
  assert sum(part.weight for part in parts) <= 12 * 60
  assert {gpu_once.group(part) for part in gpu_once.parts(tmp_path, "tiny")} == set(gpu_once.GROUPS)


def test_the_page_has_every_part_and_its_rows(tmp_path):
  names = [part.name for part in gpu_once.parts(tmp_path, "full")]
  rows = [
    a_row("kernel_errors", rows=[{"name": "xla", "worst": 0.004}, {"name": "pallas_gpu", "note": "too old"}]),
    a_row("figure_2a_t04", "stopped", [{"run": "t04_n1_s0", "exact": 0.875}], code=3),
    a_row("figure_6", "failed", code=1, tail="Traceback\nValueError: no such thing\n"),
  ]
  text = gpu_once.page(rows, names, FACTS, {"size": "full", "dry_run": False})
  assert all(f"| {name} |" in text for name in names)
  assert "| figure_2a_t04 | stopped | 3 |" in text and "| figure_2b_n1 | not begun |" in text
  assert "0.875" in text and "too old" in text
  assert "`figure_6` failed with exit code 1: ValueError: no such thing" in text
  assert "* devices: a made-up one" in text


@pytest.mark.parametrize(
  ("states", "code"),
  [(["done", "done"], 0), (["done", "failed"], 1), (["done", "stopped"], 3), (["done"], 3), (["failed"], 1)],
)
def test_exit_codes(tmp_path, monkeypatch, states, code):
  parts = [boxes.Part(name, [], 1.0, list) for name in ("kernel_errors", "figure_6")]
  monkeypatch.setattr(gpu_once, "parts", lambda out, size: parts)
  monkeypatch.setattr(gpu_once, "_facts", lambda *_: FACTS)

  def run_all(parts, journal, logs, **options):
    for part, state in zip(parts, states, strict=False):
      journal.add(a_row(part.name, state, asked=options["asked"]))

  monkeypatch.setattr(boxes, "run_all", run_all)
  assert gpu_once.main([f"--out={tmp_path}"]) == code
  assert (tmp_path / "gpu_once.md").read_text().startswith("# What a GPU answered")


def test_without_a_gpu_one_line_and_code_2(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(gpu_once, "_facts", lambda *_: FACTS | {"platform": "cpu"})
  assert gpu_once.main([f"--out={tmp_path}"]) == 2
  printed = capsys.readouterr()
  assert printed.err.count("\n") == 1 and "sees no GPU here but cpu; --dry_run --size=tiny" in printed.err


def test_results_of_other_settings_are_not_mixed(tmp_path, capsys):
  (tmp_path / "gpu_once.jsonl").write_text(json.dumps(a_row("figure_6")) + "\n")
  assert gpu_once.main([f"--out={tmp_path}", "--dry_run", "--size=tiny"]) == 2
  assert "holds results of other settings" in capsys.readouterr().err


def test_an_error_above_the_tolerance_fails_the_part(tmp_path, monkeypatch):
  def errors(shapes, names):
    return [gpu_check.Error(shapes[0], "weak", "xla", *[0.0] * 7, 0.5)]

  monkeypatch.setattr(gpu_check, "errors", errors)
  out = tmp_path / "rows.jsonl"
  assert gpu_parts.main(["--part=kernel_errors", "--size=tiny", f"--out={out}"]) == 1
  absent, row = map(json.loads, out.read_text().splitlines())
  assert absent["note"].startswith("not measured: ")
  assert row["worst"] == 0.5 and row["wrong"] == "an error is above 0.02"


def test_without_fla_a_row_says_so(tmp_path, monkeypatch):
  monkeypatch.setattr(gpu_parts, "SHAPES", {"tiny": ()})
  out = tmp_path / "rows.jsonl"
  assert gpu_parts.main(["--part=kernels_fla", "--size=tiny", f"--out={out}"]) == 0
  (row,) = map(json.loads, out.read_text().splitlines())
  assert row == {"name": gpu_check.PEER, "note": "not measured: fla is not importable"}


@pytest.mark.slow
def test_a_dry_run_goes_through_every_part_and_a_second_one_through_none(tmp_path, capsys):
  flags = ["--dry_run", "--size=tiny", "--minutes=12", f"--out={tmp_path}"]
  code = gpu_once.main(flags)
  printed = capsys.readouterr()
  rows = [json.loads(line) for line in (tmp_path / "gpu_once.jsonl").read_text().splitlines()]
  assert code == 0, [(row["part"], row["tail"]) for row in rows if row["state"] != "done"]
  names = [part.name for part in gpu_once.parts(tmp_path, "tiny")]
  assert [row["part"] for row in rows] == names
  assert all(row["rows"] for row in rows), printed.out
  (trained,) = next(row["rows"] for row in rows if row["part"].startswith("figure_2a"))
  assert trained["step"] == 2 and 0 <= trained["exact"] <= 1
  text = (tmp_path / "gpu_once.md").read_text()
  assert text.startswith("# A dry run") and "Nothing was measured." not in text
  before = os.stat(tmp_path / "gpu_once.jsonl").st_size
  assert gpu_once.main(flags) == 0
  assert os.stat(tmp_path / "gpu_once.jsonl").st_size == before


def test_a_form_of_attention_that_fails_or_is_wrong_hides_no_other(tmp_path, monkeypatch):
  def attend(name, reach, mode):
    if name == "dense":
      raise NotImplementedError("not | here")
    return lambda q, k, v, cotangent: (q + jnp.arange(2.0)[attempts.pop()],)

  attempts = [1, 0, 0, 0]  # which of the programs, from the last to the first, is wrong
  monkeypatch.setattr(gpu_parts, "_attend", attend)
  monkeypatch.setattr(gpu_parts, "ATTENDED", {"tiny": ((4, None),)})
  out = tmp_path / "rows.jsonl"
  assert gpu_parts.main(["--part=attention", "--size=tiny", f"--out={out}"]) == 1
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  assert [(row["mode"], row["form"]) for row in rows] == [
    (mode, form) for mode in bench.MODES for form in ("dense", "blocked")
  ]
  assert [row.get("note") for row in rows[::2]] == ["failed: NotImplementedError: not / here"] * 2
  assert "wrong" not in rows[1] and rows[3]["wrong"] == "its error is above 0.02"


def test_forms_of_attention_agree(tmp_path, monkeypatch):
  monkeypatch.setattr(gpu_parts, "ATTENDED", {"tiny": ((16, 5),)})
  out = tmp_path / "rows.jsonl"
  assert gpu_parts.main(["--part=attention", "--size=tiny", f"--out={out}"]) == 0
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  assert len(rows) == 4 and all(0 <= row["error"] < 1e-5 and row["ms"] > 0 for row in rows)
