"""Paths that lead nowhere, in every flag that takes one: one line, exit code 2, nothing written."""

import json
import os
import pathlib

import pytest

from tests.forked import Experiment
from tests.pretrained import tiny
from tests.report import fake_runs

# What is there, beside paths that cannot be.
PLACES = {
  "a file": lambda p: p.write_text("text"),
  "a pipe": os.mkfifo,
  "a link to nothing": lambda p: p.symlink_to("nowhere"),
  "a link to itself": lambda p: p.symlink_to(p.name),
  "bytes": lambda p: p.write_bytes(b"\xff\xfe\0"),
  "a locked file": lambda p: (p.write_text("text"), p.chmod(0)),
  "a locked folder": lambda p: p.mkdir(0),
  "a folder that others write": lambda p: p.mkdir(0o555),
}
NAMES = {
  "long": "x" * 300,
  "very long": "x/" * 3000,
  "below a file": "a file/x",
  "below a pipe": "a pipe/x",
  "below a device": "/dev/null/x",
  "below a locked folder": "a locked folder/x",
  "new where others write": "a folder that others write/x",
  "below what is not": "no/such/folder/x",
  "empty": "",
  "no text": "\udcff",
  "two lines": "a\nb",
  "a device": "/dev/full",
  "not for us": "/proc/1/x",
}
TINY = "--config={configs}/rule110.py:tiny"
ELSEWHERE = {"below what is not", "no text", "two lines"}  # where a folder can be made
# Command, the flags of its command lines with {bad} for the path, and the names that would be right there.
FLAGS = {
  "figures.__main__": [
    (("--runs={bad}", "--out=out"), ()),
    (("--runs={run}", "--out={bad}"), ELSEWHERE),
    (("--runs={run}", "--archive={bad}"), ELSEWHERE),
  ],
  "publish": [
    (("--runs={bad}", "--out=out"), ()),
    (("--runs={archive}/none", "--out={bad}"), ()),
    (("--out={archive}", "--readme={bad}"), {"empty"}),
  ],
  "sweep": [
    ((TINY, "--workdir={bad}", "--list"), ELSEWHERE),
    (("--config={bad}", "--workdir=out", "--list"), ()),
  ],
  "rule110": [
    ((TINY, "--workdir={bad}"), ELSEWHERE),
    ((TINY, "--config.train.init_from={bad}", "--workdir=out"), ()),
    (("--config={bad}", "--workdir=out"), ()),
  ],
  "gsm_infinite_data": [
    (("--config={configs}/gsm_infinite_data.py:tiny", "--workdir={bad}"), ELSEWHERE),
    (
      ("--config={configs}/gsm_infinite_data.py:tiny", "--config.data.tokenizer={bad}", "--workdir=out"),
      {"empty"},
    ),
  ],
  "convert": [
    (("--config={configs}/convert.py", "--config.source={bad}"), ()),
    (("--config={configs}/convert.py", "--config.source={checkpoint}", "--config.target={bad}"), ELSEWHERE),
  ],
  "generate": [
    (("--config={configs}/generate.py", "--config.checkpoint={bad}", "--prompt=a"), ()),
    (("--config={configs}/generate.py", "--config.checkpoint={checkpoint}", "--prompts_file={bad}"), ()),
    (
      ("--config={configs}/generate.py", "--config.checkpoint={checkpoint}", "--prompt=a", "--session={bad}"),
      ELSEWHERE - {"below what is not"},
    ),
  ],
  "evaluate": [
    (("--run={bad}",), ()),
    (("--run={run}", "--out={bad}"), ()),
    (("--run={run}", "--rules={bad}"), {"empty"}),
  ],
  "perplexity": [
    (("--checkpoint={checkpoint}", "--files={bad}"), ()),
    (("--checkpoint={bad}", "--files={run}/metrics.jsonl", "--field=kind"), ()),
    (("--checkpoint={bad}", "--files={run}/metrics.jsonl", "--field=kind", "--out={bad}"), ()),
  ],
  "stability": [((TINY, "--passes=1", "--out={bad}"), ELSEWHERE)],
  "takeoff": [
    (("--runs={bad}",), ()),
    (("--runs={run}", "--out={bad}"), ELSEWHERE),
    (("--runs={run}", "--archive={bad}"), ELSEWHERE),
  ],
  "depth": [
    (("--runs={bad}",), ()),
    (("--runs={run}", "--out={bad}"), ELSEWHERE),
    (("--runs={run}", "--archive={bad}"), ELSEWHERE),
  ],
  "demo": [(("--size=tiny", "--workdir={bad}"), ELSEWHERE)],
}


@pytest.fixture
def places(tmp_path):
  """The values for the flags, and the folder that the commands run in."""
  folder = tmp_path / "here"
  folder.mkdir()
  for name, make in PLACES.items():
    make(folder / name)
  run = fake_runs.write(tmp_path / "run", 1, [(0, 0.1), (200, 0.4)], t=4)
  (tmp_path / "archive").mkdir()
  (tmp_path / "archive" / "n1.jsonl").write_text(
    json.dumps({"kind": "run", "step": 0, "config": json.loads((run / "config.json").read_text())}) + "\n"
    + (run / "metrics.jsonl").read_text()
  )  # fmt: skip
  values = {"run": run, "archive": tmp_path / "archive", "configs": "rule110"}
  values["checkpoint"] = tiny.checkpoint(tmp_path / "checkpoint", "jet")
  values["configs"] = pathlib.Path(__file__).parents[2] / "experiments" / "configs"
  return values, folder


def refused(experiment, flags, label, bad, values, folder):
  """Tries one path in one flag."""
  before = sorted(p.name for p in folder.iterdir())
  words = [word.format(bad=bad, **values) for word in flags]
  ended = experiment.run(*words, cwd=folder)
  where = (flags[-1], label, ended)
  assert ended.code == 2 and len(ended.err.strip().splitlines()) == 1 and len(ended.err) < 8000, where
  assert sorted(p.name for p in folder.iterdir()) == before, where


@pytest.mark.parametrize(
  "name", [x if x == "sweep" else pytest.param(x, marks=pytest.mark.slow) for x in FLAGS]
)
def test_a_path_that_leads_nowhere_is_one_line(name, places, tmp_path):
  values, folder = places
  with Experiment(f"sleep_jax.experiments.{name}", tmp_path) as experiment:
    for flags, right in FLAGS[name]:
      for label, bad in ({place: place for place in PLACES} | NAMES).items():
        if label not in right:
          refused(experiment, flags, label, bad, values, folder)
