"""One page of ratios: nothing is timed that is not equal, and what is absent or failed is said."""

import json
import os

import numpy as np
import pytest

from sleep_jax.benchmarks import measure, report, training
from sleep_jax.kernels.measure import bench

TINY = report.SIZES["tiny"]


def given(peers=False, checkpoint="nowhere"):
  return report.Context(TINY, 1, report.pathlib.Path(checkpoint), peers)


@pytest.fixture
def whole_machine(monkeypatch):
  """The command keeps its process on some cores; the tests' process is to stay on all."""
  monkeypatch.setattr(measure, "pin", lambda threads: threads)


@pytest.fixture
def no_clock(monkeypatch):
  def refuse(*args, **kwargs):
    raise ValueError("something was timed")

  monkeypatch.setattr(measure, "interleave", refuse)
  monkeypatch.setattr(bench, "measure", refuse)


def test_a_ratio_is_the_rival_s_time_over_ours():
  line = report.row("training", "demo", "PyTorch", 2.0, 3.0, "1e-07")
  assert line["ratio"] == 1.5 and line["state"] == "measured"
  assert report.row("training", "demo", "PyTorch", 2.0)["ratio"] is None


def test_a_training_step_that_differs_is_never_timed(monkeypatch, no_clock):
  wrong = {"loss": 1e-7, "grad_norm": 1e-7, "gradient": 0.5, "update": 1e-4}
  monkeypatch.setattr(training, "compared", lambda cfg, task: wrong)
  (line,) = report.collect(["training"], given(peers=True))
  assert line["state"].startswith("failed: the PyTorch model differs from ours")
  assert line["ours ms"] is None and line["ratio"] is None


@pytest.mark.parametrize("value", [1.5, np.nan])
def test_a_kernel_that_differs_is_never_timed(monkeypatch, no_clock, value):
  right = [np.ones(3), np.ones(3)]
  monkeypatch.setattr(bench, "exact", lambda *args: right)
  wrong = bench.Contestant("xla", lambda: [np.ones(3), np.full(3, value)])
  monkeypatch.setattr(bench, "jax_contestants", lambda *args: [wrong])
  lines = report.collect(["kernels"], given())
  assert len(lines) == len(bench.MODES)
  assert all(line["state"].startswith("failed: gated_delta, A, ") and line["ratio"] is None for line in lines)


def test_tokens_that_differ_are_a_failure(monkeypatch, tmp_path):
  def speeds(*args):
    raise SystemExit("failed: the tokens differ: [1], [2]")

  (tmp_path / "config.json").touch()
  monkeypatch.setattr(report.decoding, "speeds", speeds)
  (line,) = report.collect(["decoding"], given(peers=True, checkpoint=tmp_path))
  assert line["state"] == "failed: the tokens differ: [1], [2]"


@pytest.mark.parametrize(("peers", "said"), [(False, "make peers"), (True, "make smollm2")])
def test_what_is_not_installed_is_absent(peers, said):
  (line,) = report.collect(["decoding"], given(peers=peers))
  assert line["state"].startswith("absent: ") and said in line["state"]


@pytest.mark.parametrize(("failing", "code"), [(False, 0), (True, 1)])
def test_a_failure_alone_makes_exit_code_1(tmp_path, monkeypatch, whole_machine, failing, code):
  def cases(context):
    def slow():
      return [report.row("depth", "slow", "written out", 9.0, 1.0)]

    def bad():
      raise AssertionError("\nNot equal\n x: 1\n")

    yield "slow", slow
    if failing:
      yield "bad", bad
    yield "last", slow

  monkeypatch.setitem(report.SECTIONS, "depth", cases)
  assert report.main(["--size=tiny", "--sections=depth", f"--out={tmp_path}"]) == code
  page = json.loads((tmp_path / "report.json").read_text())
  assert {"machine", "versions", "commit", "date", "cores"} <= page["facts"].keys()
  states = [line["state"] for line in page["rows"]]
  assert states == ["measured", *(["failed: Not equal x: 1"] if failing else []), "measured"]
  text = (tmp_path / "report.md").read_text()
  assert "| depth | slow | written out |" in text and page["facts"]["machine"] in text


@pytest.mark.slow
def test_a_tiny_report_measures_every_section(tmp_path, whole_machine):
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
  assert report.main(["--size=tiny", f"--threads={cores}", f"--out={tmp_path}"]) == 0
  rows = json.loads((tmp_path / "report.json").read_text())["rows"]
  assert {line["what"] for line in rows} == set(report.SECTIONS)
  timed = [line for line in rows if line["what"] != "decoding"]
  assert all(line["ours ms"] > 0 for line in timed)
