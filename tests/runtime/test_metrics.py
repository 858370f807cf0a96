"""Metrics: rows come back as written, resumes leave no trace, and no logger stops a run."""

import io
import json
import math
import pathlib
import tempfile
from unittest import mock

import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st

from sleep_jax.cost import flops
from sleep_jax.runtime import metrics, progress

VALUES = st.recursive(
  st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text('abc é\n"\\{', max_size=5),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("xyz", max_size=3), inner, max_size=3),
  max_leaves=10,
)


class Clockwork:
  """A clock that is moved by hand."""

  def __init__(self):
    self.t = 0.0

  def __call__(self):
    return self.t


class WriterTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.path = self.dir / "metrics.jsonl"
    self.said = []

  def writer(self, **kw):
    return metrics.Writer(self.dir, report=self.said.append, **{"tensorboard": False} | kw)

  @given(value=VALUES)
  def test_what_is_written_is_read_back_and_is_json_to_others(self, value):
    with tempfile.TemporaryDirectory() as folder:
      with metrics.Writer(folder, tensorboard=False) as w:
        w.write({"kind": "train", "step": 1, "value": value})
      path = pathlib.Path(folder) / "metrics.jsonl"
      [row] = metrics.read(path)
      # repr tells 1 from 1.0 from True, and nan equals nan in it
      self.assertEqual(repr(row["value"]), repr(value))

      def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

      json.loads(path.read_text(), parse_constant=refuse)

  def test_scalars_of_numpy_and_jax_become_plain_numbers(self):
    with self.writer() as w:
      row = {
        "kind": "eval",
        "step": np.int64(3),
        "a": np.float32(0.5),
        "b": jnp.int32(7),
        "c": np.bool_(True),
      }
      w.write(row | {"d": jnp.array([1.5, np.inf]), "e": (np.float64(2), jnp.bfloat16(0.25))})
    want = {"kind": "eval", "step": 3, "a": 0.5, "b": 7, "c": True, "d": [1.5, math.inf], "e": [2.0, 0.25]}
    [row] = metrics.read(self.path)
    self.assertEqual(row, want)
    self.assertEqual({k: type(v) for k, v in row.items()}, {k: type(v) for k, v in want.items()})

  def test_every_row_is_on_disk_before_the_next(self):
    with self.writer() as w:
      for step in range(3):
        w.write({"kind": "train", "step": step})
        self.assertLen(metrics.read(self.path), step + 1)

  @parameterized.parameters(
    ({"step": 1},),
    ({"kind": "train"},),
    ({"kind": "train", "step": 1.5},),
    ({"kind": "x", "step": 1, "a": object()},),
  )
  def test_a_bad_row_is_refused_and_leaves_nothing(self, row):
    with self.writer() as w:
      with self.assertRaises(metrics.MetricsError):
        w.write(row)
    self.assertEqual(self.path.read_bytes(), b"")

  def test_truncation_leaves_what_an_uninterrupted_run_would_have(self):
    def row(step, kind="train"):
      return {"kind": kind, "step": step, "loss": 1 / (step + 1)}

    with self.writer() as w:
      for step in range(10):
        w.write(row(step))
      w.write(row(5, "eval"))
      w.write({"kind": "done", "step": 9})
    with open(self.path, "a") as f:
      f.write('{"kind": "train", "step": 1')  # the kill
    with self.writer() as w:
      self.assertEqual(w.truncate_after(6), 4)  # steps 7, 8, 9 and the done row
      self.assertEqual(w.last("train"), row(6))
      self.assertIsNone(w.last("done"))
      for step in (7, 8):
        w.write(row(step))
    self.assertEqual(metrics.read(self.path), [row(s) for s in range(7)] + [row(5, "eval"), row(7), row(8)])
    self.assertEqual([p.name for p in self.dir.iterdir()], ["metrics.jsonl"])

  @parameterized.parameters(0, 1, 2, 3)
  def test_a_run_killed_between_the_rows_of_its_end_writes_them_once(self, written):
    end = [{"kind": kind, "step": 9} for kind in ("cost", "sleep", "done")]
    longer = [
      {"kind": kind, "step": 5} for kind in ("cost", "sleep", "done")
    ]  # an end before it was made longer
    rows = [{"kind": "train", "step": 5}, *longer, {"kind": "train", "step": 9}, {"kind": "eval", "step": 9}]
    with self.writer() as w:
      for row in rows + end[:written]:
        w.write(row)
    with self.writer() as w:
      self.assertEqual(w.truncate_after(9, with_done=("cost", "sleep")), written % 3)
      for row in end if written < 3 else ():
        w.write(row)
    self.assertEqual(metrics.read(self.path), rows + end)

  def test_a_run_killed_before_its_first_checkpoint_starts_anew(self):
    with self.writer() as w:
      w.write({"kind": "eval", "step": 0})
      w.write({"kind": "train", "step": 1})
    with self.writer() as w:
      self.assertEqual(w.truncate_after(-1), 2)
    self.assertEqual(self.path.read_bytes(), b"")

  def test_a_torn_line_of_any_length_never_reaches_a_reader_or_the_next_row(self):
    with self.writer() as w:
      w.write({"kind": "train", "step": 1, "loss": 0.5})
      w.write({"kind": "train", "step": 2, "loss": 0.25})
    whole = self.path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
      self.path.write_bytes(whole[:cut])
      complete = cut == len(whole) - 1  # all but the newline: the row itself is whole
      self.assertLen(metrics.read(self.path), 2 if complete else 1)
      with self.writer() as w:
        w.write({"kind": "train", "step": 3})
      self.assertEqual([r["step"] for r in metrics.read(self.path)], [1, 2, 3] if complete else [1, 3])

  def test_damage_in_the_middle_is_named_by_line_and_nothing_is_overwritten(self):
    text = '{"kind": "train", "step": 1}\n{"kind": "tra\n{"kind": "train", "step": 3}\n'
    self.path.write_text(text)
    for use in (lambda: metrics.read(self.path), self.writer):
      with self.assertRaisesRegex(metrics.MetricsError, "metrics.jsonl line 2"):
        use()
    self.assertEqual(self.path.read_text(), text)

  def test_tensorboard_gets_the_numbers(self):
    from tensorboardX.event_file_writer import EventsWriter

    seen = []
    write = EventsWriter.write_event
    with mock.patch.object(EventsWriter, "write_event", lambda self, e: (seen.append(e), write(self, e))[1]):
      with self.writer(tensorboard=True) as w:
        w.write({"kind": "train", "step": 4, "loss": 0.5, "note": "text"})
    scalars = [(v.tag, e.step, v.simple_value) for e in seen for v in e.summary.value]
    self.assertEqual(scalars, [("train/loss", 4, 0.5)])
    self.assertLen(list((self.dir / "tb").iterdir()), 1)
    self.assertEqual(self.said, [])

  def test_a_broken_tensorboard_is_reported_once_and_stops_nothing(self):
    (self.dir / "tb").write_text("a file where a directory should be")
    with self.writer(tensorboard=True) as w:
      for step in range(3):
        w.write({"kind": "train", "step": step, "loss": 1.0})
    self.assertLen(metrics.read(self.path), 3)
    self.assertLen(self.said, 1)
    self.assertIn("TensorBoard", self.said[0])

  def test_a_broken_figure_is_reported_once_and_stops_nothing(self):
    def draw(path):
      raise RuntimeError("no fonts")

    with self.writer() as w:
      self.assertFalse(w.figure("loss.png", draw))
      self.assertFalse(w.figure("loss.png", draw))
      self.assertTrue(w.figure("good.png", lambda path: path.write_text("x")))
    self.assertLen(self.said, 1)
    self.assertIn("figure loss.png failed", self.said[0])
    self.assertTrue((self.dir / "figures" / "good.png").exists())

  def test_clocks_continue_over_a_resume(self):
    wall, cpu = Clockwork(), Clockwork()
    wall.t, cpu.t = 1000.0, 50.0  # clocks start anywhere
    with self.writer() as w:
      clock = progress.Clock(w.last(), wall=wall, cpu=cpu)
      wall.t, cpu.t = 1060.0, 140.0
      w.write({"kind": "train", "step": 1, "wall_s": clock.wall_s, "cpu_s": clock.cpu_s})
      w.write({"kind": "sleep", "step": 1})  # a row without a clock is no reason to start at zero
    wall.t, cpu.t = 7.0, 3.0  # another process
    with self.writer() as w:
      clock = progress.Clock(w.last(), wall=wall, cpu=cpu)
      wall.t, cpu.t = 8.5, 3.25
    self.assertEqual((clock.wall_s, clock.cpu_s), (61.5, 90.25))

  def test_what_happens_in_a_pause_is_not_counted(self):
    wall, cpu = Clockwork(), Clockwork()
    clock = progress.Clock({"wall_s": 10.0, "cpu_s": 20.0}, wall=wall, cpu=cpu)
    wall.t, cpu.t = 1.0, 2.0
    with self.assertRaises(KeyError), clock.paused():
      wall.t, cpu.t = 101.0, 202.0
      raise KeyError
    wall.t, cpu.t = 101.5, 202.5
    self.assertEqual(clock.times(), {"wall_s": 11.5, "cpu_s": 22.5})

  def test_cpu_time_is_that_of_this_process(self):
    clock = progress.Clock()
    while clock.cpu_s < 0.05:
      sum(range(10000))
    self.assertGreaterEqual(clock.wall_s, 0.04)  # one thread: no more CPU than wall, but for their resolution
    self.assertLess(clock.cpu_s, 5)


class ProgressTest(parameterized.TestCase):
  def test_the_line(self):
    now, out = Clockwork(), io.StringIO()
    shown = progress.Progress(1000, stream=out, now=now)
    shown.line(10, 10_000, 2.0)
    now.t = 5.0
    shown.line(20, 60_000, 1.5, mfu=0.408, sleep=0.777)
    want = [
      "step   10/1000  loss 2.0000",
      "step   20/1000  loss 1.5000  10k tokens/s  eta 8 min  mfu 41 % (sleep 78 % of FLOPs)",  # 980 * 0.5 s
    ]
    self.assertEqual(out.getvalue().splitlines(), want)
    self.assertTrue(out.getvalue().isascii())

  def test_eta_shrugs_off_a_slow_interval_and_follows_a_new_rate(self):
    now = Clockwork()
    shown = progress.Progress(10_000, window=5, stream=io.StringIO(), now=now)
    for step in range(0, 100, 10):
      shown.update(step, step * 100)
      now.t += 600 if step in (0, 50) else 10  # compilation, then an evaluation
    self.assertEqual(shown.seconds_per_step, 1.0)
    self.assertEqual(shown.tokens_per_s, 100.0)
    for step in range(100, 150, 10):
      shown.update(step, step * 100)
      now.t += 20
    self.assertEqual(shown.seconds_per_step, 2.0)

  def test_a_resumed_run_counts_its_own_rate_only(self):
    now = Clockwork()
    shown = progress.Progress(200, stream=io.StringIO(), now=now)
    shown.line(100, 1_000_000, 1.0)
    now.t = 10.0
    self.assertIn("  100 tokens/s  eta 90 s", shown.line(110, 1_001_000, 1.0).replace("2 min", "90 s"))

  def test_a_closed_stream_stops_no_run(self):
    out = io.StringIO()
    out.close()
    self.assertEqual(progress.Progress(10, stream=out).line(1, 1, 0.5), "step  1/10  loss 0.5000")

  @parameterized.parameters(
    (0, "0 s"), (-3, "0 s"), (89.4, "89 s"), (90, "2 min"), (5000, "83 min"), (5400, "1 h 30 min"),
    (11_100, "3 h 05 min"), (183_600, "2 d 3 h"),
  )  # fmt: skip
  def test_duration(self, seconds, want):
    self.assertEqual(progress.duration(seconds), want)

  @parameterized.parameters(
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA A100-SXM4-80GB", 312e12), ("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5e", 197e12),
    ("TPU v5", 459e12), ("TPU v5p", 459e12), ("TPU v6 lite", 918e12), ("TPU v6e", 918e12),
    ("cpu", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("TPU v4 lite", None),
  )  # fmt: skip
  def test_peak_flops(self, kind, want):
    self.assertEqual(flops.peak_flops(kind), want)
    self.assertEqual(flops.peak_flops(mock.Mock(device_kind=kind)), want)
