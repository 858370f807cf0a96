"""The README's table is regenerated from the runs' files, byte for byte, and nothing else of it changes."""

import pathlib

import pytest

from tests.forked import Experiment
from tests.report import fake_runs

BLOCK = "<!-- demo: written by `python -m experiments.publish`, do not edit -->\nold\n<!-- demo: end -->"


@pytest.fixture(scope="module")
def publish(tmp_path_factory):
  with Experiment("experiments.publish", tmp_path_factory.mktemp("scratch")) as experiment:
    yield experiment.run


def write_runs(folder: pathlib.Path, kinds: tuple[str, ...] = ("done",)) -> None:
  env = {"started": "2026-11-29T10:00:00+00:00", "git": {"commit": "0123456789", "dirty": False}}
  env |= {"versions": {"jax": "0.12.0"}, "host": "secret-host"}
  for passes, ends in ((1, (0.3, 0.4)), (4, (0.8, 0.9))):
    for seed, exact in enumerate(ends):
      extra = [fake_runs.sleep_row(400, 2, passes), *({"kind": kind, "step": 400} for kind in kinds)]
      points = [(200, 0.25), (400, exact)]
      fake_runs.write(folder / f"n{passes}_s{seed}", passes, points, seed=seed, extra=extra, env=env)


def test_the_block_comes_from_the_files_and_is_the_same_when_made_again(publish, tmp_path):
  write_runs(tmp_path / "demo")
  readme = tmp_path / "README.md"
  readme.write_text(f"# before\n\n{BLOCK}\n\nafter\n")
  out = tmp_path / "results"
  done = publish(f"--runs={tmp_path}/demo/n*", f"--out={out}", f"--readme={readme}")
  assert done.code == 0, done.err
  first = readme.read_text()
  assert first.startswith("# before\n\n<!-- demo: written") and first.endswith(
    "<!-- demo: end -->\n\nafter\n"
  )
  assert (out / "table.md").read_text() in first and "\nold\n" not in first
  assert "35.0 % (0 - 99)" in first and "30.0, 40.0" in first and "80.0, 90.0" in first
  assert "Seeds 0 to 1. Measured on 2026-11-29, commit 0123456, jax 0.12.0." in first
  assert {p.name for p in out.glob("*.jsonl")} == {f"n{n}_s{s}.jsonl" for n in (1, 4) for s in (0, 1)}
  assert (out / "demo.png").stat().st_size > 10_000 and not list(out.glob("*.svg"))
  assert not any("secret-host" in path.read_text() for path in out.glob("*.jsonl"))
  again = publish(f"--out={out}", f"--readme={readme}")
  assert again.code == 0, again.err
  assert readme.read_text() == first


@pytest.mark.parametrize("fault", ["unfinished", "markers"])
def test_what_cannot_be_published_is_one_line(publish, tmp_path, fault):
  write_runs(tmp_path / "demo", () if fault == "unfinished" else ("done",))
  readme = tmp_path / "README.md"
  readme.write_text("no markers\n" if fault == "markers" else BLOCK)
  done = publish(f"--runs={tmp_path}/demo/n*", f"--out={tmp_path}/results", f"--readme={readme}")
  assert done.code == 2 and len(done.err.strip().splitlines()) == 1, done.err
  assert {"unfinished": "--runs: not finished: n1_s0", "markers": "--readme: needs the demo's two"}[
    fault
  ] in done.err
  assert not (tmp_path / "results").exists()
