"""Figures and tables show what the JSON lines say, no more and no less."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.image import imread
from matplotlib.text import Text

from sleep_jax.report import figures, runs
from tests.report import fake_runs

ROOT = Path(__file__).resolve().parents[2]
ONE, TWO, FOUR = [(100, 0.28), (200, 0.32)], [(100, 0.33), (200, 0.52)], [(100, 0.40), (200, 0.59)]
PAPER = {"num_strings": 4, "num_cells": 24}


def lines(drawing: figures.Drawing) -> dict[str, list[tuple[float, float]]]:
  """Label -> points of every line in the first axes."""
  return {
    line.get_label(): list(zip(*line.get_data(), strict=True)) for line in drawing.figure.axes[0].get_lines()
  }


def texts(drawing: figures.Drawing) -> list[str]:
  return [text.get_text() for axes in drawing.figure.axes for text in axes.texts]


def rows_of(path: Path) -> list[dict[str, str]]:
  with open(path, newline="") as file:
    return list(csv.DictReader(file))


# ---- reading -------------------------------------------------------------------------------------


def test_a_torn_last_line_is_left_out(tmp_path):
  fake_runs.write(tmp_path / "a", 1, ONE, tail='{"kind": "eval", "step": 300, "tok')
  (run,) = runs.load_runs(tmp_path / "a")
  assert [row["step"] for row in run.evals] == [100, 200]


def test_a_damaged_line_before_the_last_is_an_error_that_names_it(tmp_path):
  fake_runs.write(
    tmp_path / "a", 1, ONE, tail="not json\n" + json.dumps(fake_runs.evaluation(300, 0.5, 1)) + "\n"
  )
  with pytest.raises(runs.RunError, match="metrics.jsonl line 3"):
    runs.load_runs(tmp_path / "a")


def test_of_a_step_that_was_repeated_the_later_row_counts(tmp_path):
  again = fake_runs.evaluation(200, 0.77, 1)
  fake_runs.write(tmp_path / "a", 1, [*ONE, (300, 0.9)], extra=[again])
  (run,) = runs.load_runs(tmp_path / "a")
  assert [(row["step"], row["exact"]) for row in run.evals] == [(100, 0.28), (200, 0.77), (300, 0.9)]


def test_globs_paths_and_files_between_runs(tmp_path):
  for name, passes in (("n4", 4), ("n1", 1)):
    fake_runs.write(tmp_path / name, passes, ONE)
  (tmp_path / "notes.txt").write_text("no run")
  found = runs.load_runs([tmp_path / "*", tmp_path / "n1"])
  assert [run.name for run in found] == ["n1", "n4"]  # by N, each once


def test_what_is_no_run_is_named(tmp_path):
  (tmp_path / "empty").mkdir()
  with pytest.raises(runs.RunError, match="empty is no run: it has no config.json"):
    runs.load_runs(tmp_path / "*")
  with pytest.raises(runs.RunError, match="no run matches"):
    runs.load_runs(str(tmp_path / "nothing*"))
  fake_runs.write(tmp_path / "a", 1, ONE)
  (tmp_path / "a" / "config.json").write_text("{")
  with pytest.raises(runs.RunError, match="config.json is damaged"):
    runs.load_runs(tmp_path / "a")


# ---- curves --------------------------------------------------------------------------------------


def test_one_seed_is_drawn_as_measured(tmp_path):
  fake_runs.write(tmp_path / "n1", 1, ONE)
  fake_runs.write(tmp_path / "n4", 4, FOUR)
  drawing = figures.demo_curves(runs.load_runs(tmp_path / "*"))
  drawn = lines(drawing)
  assert set(drawn) == {"N = 1", "N = 4", "_constant"}
  assert drawn["N = 4"] == [(0.3328, pytest.approx(40.0)), (0.6656, pytest.approx(59.0))]
  assert [y for _, y in drawn["_constant"]] == pytest.approx([27.8, 27.8])
  assert not drawing.figure.axes[0].collections  # no band from one seed
  assert "best constant 27.8 %" in texts(drawing)


def test_seeds_become_a_mean_and_a_band(tmp_path):
  for seed, shift in enumerate((0.0, 0.03, 0.09)):
    fake_runs.write(tmp_path / f"s{seed}", 2, [(step, exact + shift) for step, exact in TWO], seed=seed)
  drawing = figures.demo_curves(runs.load_runs(tmp_path / "*"))
  assert [y for _, y in lines(drawing)["N = 2"]] == pytest.approx([37.0, 56.0])
  (band,) = drawing.figure.axes[0].collections
  ys = band.get_paths()[0].vertices[:, 1]
  assert (ys.min(), ys.max()) == pytest.approx((33.0, 61.0))
  assert "N = 2 (3 seeds)" in texts(drawing)


def test_a_mean_is_drawn_only_where_every_seed_was_evaluated(tmp_path):
  fake_runs.write(tmp_path / "s0", 2, [(100, 0.3), (200, 0.5), (300, 0.7)], seed=0)
  fake_runs.write(tmp_path / "s1", 2, [(100, 0.4), (300, 0.9), (400, 0.95)], seed=1)
  (curve,) = runs.curves(runs.load_runs(tmp_path / "*"))
  assert curve.tokens == (100 * fake_runs.TOKENS_PER_STEP, 300 * fake_runs.TOKENS_PER_STEP)
  assert curve.mean == pytest.approx((35.0, 80.0))


def test_against_compute_the_same_points_stand_at_the_mean_of_their_cpu_seconds(tmp_path):
  fake_runs.write(tmp_path / "s0", 2, TWO, seed=0, per_eval={"cpu_s": 10.0})
  fake_runs.write(tmp_path / "s1", 2, TWO, seed=1, per_eval={"cpu_s": 30.0})
  drawing = figures.demo_curves(figures.load_runs(str(tmp_path / "*")), by="cpu_s")
  points = [row for row in drawing.rows if row["kind"] == "curve"]
  assert [row["cpu_s"] for row in points] == [20.0] * len(TWO)
  assert [row["exact_percent"] for row in points] == pytest.approx([100 * exact for _, exact in TWO])
  assert drawing.figure.axes[0].get_xlabel() == "CPU seconds of training"


def test_seeds_without_a_common_evaluation_are_a_curve_each(tmp_path):
  fake_runs.write(tmp_path / "s0", 2, [(100, 0.3)], seed=0)
  fake_runs.write(tmp_path / "s1", 2, [(150, 0.4)], seed=1)
  found = runs.curves(runs.load_runs(tmp_path / "*"))
  assert [curve.label for curve in found] == ["N = 2, seed 0", "N = 2, seed 1"]


def test_rows_without_a_number_are_no_points(tmp_path):
  missing = fake_runs.evaluation(300, 0.5, 1)
  del missing["exact"]
  fake_runs.write(
    tmp_path / "a", 1, ONE, extra=[missing, fake_runs.evaluation(400, 0.5, 1) | {"exact": "NaN"}]
  )
  (curve,) = runs.curves(runs.load_runs(tmp_path / "a"))
  assert len(curve.tokens) == 2


def test_what_was_changed_beside_n_is_in_the_label(tmp_path):
  fake_runs.write(tmp_path / "a", 1, ONE, lr=0.003)
  fake_runs.write(tmp_path / "b", 1, ONE, lr=0.01)
  fake_runs.write(tmp_path / "c", 1, ONE, lr=0.01, steps=1600)
  fake_runs.write(tmp_path / "d", 4, FOUR, lr=0.003)
  labels = [label for label, _ in runs.settings(runs.load_runs(tmp_path / "*"))]
  assert labels == [
    "N = 1, Muon lr 0.003",
    "N = 1, Muon lr 0.01, 400 steps",
    "N = 1, Muon lr 0.01, 1600 steps",
    "N = 4, Muon lr 0.003",
  ]


def test_what_a_run_began_with_is_told_by_its_last_name(tmp_path):
  for n, points in ((1, ONE), (4, FOUR)):
    path = fake_runs.write(tmp_path / f"n{n}", n, points) / "config.json"
    config = json.loads(path.read_text())
    config["train"]["init_from"] = f"/far/away/stage1/n{n}_s0"
    path.write_text(json.dumps(config))
  labels = [label for label, _ in runs.settings(runs.load_runs(tmp_path / "*"))]
  assert labels == ["N = 1, from n1_s0", "N = 4, from n4_s0"]


def test_how_often_one_looks_makes_no_second_curve(tmp_path):
  fake_runs.write(tmp_path / "a", 1, ONE, seed=0)
  path = fake_runs.write(tmp_path / "b", 1, ONE, seed=1) / "config.json"
  config = json.loads(path.read_text())
  config["train"]["log_every"] = 99
  config["sleep"]["loops"] = "unroll"
  path.write_text(json.dumps(config))
  assert len(runs.settings(runs.load_runs(tmp_path / "*"))) == 1


def test_labels_of_curves_that_end_together_do_not_overlap(tmp_path):
  for i, last in enumerate((0.95, 0.97, 0.975, 0.98, 0.985, 0.99, 0.20, 0.21)):
    fake_runs.write(tmp_path / f"r{i}", 1 + i % 4, [(100, 0.1), (200, last)], lr=1e-3 * (1 + i))
  drawing = figures.demo_curves(runs.load_runs(tmp_path / "*"))
  drawing.figure.draw_without_rendering()
  labels = drawing.figure.axes[0].texts
  boxes = sorted(
    (Text.get_window_extent(label) for label in labels), key=lambda box: box.y0
  )  # without the arrows
  assert len(boxes) == 9
  assert all(below.y1 <= above.y0 for below, above in zip(boxes, boxes[1:], strict=False))
  frame = drawing.figure.bbox
  assert all(
    frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes
  )


# ---- the paper's figures -------------------------------------------------------------------------


def test_figure_2a_has_the_paper_s_axes_and_one_curve_per_t(tmp_path):
  constants = {"const_exact": 0.0854}
  for t, last in ((4, 0.99), (16, 0.41)):
    points = [(1000, 0.2), (10_000, last)]
    fake_runs.write(tmp_path / f"t{t}", 1, points, t=t, per_eval=constants, **PAPER)
  fake_runs.write(tmp_path / "n2", 2, TWO, t=4, **PAPER)
  drawing = figures.figure_2a(runs.load_runs(tmp_path / "*"))
  axes = drawing.figure.axes[0]
  assert axes.get_xlim() == (0, 40)
  assert axes.get_ylim()[0] == 25
  drawn = lines(drawing)
  assert set(drawn) == {"N = 1, t = 4", "N = 1, t = 16"}
  assert drawn["N = 1, t = 16"] == [(3.328, pytest.approx(20.0)), (33.28, pytest.approx(41.0))]
  assert "t = 4: 8.5 %,  t = 16: 8.5 %" in drawing.figure.get_supxlabel()


def test_figure_2a_shows_a_curve_that_stays_below_the_paper_s_axis(tmp_path):
  fake_runs.write(tmp_path / "t4", 1, [(100, 0.3), (200, 0.9)], t=4)
  fake_runs.write(tmp_path / "t16", 1, [(100, 0.09), (200, 0.1)], t=16)
  drawing = figures.figure_2a(runs.load_runs(tmp_path / "*"))
  assert drawing.figure.axes[0].get_ylim()[0] == 0
  assert [y for _, y in lines(drawing)["_constant"]] == pytest.approx([27.8, 27.8])
  assert "the paper's axis begins here" in texts(drawing)


def test_figure_2b_shows_the_constant_and_what_the_paper_reports(tmp_path):
  for passes, last in ((1, 0.1), (4, 0.34)):
    fake_runs.write(tmp_path / f"n{passes}", passes, [(100_000, 0.09), (600_000, last)], t=32, **PAPER)
  fake_runs.write(tmp_path / "t4", 1, ONE, t=4, **PAPER)
  drawing = figures.figure_2b(runs.load_runs(tmp_path / "*"))
  drawn = lines(drawing)
  assert set(drawn) == {"N = 1", "N = 4", "_constant"}
  assert drawn["N = 4"][-1] == (pytest.approx(1.9968), pytest.approx(34.0))
  assert drawn["_constant"][0][1] == 9.95
  assert "best constant 9.95 %" in texts(drawing)
  strip = drawing.figure.axes[1]
  assert [line.get_ydata()[0] for line in strip.get_lines()] == [10, 20, 30]
  assert all(line.get_markerfacecolor() == "white" for line in strip.get_lines())
  assert [text.get_text().replace("\n", " ") for text in strip.texts][1:] == [
    "N = 1 about 10 %",
    "N = 2 about 20 %",
    "N = 3, 4 above 30 %",
  ]


def test_figure_2b_refuses_another_layout(tmp_path):
  fake_runs.write(tmp_path / "a", 1, ONE, t=32)  # two strings of 12
  with pytest.raises(runs.RunError, match="figure 2b"):
    figures.figure_2b(runs.load_runs(tmp_path / "a"))


def test_sleep_changes_maps_windows_and_passes(tmp_path):
  for passes in (1, 3):
    extra = [fake_runs.sleep_row(100, 2, passes), fake_runs.sleep_row(200, 4, passes, ("1", "3"))]
    fake_runs.write(tmp_path / f"n{passes}", passes, ONE, extra=extra)
  drawing = figures.sleep_changes(runs.load_runs(tmp_path / "*"))
  maps = [axes.get_images()[0].get_array() for axes in drawing.figure.axes if axes.get_images()]
  assert sorted(m.shape for m in maps) == [
    (4, 1),
    (4, 1),
    (4, 3),
    (4, 3),
  ]  # two blocks, two N, the newest row
  wanted = {(w, p): 1 / (w + p - 1) for w in range(1, 5) for p in range(1, 4)}
  got = {
    (r["window"], r["pass"]): r["change"] for r in drawing.rows if r["num_passes"] == 3 and r["block"] == "3"
  }
  assert got == pytest.approx(wanted)


@pytest.mark.parametrize(
  "draw", [figures.demo_curves, figures.figure_2a, figures.figure_2b, figures.sleep_changes]
)
def test_runs_without_the_rows_are_refused_in_one_line(tmp_path, draw):
  fake_runs.write(tmp_path / "a", 1, [], t=32, **PAPER)
  with pytest.raises(runs.RunError) as error:
    draw(runs.load_runs(tmp_path / "a"))
  assert "\n" not in str(error.value)


# ---- files ---------------------------------------------------------------------------------------


def test_the_csv_holds_exactly_what_is_drawn(tmp_path):
  fake_runs.write(tmp_path / "n1", 1, ONE)
  fake_runs.write(tmp_path / "n2s0", 2, TWO, seed=0)
  fake_runs.write(tmp_path / "n2s1", 2, FOUR, seed=1)
  drawing = figures.demo_curves(runs.load_runs(tmp_path / "n*"))
  png, svg, table = drawing.save(tmp_path / "figures")
  written = rows_of(table)
  drawn = lines(drawing)
  for label in ("N = 1", "N = 2"):
    points = [(float(r["tokens_M"]), float(r["exact_percent"])) for r in written if r["series"] == label]
    assert points == drawn[label]
  assert [float(r["exact_percent"]) for r in written if r["kind"] == "constant"] == pytest.approx([27.8])
  spread = [(float(r["low_percent"]), float(r["high_percent"])) for r in written if r["series"] == "N = 2"]
  assert spread == [pytest.approx((33.0, 40.0)), pytest.approx((52.0, 59.0))]
  assert {r["seeds"] for r in written if r["series"] == "N = 2"} == {"2"}
  pixels = imread(png)
  assert (
    pixels.shape[1] > 900 and pixels[..., :3].min() < 0.3 and (pixels[0, 0, :3] == 1).all()
  )  # ink on white
  assert ElementTree.parse(svg).getroot().tag.endswith("svg")


def test_the_same_runs_give_the_same_svg(tmp_path):
  fake_runs.write(tmp_path / "a", 1, ONE)
  found = runs.load_runs(tmp_path / "a")
  assert figures.demo_curves(found).svg() == figures.demo_curves(found).svg()


def test_drawing_needs_no_display_and_no_pyplot(tmp_path):
  fake_runs.write(tmp_path / "a", 1, ONE)
  program = (
    "import sys; from sleep_jax.report import figures, runs; "
    "figures.demo_curves(runs.load_runs(sys.argv[1])).save(sys.argv[2]); "
    "assert 'matplotlib.pyplot' not in sys.modules and 'tkinter' not in sys.modules"
  )
  command = [sys.executable, "-c", program, str(tmp_path / "a"), str(tmp_path / "out")]
  done = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, timeout=60, env={"MPLBACKEND": "TkAgg"}
  )
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "out" / "demo_curves.png").stat().st_size > 1000


# ---- tables --------------------------------------------------------------------------------------


def test_the_table_is_of_the_last_evaluation_and_invents_nothing(tmp_path):
  cost = {
    "kind": "cost",
    "step": 200,
    "wake_ms_per_answer": 1.25,
    "sleep_ms_per_window": 8.5,
    "state_bytes": 16384,
  }
  later = {
    "kind": "train",
    "step": 290,
    "tokens": 290 * fake_runs.TOKENS_PER_STEP,
    "loss": 0.1,
    "cpu_s": 99.0,
  }
  fake_runs.write(tmp_path / "a", 4, FOUR, extra=[cost, later])
  fake_runs.write(tmp_path / "b", 4, [], seed=1, extra=[later])
  done, begun = figures.summary_table(runs.load_runs(tmp_path / "*"))
  assert done == {
    "run": "a", "num_passes": 4, "rollout_steps": 4, "seed": 0, "muon_lr": 3e-3, "steps": 200,
    "tokens": 665_600, "exact": 0.59, "bit": 0.59**0.5, "const_exact": 0.278, "const_bit": 0.527,
    "cpu_s": pytest.approx(55.0), "wake_ms_per_answer": 1.25, "sleep_ms_per_window": 8.5,
    "state_bytes": 16384,
  }  # fmt: skip
  assert (begun["steps"], begun["cpu_s"]) == (290, 99.0)
  for key in ("exact", "bit", "const_exact", "wake_ms_per_answer", "state_bytes"):
    assert begun[key] is None
  header, rule, first, second = figures.to_markdown([done, begun]).splitlines()
  assert header.count("|") == rule.count("|") == first.count("|") == second.count("|")
  assert "| 59.0 % |" in first and "not measured" not in first
  assert second.count("not measured") == 7


def test_equal_compute_takes_what_all_runs_spent(tmp_path):
  fake_runs.write(tmp_path / "n1", 1, [(100, 0.28), (400, 0.38)])  # 7.5 and 30 CPU s
  fake_runs.write(tmp_path / "n1_long", 1, [(400, 0.42), (800, 0.70)], lr=0.01)  # 30 and 60
  fake_runs.write(tmp_path / "n4", 4, [(100, 0.40), (200, 0.59), (400, 0.98)])  # 27.5, 55, 110
  table = {row["run"]: row for row in figures.equal_compute_table(runs.load_runs(tmp_path / "*"))}
  assert {row["equal_cpu_s"] for row in table.values()} == {30.0}
  assert {name: row["equal_exact"] for name, row in table.items()} == {
    "n1": 0.38,
    "n1_long": 0.42,
    "n4": 0.40,
  }
  assert table["n4"]["equal_at"] == pytest.approx(27.5)
  assert {row["longest_cpu_s"] for row in table.values()} == {60.0}
  assert {name: row["longest_exact"] for name, row in table.items()} == {
    "n1": None,
    "n1_long": 0.70,
    "n4": 0.59,
  }


# ---- the command ---------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "-m", "experiments.figures", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )


def test_the_command_draws_what_the_runs_allow(tmp_path):
  for passes in (1, 4):
    extra = [fake_runs.sleep_row(200, 2, passes)]
    fake_runs.write(tmp_path / "runs" / f"n{passes}", passes, FOUR, extra=extra)
  done = command(f"--runs={tmp_path}/runs/*", f"--out={tmp_path}/out")
  assert done.returncode == 0, done.stderr
  assert "| n4 | 4 |" in done.stdout and "59.0 %" in done.stdout
  names = {path.name for path in (tmp_path / "out").iterdir()}
  drawn = ("demo_curves", "demo_compute", "sleep_changes")
  assert names == {f"{n}.{e}" for n in drawn for e in ("png", "svg", "csv")} | {"report.html"}


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["--runs=ROOT/*"], "empty is no run: it has no config.json"),
    (["--runs=ROOT/empty/a", "--out=ROOT/empty/a/config.json"], "--out"),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, arguments, said):
  fake_runs.write(tmp_path / "empty" / "a", 1, ONE)
  done = command(f"--out={tmp_path}/out", *(a.replace("ROOT", str(tmp_path)) for a in arguments))
  assert done.returncode == 2
  assert said in done.stderr and "Traceback" not in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1
