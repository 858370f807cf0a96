"""Figures show what the JSON lines say, no more and no less, and say what they show."""

import csv
import itertools
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.image import imread
from matplotlib.text import Text

from sleep_jax.report import accuracy, changes, costs, panels
from sleep_jax.report.drawing import Drawing
from sleep_jax.report.load import RunError
from tests.report import fake_runs

ROOT = Path(__file__).resolve().parents[2]
ONE, TWO, FOUR = [(100, 0.28), (200, 0.32)], [(100, 0.33), (200, 0.52)], [(100, 0.40), (200, 0.59)]


def lines(drawing: Drawing) -> dict[str, list[tuple[float, float]]]:
  """Label -> points of every line in the first axes."""
  return {
    line.get_label(): list(zip(*line.get_data(), strict=True)) for line in drawing.figure.axes[0].get_lines()
  }


def texts(drawing: Drawing) -> list[str]:
  return [text.get_text() for axes in drawing.figure.axes for text in axes.texts]


def legend(drawing: Drawing) -> list[str]:
  return [text.get_text() for legend in drawing.figure.legends for text in legend.get_texts()]


def seeds(folder: Path, passes: int, points, shifts) -> None:
  for seed, shift in enumerate(shifts):
    moved = [(step, exact + shift) for step, exact in points]
    fake_runs.write(folder / f"n{passes}s{seed}", passes, moved, seed=seed)


# ---- curves --------------------------------------------------------------------------------------


# A layout that found no room is a warning. What the collector finds of other tests is not this one's.
@pytest.mark.filterwarnings("error", "ignore::ResourceWarning")
def test_runs_that_differ_in_many_settings_get_letters_which_the_legend_explains(tmp_path):
  many = {
    "embed_dim": 16,
    "mlp_dim": 32,
    "window": 8,
    "embed_std": 2.5,
    "norm_eps": 1e-5,
    "dtype": "bfloat16",
  }
  fake_runs.write(tmp_path / "a", 2, TWO)
  fake_runs.write(tmp_path / "b", 2, ONE, **many)
  fake_runs.write(tmp_path / "c", 4, FOUR)
  drawing = accuracy.demo_curves(fake_runs.read(tmp_path / "*"))
  written = drawing.save(tmp_path)
  page = drawing.figure.bbox
  ends = [text for axes in drawing.figure.axes for text in axes.texts]
  assert sorted(text.get_text() for text in ends) == ["N = 2, A", "N = 2, B", "N = 4, C"]
  assert all(0 <= text.get_window_extent().x0 < text.get_window_extent().x1 <= page.width for text in ends)
  explained = [text for text in legend(drawing) if text[:3] in ("A: ", "B: ", "C: ")]
  assert len(explained) == 3 and sum("embed_dim 16" in " ".join(text.split()) for text in explained) == 1
  assert max(len(line) for text in explained for line in text.splitlines()) < 120
  assert "N = 2, dtype bfloat16, embed_dim 16" in written[2].read_text()  # rows keep all of a label


def test_one_seed_is_drawn_as_measured(tmp_path):
  fake_runs.write(tmp_path / "n1", 1, ONE)
  fake_runs.write(tmp_path / "n4", 4, FOUR, per_eval={"low": None})
  drawing = accuracy.demo_curves(fake_runs.read(tmp_path / "*"))
  drawn = lines(drawing)
  assert set(drawn) == {"N = 1", "N = 4", "_constant"}
  assert drawn["N = 4"] == [(0.3328, pytest.approx(40.0)), (0.6656, pytest.approx(59.0))]
  assert [y for _, y in drawn["_constant"]] == pytest.approx([27.8, 27.8])
  (band,) = drawing.figure.axes[0].collections  # of N = 1: the other's evaluations carry no interval
  ys = band.get_paths()[0].vertices[:, 1]
  assert (ys.min(), ys.max()) == pytest.approx((26.0, 34.0))
  assert texts(drawing) == ["N = 1", "N = 4"]
  said = ["one seed", "95 % interval over the held-out sequences", "best constant answer: 27.8 %"]
  assert legend(drawing) == said
  assert drawing.figure.get_suptitle() == "Rule 110, t = 4: exact accuracy by passes of sleep (N)"


def test_seeds_become_thin_lines_a_mean_and_its_interval(tmp_path):
  seeds(tmp_path, 2, TWO, (0.0, 0.03, 0.09))
  drawing = accuracy.demo_curves(fake_runs.read(tmp_path / "*"))
  drawn = lines(drawing)
  assert [y for _, y in drawn["N = 2"]] == pytest.approx([37.0, 56.0])
  for seed, last in enumerate((52.0, 55.0, 61.0)):
    assert drawn[f"_N = 2, seed {seed}"][1] == (0.6656, pytest.approx(last))
  widths = {line.get_label(): line.get_linewidth() for line in drawing.figure.axes[0].get_lines()}
  assert widths["N = 2"] >= 2 * widths["_N = 2, seed 0"]
  (band,) = drawing.figure.axes[0].collections
  ys = band.get_paths()[0].vertices[:, 1]
  reach = 4.3027 * np.std([0, 3, 9], ddof=1) / np.sqrt(3)
  assert (ys.min(), ys.max()) == pytest.approx((37.0 - reach, 56.0 + reach), rel=1e-4)
  said = ["mean over 3 seeds", "one seed", "95 % interval of the mean", "best constant answer: 27.8 %"]
  assert legend(drawing) == said


def test_side_by_side_are_the_two_curves(tmp_path):
  seeds(tmp_path, 1, ONE, (0.0, 0.1))
  seeds(tmp_path, 4, FOUR, (0.0, 0.1))
  runs = fake_runs.read(tmp_path / "*")
  both = accuracy.side_by_side(runs)
  for axes, by in zip(both.figure.axes, ("tokens", "cpu_s"), strict=True):
    alone = accuracy.demo_curves(runs, by=by)
    assert axes.get_xlabel() == alone.figure.axes[0].get_xlabel()
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert drawn == {
      line.get_label(): line.get_xydata().tolist() for line in alone.figure.axes[0].get_lines()
    }
  assert {row["axis"] for row in both.rows} == {"tokens_M", "cpu_s"}


# ---- labels --------------------------------------------------------------------------------------

ENDS = [
  (0.95, 0.97, 0.975, 0.98, 0.985, 0.99, 0.20, 0.21),
  (0.5,) * 8,
  (0.99, 0.01, 0.99, 0.01, 0.5, 0.5, 0.28, 0.27),
  tuple(np.linspace(0.3, 0.34, 8)),
]


def boxes(drawing: Drawing) -> list:
  drawing.figure.draw_without_rendering()
  return [Text.get_window_extent(text) for axes in drawing.figure.axes for text in axes.texts]


@pytest.mark.parametrize("last", ENDS)
def test_labels_of_curves_that_end_together_do_not_overlap(tmp_path, last):
  for i, exact in enumerate(last):
    fake_runs.write(tmp_path / f"r{i}", 1 + i % 4, [(100, 0.1), (200, exact)], lr=1e-3 * (1 + i))
  drawing = accuracy.demo_curves(fake_runs.read(tmp_path / "*"))
  there = boxes(drawing)
  assert len(there) == 8
  assert not any(a.overlaps(b) for a, b in itertools.combinations(there, 2))
  page = drawing.figure.bbox
  assert all(page.x0 <= b.x0 and b.x1 <= page.x1 and page.y0 <= b.y0 and b.y1 <= page.y1 for b in there)


def test_a_label_stands_at_the_last_point_and_nothing_leads_to_it(tmp_path):
  fake_runs.write(tmp_path / "n4", 4, [(100, 0.2), (400, 0.9)], steps=400)  # ends where the next goes on
  fake_runs.write(tmp_path / "n1", 1, [(100, 0.2), (400, 0.3), (1600, 0.5)], steps=1600)
  drawing = accuracy.demo_curves(fake_runs.read(tmp_path / "*"))
  axes = drawing.figure.axes[0]
  there = dict(zip(texts(drawing), boxes(drawing), strict=True))
  for label, points in lines(drawing).items():
    if label.startswith("_"):
      continue
    x, y = axes.transData.transform(points[-1])
    box = there[label]
    away = np.hypot(max(box.x0 - x, 0, x - box.x1), max(box.y0 - y, 0, y - box.y1))
    assert away < 2 * box.height, label
  assert all(text.arrow_patch is None for text in axes.texts)
  colours = {text.get_text(): text.get_color() for text in axes.texts}
  assert all(
    line.get_color() == colours[line.get_label()] for line in axes.get_lines() if line.get_label() in colours
  )


# ---- what sleep did and cost ---------------------------------------------------------------------


def test_sleep_changes_maps_windows_and_passes(tmp_path):
  for passes in (1, 3):
    extra = [fake_runs.sleep_row(100, 2, passes), fake_runs.sleep_row(200, 4, passes, ("1", "3"))]
    fake_runs.write(tmp_path / f"n{passes}", passes, ONE, extra=extra)
  drawing = changes.sleep_changes(fake_runs.read(tmp_path / "*"))
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
  assert "one seed" in drawing.figure.get_suptitle() and "t = 4" in drawing.figure.get_suptitle()


@pytest.mark.parametrize("largest", [0.3, 1.0, 1.6, 40.0])
def test_the_colours_cover_every_value(tmp_path, largest):
  row = fake_runs.sleep_row(200, 2, 2) | {"change": {"1": [[1.0, largest], [0.0, largest / 2]]}}
  fake_runs.write(tmp_path / "n2", 2, ONE, extra=[row])
  drawing = changes.sleep_changes(fake_runs.read(tmp_path / "*"))
  images = [image for axes in drawing.figure.axes for image in axes.get_images()]
  assert images and all(image.get_clim() == (0, max(1.0, largest)) for image in images)


def test_sleep_changes_are_averaged_over_seeds_with_their_interval(tmp_path):
  for seed, value in enumerate((0.2, 0.4, 0.9)):
    row = fake_runs.sleep_row(200, 1, 1) | {"change": {"1": [[value]]}}
    fake_runs.write(tmp_path / f"s{seed}", 1, ONE, seed=seed, extra=[row])
  drawing = changes.sleep_changes(fake_runs.read(tmp_path / "*"))
  (row,) = drawing.rows
  assert (row["seeds"], row["change"]) == (3, pytest.approx(0.5))
  assert row["half_interval"] == pytest.approx(
    4.3027 * np.std([0.2, 0.4, 0.9], ddof=1) / np.sqrt(3), rel=1e-4
  )
  assert texts(drawing)[:2] == ["0.50", f"± {row['half_interval']:.2f}"]
  assert "mean over 3 seeds" in drawing.figure.get_suptitle()


def test_costs_are_drawn_with_their_spread_and_old_rows_without(tmp_path):
  old = {
    "kind": "cost",
    "step": 200,
    "wake_ms_per_answer": 0.12,
    "sleep_ms_per_window": 0.3,
    "state_bytes": 9,
  }
  ends = {f"{key}_{p}": v for key in costs.PANELS for p, v in (("p10", 0.1), ("p90", 0.5))}
  fake_runs.write(tmp_path / "n1", 1, ONE, extra=[old])
  fake_runs.write(tmp_path / "n2", 2, ONE, extra=[old | ends])
  drawing = costs.costs(fake_runs.read(tmp_path / "*"))
  awake = drawing.figure.axes[0]
  drawn = [line.get_ydata().tolist() for line in awake.get_lines()]
  assert drawn == [[0.12], [0.12], [0.1, 0.5]]
  assert "10th to 90th percentile" in drawing.figure.get_supxlabel()
  only = costs.costs(fake_runs.read(tmp_path / "n1"))
  assert "percentile" not in only.figure.get_supxlabel()


# ---- panels --------------------------------------------------------------------------------------


def test_panels_have_axes_names_seeds_intervals_and_baselines(tmp_path):
  for seed in range(2):
    values = {"k1_exact": 0.5 + 0.1 * seed, "k1_low": 0.4, "k1_high": 0.7}
    fake_runs.write(tmp_path / f"s{seed}", 2, TWO, seed=seed, per_eval=values)
  measure = panels.Measure(
    "exact_percent",
    "right (%)",
    "k{group}_exact",
    scale=100.0,
    top=101.5,
    baselines={"a guess": lambda k: 20.0},
  )
  runs = fake_runs.read(tmp_path / "*")
  drawing = panels.draw("figure", "Title", "k", [panels.Group(1, "k = 1")], [measure], runs, "answers")
  (axes,) = drawing.figure.axes
  assert (axes.get_xlabel(), axes.get_ylabel()) == ("training steps", "right (%)")
  assert legend(drawing) == ["mean over 2 seeds", "one seed", "95 % interval of the mean", "a guess"]
  assert [row["value"] for row in drawing.rows if row["kind"] == "curve"] == pytest.approx([55.0, 55.0])
  assert [row["value"] for row in drawing.rows if row["kind"] == "baseline"] == [20.0]
  alone = panels.draw("f", "T", "k", [panels.Group(1, "k = 1")], [measure], runs[:1], "answers")
  assert "95 % interval over the answers" in legend(alone)
  assert [(r["low"], r["high"]) for r in alone.rows if r["kind"] == "curve"] == [
    pytest.approx((40.0, 70.0))
  ] * 2


@pytest.mark.parametrize("draw", [accuracy.demo_curves, changes.sleep_changes, costs.costs])
def test_runs_without_the_rows_are_refused_in_one_line(tmp_path, draw):
  fake_runs.write(tmp_path / "a", 1, [])
  with pytest.raises(RunError) as error:
    draw(fake_runs.read(tmp_path / "a"))
  assert "\n" not in str(error.value)


# ---- files ---------------------------------------------------------------------------------------


def test_the_csv_holds_exactly_what_is_drawn(tmp_path):
  fake_runs.write(tmp_path / "n1", 1, ONE)
  fake_runs.write(tmp_path / "n2s0", 2, TWO, seed=0)
  fake_runs.write(tmp_path / "n2s1", 2, FOUR, seed=1)
  drawing = accuracy.demo_curves(fake_runs.read(tmp_path / "n*"))
  png, svg, table = drawing.save(tmp_path / "figures")
  with open(table, newline="") as file:
    written = list(csv.DictReader(file))
  drawn = lines(drawing)

  def points(**wanted):
    rows = [r for r in written if all(r[key] == value for key, value in wanted.items())]
    return [(float(r["tokens_M"]), float(r["exact_percent"])) for r in rows]

  assert points(series="N = 1", kind="curve") == drawn["N = 1"]
  assert points(series="N = 2", kind="curve") == drawn["N = 2"]
  for seed in "01":
    assert points(series="N = 2", kind="seed", seed=seed) == drawn[f"_N = 2, seed {seed}"]
  assert [float(r["exact_percent"]) for r in written if r["kind"] == "constant"] == pytest.approx([27.8])
  assert {r["seeds"] for r in written if r["series"] == "N = 2"} == {"2"}
  band = drawing.figure.axes[0].collections[1].get_paths()[0].vertices[:, 1]
  ends = [
    float(r[end])
    for r in written
    if r["series"] == "N = 2" and r["kind"] == "curve"
    for end in ("low_percent", "high_percent")
  ]
  assert (min(ends), max(ends)) == pytest.approx((band.min(), band.max()))
  pixels = imread(png)
  assert pixels.shape[1] > 900 and pixels[..., :3].min() < 0.3 and (pixels[0, 0, :3] == 1).all()  # on white
  assert ElementTree.parse(svg).getroot().tag.endswith("svg")


def test_the_same_runs_give_the_same_svg(tmp_path):
  fake_runs.write(tmp_path / "a", 1, ONE)
  runs = fake_runs.read(tmp_path / "a")
  assert accuracy.demo_curves(runs).svg() == accuracy.demo_curves(runs).svg()


def test_drawing_needs_no_display_no_pyplot_and_no_jax(tmp_path):
  fake_runs.write(tmp_path / "a", 1, ONE)
  program = (
    "import sys; from sleep_jax.report import accuracy, claims, load, page; "
    "runs = load.load_runs(sys.argv[1]); accuracy.demo_curves(runs).save(sys.argv[2]); "
    "page.write_html(sys.argv[2] + '/page.html', runs); "
    "print(sorted({'matplotlib.pyplot', 'tkinter', 'jax'} & set(sys.modules)))"
  )
  command = [sys.executable, "-c", program, str(tmp_path / "a"), str(tmp_path / "out")]
  done = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, timeout=60, env={"MPLBACKEND": "TkAgg"}
  )
  assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
  assert (tmp_path / "out" / "demo_curves.png").stat().st_size > 1000


@pytest.mark.parametrize(
  "ends", [(0.99, 0.985, 0.98), (0.02, 0.015, 0.01), (0.5, 0.49, 0.48), (0.9, 0.5, 0.1)]
)
def test_labels_of_curves_that_end_side_by_side_stand_in_the_order_of_the_curves(tmp_path, ends):
  for passes, last in zip((1, 2, 4), ends, strict=True):
    fake_runs.write(tmp_path / f"n{passes}", passes, [(100, 0.2), (200, last)])
  drawing = accuracy.demo_curves(fake_runs.read(tmp_path / "*"))
  there = dict(zip(texts(drawing), boxes(drawing), strict=True))
  assert there["N = 1"].y0 > there["N = 2"].y0 > there["N = 4"].y0


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_the_legend_lies_within_the_page(tmp_path, groups):
  values = {f"op{i}_{key}": 0.5 for i in range(3) for key in ("exact", "low", "high")}
  fake_runs.write(tmp_path / "a", 2, TWO, per_eval=values)
  baselines = {name: lambda op: 30.0 for name in ("the commonest answer", "the commonest number of all")}
  measure = panels.Measure(
    "exact", "right (%)", "op{group}_exact", scale=100.0, top=101.5, baselines=baselines
  )
  columns = [panels.Group(i, f"{i} operations") for i in range(groups)]
  drawing = panels.draw(
    "f", "T", "op", columns, [measure], fake_runs.read(tmp_path / "*"), "held-out problems"
  )
  drawing.figure.draw_without_rendering()
  (box,) = (legend.get_window_extent() for legend in drawing.figure.legends)
  page = drawing.figure.bbox
  assert page.x0 <= box.x0 and box.x1 <= page.x1
