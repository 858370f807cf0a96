"""Training throughput: the forms compute what they say, rows survive what goes wrong, and nothing is
measured twice.
"""

import csv
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import model, windows
from sleep_jax.benchmarks import measure, throughput
from sleep_jax.benchmarks.throughput import PARALLEL, SLIDING, WINDOWED, Case
from sleep_jax.config import ConfigError
from sleep_jax.launch import hardware
from sleep_jax.report import throughput as figure

TINY = ("--size=tiny", "--rounds=1")


def full(form=WINDOWED, window=2000, passes=1):
  return Case("full", form, window, passes, 12_000, 1, "window")


def tiny(form, passes=1):
  return Case("tiny", form, 4, passes, 16, 2, "none")


def losses(*cases):
  weights = measure.quick(lambda: model.init(cases[0].model, jax.random.key(0)))()
  batch = throughput.batch_of(cases[0])
  return [
    float(measure.quick(lambda w, c=c: model.loss(w, batch, c.plan, c.model, c.sleep)[0])(weights))
    for c in cases
  ]


def test_one_window_after_the_other_is_the_parallel_pass():
  sliding, parallel, windowed = losses(tiny(SLIDING), tiny(PARALLEL), tiny(WINDOWED))
  np.testing.assert_allclose(sliding, parallel, rtol=1e-5)
  assert abs(windowed / parallel - 1) > 1e-4  # it forgets more: the comparison could fail


def test_the_model_is_ouro_with_six_layers_of_memory():
  cfg = full().model
  assert [cfg.blocks.count(kind) for kind in ("attn", "jet")] == [24, 6]
  assert (cfg.window, cfg.dtype, full(SLIDING).model.eviction) == (2000, "bfloat16", "sliding")
  near = full(PARALLEL).model
  assert near.blocks.count("swa") == 24 and (near.window, near.attention.swa_window) == (12_000, 2000)


def test_every_window_makes_every_pass():
  (segment,) = full(passes=4, window=1000).plan
  assert (segment.count, segment.length, segment.asleep, len(segment.reads)) == (12, 1000, True, 1000)
  assert throughput.work(full(passes=8)) / throughput.work(full(passes=4)) == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(("window", "passes"), [(1000, 1), (2000, 4), (4000, 8)])
def test_the_roofline_is_that_of_a_formula(window, passes):
  """Multiplications by hand: 24 blocks of width 2048, the head, and the inserted layers, 142 M parameters."""
  blocks = 24 * (4 * 2048**2 + 3 * 2048 * 5632) + 142.0e6
  attention = 2 * window * 2048 * 24  # half a window of keys a token: scores and values
  forward = passes * (2 * blocks + attention) + 2 * 2048 * 49152
  chip = hardware.of_device("NVIDIA H200")
  assert throughput.roofline(full(window=window, passes=passes), chip) == pytest.approx(
    989e12 / (3 * forward), rel=0.02
  )
  assert throughput.roofline(full(), None) is None


def test_the_paper_s_rows_come_first():
  made = [(c.form, c.passes) for c in throughput.cases("full", (2000,), (1, 2, 4, 8), 1, "window")]
  assert made == [
    (WINDOWED, 1), (WINDOWED, 4), (PARALLEL, 1), (WINDOWED, 2), (WINDOWED, 8), (SLIDING, 1)
  ]  # fmt: skip
  assert len(throughput.cases("full", (1000, 2000, 4000), (1, 2, 4, 8), 1, "window")) == 18
  with pytest.raises(ConfigError, match="--windows: must be numbers that divide T = 12000, got 7"):
    throughput.cases("full", (2000, 7), (1,), 1, "window")


@pytest.mark.parametrize(
  ("message", "note"),
  [
    ("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore", "out of memory: RESOURCE_EXHAUSTED: Out"),
    ("INTERNAL: CUDA_ERROR: out of memory", "out of memory: "),
    ("INVALID_ARGUMENT: no such thing\n", "failed: INVALID_ARGUMENT: no such thing"),
    ("", "failed: "),
  ],
)
def test_what_the_device_refuses_is_said_on_one_line(message, note):
  found = throughput.refusal(message)
  assert found.startswith(note) and "\n" not in found


def rows_of(folder):
  return [json.loads(line) for line in (folder / "throughput.jsonl").read_text().splitlines()]


@pytest.fixture
def refusing(monkeypatch):
  """Steps that are not compiled: those that the test names are refused with a message, the others take no
  time.
  """
  refused = {}

  def program(case):
    if message := refused.get((case.form, case.passes)):
      raise jax.errors.JaxRuntimeError(message)
    return lambda weights, batch: (batch.loss_mask.mean(), weights)

  token = windows.Batch(jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1)))
  monkeypatch.setattr(throughput, "program", program)
  monkeypatch.setattr(throughput, "batch_of", lambda case: token)
  monkeypatch.setattr(throughput.model, "init", lambda cfg, key: {})
  return refused


def test_a_row_that_does_not_fit_ends_nothing(tmp_path, refusing):
  refusing[WINDOWED, 1] = "RESOURCE_EXHAUSTED: Out of memory"
  assert throughput.main([*TINY, f"--out={tmp_path}"]) == 0
  rows = rows_of(tmp_path)
  assert [(row["form"], row["N"]) for row in rows] == [
    (WINDOWED, 1),
    (PARALLEL, 1),
    (WINDOWED, 2),
    (SLIDING, 1),
  ]
  assert rows[0]["note"].startswith("out of memory") and rows[0]["tokens/s"] is None
  assert all(row["tokens/s"] > 0 and not row["note"] for row in rows[1:])
  assert "out of memory" in (tmp_path / "throughput.md").read_text()
  with open(tmp_path / "throughput.csv", newline="") as file:
    assert len(list(csv.DictReader(file))) == 4
  assert (tmp_path / "throughput_figure.png").exists()


def test_a_second_start_measures_what_is_missing_or_failed(tmp_path, refusing, monkeypatch):
  absent = types.SimpleNamespace(find_spec=lambda name: None)
  monkeypatch.setattr(throughput, "importlib", types.SimpleNamespace(util=absent))
  refusing[WINDOWED, 2] = "INTERNAL: broken"
  assert throughput.main([*TINY, "--passes=2", f"--out={tmp_path}"]) == 1
  assert throughput.main([*TINY, f"--out={tmp_path}"]) == 1
  refusing.clear()
  refusing[PARALLEL, 1] = "must not be measured again"
  assert throughput.main([*TINY, f"--out={tmp_path}"]) == 0
  assert "No figure: matplotlib is not installed" in (tmp_path / "throughput.md").read_text()
  rows = rows_of(tmp_path)
  first, second, third = (
    [(WINDOWED, 2)],
    [(WINDOWED, 1), (PARALLEL, 1), (WINDOWED, 2), (SLIDING, 1)],
    [(WINDOWED, 2)],
  )
  assert [(row["form"], row["N"]) for row in rows] == first + second + third
  before = len(rows)
  assert throughput.main([*TINY, "--batch=2", "--passes=2", f"--out={tmp_path}"]) == 0
  assert len(rows_of(tmp_path)) == before + 1  # another batch is another row


def test_full_needs_an_accelerator(tmp_path, capsys):
  assert throughput.main([f"--out={tmp_path}"]) == 2
  assert "--size: full needs an accelerator" in capsys.readouterr().err


@pytest.mark.slow
def test_a_tiny_step_is_measured(tmp_path):
  flags = ["--size=tiny", "--passes=2", "--remat=none", "--rounds=1"]
  assert throughput.main([*flags, f"--out={tmp_path}"]) == 0
  (row,) = rows_of(tmp_path)
  assert row["tokens/s"] == pytest.approx(16 / (row["step ms"] / 1e3))
  assert row["program GB"] > 0 and row["of peak"] is None and row["roofline"] is None
  assert 3 < row["loss"] < 6  # ln 32 = 3.5, of weights that have learnt nothing


def test_the_figure_marks_the_paper_s_axes_and_leaves_out_what_has_no_speed():
  rows = [
    {"form": WINDOWED, "L": 2000, "N": n, "tokens/s": speed, "roofline": 1e5 / n}
    for n, speed in ((1, 4e4), (4, 1e4), (8, None))
  ]
  drawing = figure.draw(rows, "Throughput", throughput.PAPER)
  assert [row["N"] for row in drawing.rows] == [1, 4]
  assert legends(drawing).count(figure.PAPER) == 2 and figure.ROOFLINE in legends(drawing)
  assert "40,000" in drawing.alt
  plain = legends(figure.draw([row | {"roofline": None} for row in rows], "Throughput", {}))
  assert "L = 2,000" in plain and figure.PAPER not in plain and figure.ROOFLINE not in plain


def legends(drawing):
  return [text.get_text() for axes in drawing.figure.axes for text in axes.get_legend().get_texts()]
