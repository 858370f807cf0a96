"""Damaged files of a run, and figures of it: one line that names the file, nothing else written, no hang.

The files are config.json, env.json and metrics.jsonl. Each field of each kind of row, and of the config, is
set to each value of a pool; whole files are cut, replaced, made folders, pipes and links.
"""

import functools
import json
import os
import random
import re
import sys
import tracemalloc

import matplotlib.pyplot
import pytest

from sleep_jax.experiments import board, eta, figures, runner
from sleep_jax.report import accuracy, changes, comparison, costs, load, page, tables
from sleep_jax.report.load import RunError
from tests import damage
from tests.report import fake_runs

FIGURES = (
  *(
    figures.rule110.figure_2a,
    figures.rule110.figure_2b,
    figures.depo.figure_3,
    figures.gsm_infinite.figure_4,
    figures.memory.figure,
  ),
  *(costs.costs, changes.sleep_changes, accuracy.demo_curves, accuracy.side_by_side),
)
QUICK = 8
SECONDS = 120  # for one case, on a busy machine
SHARE = {"_exact": 0.5, "_low": 0.4, "_high": 0.6, "_majority": 0.2, "_chance": 0.1}
COST = {"kind": "cost", "step": 400, "wake_ms_per_answer": 0.1, "sleep_ms_per_window": 2.0, "state_bytes": 64}
COST |= {"wake_ms_per_answer_p10": 0.05, "wake_ms_per_answer_p90": 0.3, "tokens_per_s": 10.0}
ENV = {
  "command": ["a.py", "--x"],
  "versions": {"jax": "0.11"},
  "git": {"commit": "abcdef0123", "dirty": True},
}
ENV |= {"backend": "cpu", "devices": ["cpu"], "started": "2026-01-01T00:00:00+00:00", "processes": 1}
OF_ROWS = ("NaN", "-Infinity", [[0.5, "NaN"]], {"0": [[]]}, 2**52, -1e-9, 1.1)
TORN = (b'{"kind": "ev', b"\xff\xfe\n", b"\0" * 50 + b"\n", b"[]\n", b"\n", b'{"kind": "eval"}\n', b"\xf0")
KINDS = {
  "depth 4": (1, {"t": 4}, {}),
  "depth 8": (1, {"t": 8}, {}),
  "two": (2, {"t": 4}, {}),
  "paper": (2, {"t": 32, "num_strings": 4, "num_cells": 24}, {}),
  "depo": (2, {"test_hops": [1, 2], "max_nodes": 6, "max_name": 1}, {"k": (1, 2)}),
  "gsm": (1, {"operations": [2, 3]}, {"op": (2, 3)}),
  "memory": (2, {"task": "recall", "depths": [2], "lengths": [8, 16]}, {"d2_t": (8, 16)}),
}


def make(root, name):
  """A run of one kind, as it is on disk."""
  passes, data, groups = KINDS[name]
  per_eval = {"tokens_per_s": 5.0, "loss_norm": 0.1}
  for letter, numbers in groups.items():
    for number in numbers:
      per_eval |= {f"{letter}{number}{key}": share for key, share in SHARE.items()}
      per_eval |= {f"{letter}{number}_answer_loss": 0.7, f"{letter}{number}_shortcut": 0.3}
      per_eval |= {f"{letter}{number}_asked": 100}
  extra = [
    {"kind": "train", "step": 10, "loss": 1.0, "learning_rate": 0.1},
    fake_runs.sleep_row(400, 2, passes, ("0", "1")),
    COST,
    {"kind": "done", "step": 400, "tokens": 4, "wall_s": 1.0},
  ]
  points = [(0, 0.1), (200, 0.4), (400, 0.6)]
  return fake_runs.write(root / name, passes, points, extra=extra, env=ENV, per_eval=per_eval, **data)


def with_row(lines, number, row, path, value):
  """The lines of a file, in one of which a value is another."""
  changed = json.dumps(damage.with_value(row, path, value)) + "\n"
  return damage.encoded("".join([*lines[:number], changed, *lines[number + 1 :]]))


def with_line(lines, number, line):
  """The lines of a file with one more, which need not end."""
  return b"".join([*(x.encode() for x in lines[:number]), line, *(x.encode() for x in lines[number:])])


def row_cases(text):
  """Every field of the rows of metrics.jsonl with every value, and damage to its lines."""
  lines = text.splitlines(keepends=True)
  for number, line in enumerate(lines):
    row = json.loads(line)
    for path in damage.paths_of(row):
      for value in [*damage.POOL, damage.DEEP, *OF_ROWS]:
        what = f"line {number + 1}: {'.'.join(map(str, path))} = {damage.named(value)}"
        yield what, functools.partial(with_row, lines, number, row, path, value)
  yield from damage.text_cases(text)
  for torn in TORN:
    for at in (0, 1, len(lines)):
      yield f"{torn!r:.20} before line {at + 1}", functools.partial(with_line, lines, at, torn)


def in_place(path, what):
  """Puts something that is no file there."""
  path.unlink()
  if what == "a pipe":
    os.mkfifo(path)
  elif what == "a folder":
    path.mkdir()
  elif what != "nothing":
    path.symlink_to({"a link to a device": "/dev/zero", "a link to nothing": "nowhere"}[what])


NO_FILES = ("a pipe", "a folder", "a link to a device", "a link to nothing", "nothing")


def cases(folder):
  """Every damage to a run: (file, what is wrong, what does it)."""
  made = []
  for path in sorted(folder.iterdir()):
    text = path.read_text()
    by_content = row_cases(text) if path.suffix == ".jsonl" else damage.json_cases(text)
    made += [(path, what, lambda p=path, c=content: p.write_bytes(c())) for what, content in by_content]
    made += [(path, what, lambda p=path, w=what: in_place(p, w)) for what in NO_FILES]
  return made


def listing(root):
  """What lies below a folder, but for what may be written."""
  return sorted(str(p) for p in root.rglob("*") if "out" not in p.parts)


def draw_all(paths, out, save):
  """What `experiments.figures` makes of runs; files of figures only to `save`."""
  runs = figures.load_runs(paths)
  tables.to_markdown(tables.summary_table(runs))
  tables.to_markdown(tables.equal_compute_table(runs))
  for draw in FIGURES:
    try:
      draw(runs)
    except RunError as e:
      damage.one_line(e)
  comparison.note(runs)
  for run in runs:
    load.archive(run, out / "archive")
  figures.load_runs(out / "archive" / "*.jsonl")
  if save:
    curves, others = figures.drawings(runs), figures.about_sleep(runs)
    for drawing in [*curves, *others]:
      drawing.save(out)
    page.write_html(out / "report.html", runs, curves, others)


def tried(root, path, what, do, save):
  """Whether a damage is refused, in a line that names the file. The file is put back."""
  before, there = path.read_bytes(), listing(root)
  do()
  try:
    with damage.limited(SECONDS):
      draw_all([path.parent], root / "out" / path.parent.name, save)
    return False
  except RunError as e:
    text = damage.one_line(e)
    assert path.name in text or path.parent.name in text, (path.name, what, text)
    if found := re.match(r"line (\d+): (\w+)", what):
      assert not re.search(r"line \d", text) or f"line {found[1]} " in text, (what, text)
    return True
  except Exception as e:
    raise AssertionError(f"{path.parent.name}/{path.name}: {what}: {type(e).__name__}: {e}"[:1000]) from e
  finally:
    matplotlib.pyplot.close("all")
    if path.is_dir() and not path.is_symlink():
      path.rmdir()
    path.unlink(missing_ok=True)
    path.write_bytes(before)
    assert listing(root) == there


def fuzz(root, seed, count, save=False):
  """How many of so many damages are refused."""
  folders = [make(root, name) for name in KINDS]
  draw_all(folders, root / "out" / "all", save)  # so that what is refused is the damage
  rng = random.Random(seed)
  by_run = [cases(folder) for folder in folders]
  refused = 0
  for _ in range(count):
    refused += tried(root, *rng.choice(rng.choice(by_run)), save)
  return refused


def test_figures_of_damaged_runs_are_drawn_or_refused_in_one_line(tmp_path):
  assert 0 < fuzz(tmp_path, 0, QUICK) < QUICK


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")  # of labels too long for a page
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 7))
def test_figures_of_damaged_runs_often(seed, tmp_path):
  assert 0 < fuzz(tmp_path, seed, 500, save=seed == 1) < 500


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")
@pytest.mark.parametrize(("field", "value"), [("cpu_s", 2**31), ("cpu_s", 2.0**62), ("tokens", 2**62)])
def test_no_figure_takes_memory_by_a_number_in_a_row(field, value, tmp_path):
  points = [(200, 0.4), (400, 0.6)]
  folder = fake_runs.write(tmp_path / "run", 1, points, per_eval={field: value})
  text = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
  (folder / "metrics.jsonl").write_text(json.dumps(fake_runs.evaluation(0, 0.1, 1)) + "\n" + "".join(text))
  tracemalloc.start()
  try:
    accuracy.side_by_side(figures.load_runs(folder))
    assert tracemalloc.get_traced_memory()[1] < 300e6
  finally:
    tracemalloc.stop()
    matplotlib.pyplot.close("all")


def log_of(folder, what):
  """What stands in place of a run's log."""
  (folder / "logs").mkdir()
  log = folder / "logs" / "run.txt"
  log.write_bytes(b"\xff\xfe\0\n")
  if what == "no folder":
    log.unlink()
    log.parent.rmdir()
    log.parent.write_text("")
  elif what != "bytes":
    in_place(log, what)


@pytest.mark.parametrize("code", [0, 3])
@pytest.mark.parametrize("what", [*NO_FILES, "bytes", "no folder"])
def test_a_log_that_cannot_be_written_stops_no_sweep(what, code, tmp_path):
  log_of(tmp_path, what)
  said = []
  watch = board.Board({"run": eta.Ledger(work=2, steps=2)}, tmp_path / "logs", 1, say=said.append)
  program = f"import sys; print('step 1/2'); sys.stdout.buffer.write(b'\\xff\\n'); sys.exit({code})"
  with damage.limited(SECONDS):
    assert runner.run_all({"run": [sys.executable, "-c", program]}, 1, watch) == {"run": code}
  assert said[-1].startswith("run ended with exit code 3" if code else "run done, 1 of 1")
  assert os.path.lexists(tmp_path / "nowhere") is False
