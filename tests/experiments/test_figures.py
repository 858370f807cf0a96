"""The paper's figures, and the command that draws whatever some runs allow."""

import pytest

from sleep_jax.experiments import figures
from sleep_jax.experiments.figures import rule110
from sleep_jax.report.load import RunError
from tests.forked import Experiment
from tests.report import fake_runs
from tests.report.test_figures import FOUR, ONE, TWO, legend, lines, texts

PAPER = {"num_strings": 4, "num_cells": 24}


def test_the_tests_speak_of_rule_110_as_the_experiment_does():
  assert fake_runs.EXPERIMENT == rule110.EXPERIMENT


def test_figure_2a_has_the_paper_s_axes_and_one_curve_per_t(tmp_path):
  constants = {"const_exact": 0.0854}
  for t, last in ((4, 0.99), (16, 0.41)):
    points = [(1000, 0.2), (10_000, last)]
    fake_runs.write(tmp_path / f"t{t}", 1, points, t=t, per_eval=constants, **PAPER)
  fake_runs.write(tmp_path / "n2", 2, TWO, t=4, **PAPER)
  drawing = rule110.figure_2a(figures.load_runs(tmp_path / "*"))
  axes = drawing.figure.axes[0]
  assert axes.get_xlim() == (0, 40)
  assert axes.get_ylim()[0] == 25
  drawn = lines(drawing)
  assert set(drawn) == {"N = 1, t = 4", "N = 1, t = 16"}
  assert drawn["N = 1, t = 16"] == [(3.328, pytest.approx(20.0)), (33.28, pytest.approx(41.0))]
  assert "t = 4: 8.5 %,  t = 16: 8.5 %" in drawing.figure.get_supxlabel()
  assert "one seed" in legend(drawing)


def test_figure_2a_shows_a_curve_that_stays_below_the_paper_s_axis(tmp_path):
  fake_runs.write(tmp_path / "t4", 1, [(100, 0.3), (200, 0.9)], t=4)
  fake_runs.write(tmp_path / "t16", 1, [(100, 0.09), (200, 0.1)], t=16)
  drawing = rule110.figure_2a(figures.load_runs(tmp_path / "*"))
  assert drawing.figure.axes[0].get_ylim()[0] == 0
  assert [y for _, y in lines(drawing)["_constant"]] == pytest.approx([27.8, 27.8])
  assert "the paper's axis begins here" in texts(drawing)


def test_figure_2b_shows_the_constant_and_what_the_paper_reports(tmp_path):
  for passes, last in ((1, 0.1), (4, 0.34)):
    fake_runs.write(tmp_path / f"n{passes}", passes, [(100_000, 0.09), (600_000, last)], t=32, **PAPER)
  fake_runs.write(tmp_path / "t4", 1, ONE, t=4, **PAPER)
  drawing = rule110.figure_2b(figures.load_runs(tmp_path / "*"))
  drawn = lines(drawing)
  assert set(drawn) == {"N = 1", "N = 4", "_constant"}
  assert drawn["N = 4"][-1] == (pytest.approx(1.9968), pytest.approx(34.0))
  assert drawn["_constant"][0][1] == 9.95
  assert "best constant answer: 9.9 %" in legend(drawing) or "best constant answer: 10.0 %" in legend(drawing)
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
  with pytest.raises(RunError, match="figure 2b"):
    rule110.figure_2b(figures.load_runs(tmp_path / "a"))


@pytest.mark.parametrize("draw", [rule110.figure_2a, rule110.figure_2b])
def test_runs_without_the_rows_are_refused_in_one_line(tmp_path, draw):
  fake_runs.write(tmp_path / "a", 1, [], t=32, **PAPER)
  with pytest.raises(RunError) as error:
    draw(figures.load_runs(tmp_path / "a"))
  assert "\n" not in str(error.value)


def test_every_task_gets_its_figure(tmp_path):
  for t in (4, 8):
    fake_runs.write(tmp_path / f"a{t}", 1, [(400, 0.9)], t=t, **PAPER)
  for passes in (1, 2):
    fake_runs.write(tmp_path / f"b{passes}", passes, [(400, 0.1)], t=32, **PAPER)
    fake_runs.write(tmp_path / f"c{passes}", passes, [(400, 0.1)], t=3)
  drawn = {drawing.name: drawing.rows for drawing in figures.drawings(figures.load_runs(tmp_path / "*"))}
  assert list(drawn) == ["figure_2a", "figure_2b", "demo_curves", "demo_compute"]
  assert {row["depth"] for row in drawn["figure_2a"] if row["kind"] == "curve"} == {4, 8}


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(tmp_path_factory):
  with Experiment("experiments.figures.__main__", tmp_path_factory.mktemp("scratch")) as experiment:
    yield experiment.run


def test_the_command_draws_what_the_runs_allow(command, tmp_path):
  for passes in (1, 4):
    extra = [fake_runs.sleep_row(200, 2, passes), {"kind": "done", "step": 200}]
    fake_runs.write(tmp_path / "runs" / f"n{passes}", passes, FOUR, extra=extra[: 1 + (passes == 4)])
  done = command(f"--runs={tmp_path}/runs/*", f"--out={tmp_path}/out", f"--archive={tmp_path}/kept")
  assert done.code == 0, done.err
  assert "| n4 | 4 |" in done.out and "59.0 %" in done.out
  names = {path.name for path in (tmp_path / "out").iterdir()}
  drawn = ("demo_curves", "demo_compute", "sleep_changes")
  assert names == {f"{n}.{e}" for n in drawn for e in ("png", "svg", "csv")} | {"report.html"}
  assert [path.name for path in (tmp_path / "kept").iterdir()] == ["n4.jsonl"]  # n1 goes on


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["--runs=ROOT/*"], "empty is no run: it has no config.json"),
    (["--runs=ROOT/empty/a", "--out=ROOT/empty/a/config.json"], "--out"),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_2(command, tmp_path, arguments, said):
  fake_runs.write(tmp_path / "empty" / "a", 1, ONE)
  done = command(f"--out={tmp_path}/out", *(a.replace("ROOT", str(tmp_path)) for a in arguments))
  assert done.code == 2
  assert said in done.err and "Traceback" not in done.err
  assert len(done.err.strip().splitlines()) == 1
