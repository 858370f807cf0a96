"""Parts in time boxes: each gets its share, ends in time, is written out at once, and is done once."""

import json
import signal
import sys
import threading
import time

import pytest

from sleep_jax.benchmarks import boxes, command
from sleep_jax.config import ConfigError

QUICK = "print('hello')"
BAD = "import sys; print('it broke', file=sys.stderr); sys.exit(7)"
# Both wait for a minute; the first obeys and says that it has saved, the second has to be killed.
SAVES = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
time.sleep(60)
"""
DEAF = """
import signal, time  # DEAF
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def short(monkeypatch):
  monkeypatch.setattr(boxes, "LEAST_S", 0.2)


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "logs").mkdir()
  return tmp_path


def a_part(name, program, weight=1.0, rows=list):
  return boxes.Part(name, [sys.executable, "-S", "-c", program], weight, rows)


def run(folder, parts, seconds=30.0, stop=None):
  journal = command.Journal(folder / "all.jsonl", boxes.KEYS)
  boxes.run_all(
    parts, journal, folder / "logs", seconds=seconds, grace_s=0.5, asked={}, stop=stop or threading.Event()
  )
  return [json.loads(line) for line in (folder / "all.jsonl").read_text().splitlines()]


def test_a_part_that_fails_does_not_stop_the_next(folder):
  first, second = run(folder, [a_part("bad", BAD), a_part("good", QUICK, rows=lambda: [{"x": 1}])])
  assert (first["part"], first["state"], first["code"]) == ("bad", "failed", 7)
  assert first["tail"] == "it broke\n" and first["rows"] == []
  assert (second["state"], second["code"], second["rows"]) == ("done", 0, [{"x": 1}])


@pytest.mark.parametrize(("program", "code"), [(SAVES, 3), (DEAF, -signal.SIGKILL)])
def test_a_part_ends_when_its_box_does(folder, program, code):
  begun = time.monotonic()
  # The first has a twentieth of the time; what it keeps to is for the second.
  rows = run(folder, [a_part("long", program, 1.0), a_part("next", QUICK, 19.0)], seconds=60.0)
  assert time.monotonic() - begun < 30.0
  assert [(row["part"], row["state"]) for row in rows] == [("long", "stopped"), ("next", "done")]
  assert rows[0]["code"] == code
  assert rows[0]["box_s"] == pytest.approx(3.0, abs=0.2)


def test_what_a_part_has_started_ends_with_it(folder):
  beats = folder / "beats"
  beating = f"""
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while True:
  open({str(beats)!r}, "a").write(".")
  time.sleep(0.02)
"""
  nested = f"import subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', {beating!r}]).wait()"
  (row,) = run(folder, [a_part("nested", nested)], seconds=4.0)
  assert row["state"] == "stopped"
  before = beats.stat().st_size
  time.sleep(0.5)
  assert beats.stat().st_size == before > 0


def test_time_that_a_part_does_not_use_goes_to_the_others(folder):
  rows = run(folder, [a_part("a", QUICK), a_part("b", QUICK)], seconds=40.0)
  assert rows[0]["box_s"] == pytest.approx(20.0, abs=0.5)
  assert rows[1]["box_s"] > 30.0


def test_a_second_start_does_what_is_not_done(folder):
  came = folder / "came"
  program = f"open({str(came)!r}, 'a').write('x')"
  run(folder, [a_part("once", program), a_part("bad", BAD)])
  rows = run(folder, [a_part("once", program), a_part("bad", QUICK)])
  assert came.read_text() == "x"
  assert [(row["part"], row["state"]) for row in rows] == [
    ("once", "done"),
    ("bad", "failed"),
    ("bad", "done"),
  ]
  assert boxes.done(rows) == {"once", "bad"}
  assert boxes.latest(rows)["bad"]["state"] == "done"


def test_nothing_begins_without_time(folder):
  assert run(folder, [a_part("done", QUICK)], seconds=10.0)
  assert len(run(folder, [a_part("done", QUICK), a_part("late", QUICK)], seconds=0.1)) == 1


def test_a_signal_ends_the_part_and_the_series(folder):
  stop = threading.Event()
  threading.Timer(3.0, stop.set).start()
  (row,) = run(folder, [a_part("long", SAVES), a_part("never", QUICK)], stop=stop)
  assert (row["part"], row["state"], row["code"]) == ("long", "stopped", 3)


def test_signals_set_the_event_and_are_given_back():
  before = signal.getsignal(signal.SIGTERM)
  with boxes.until_signal() as stop:
    assert not stop.is_set()
    signal.raise_signal(signal.SIGTERM)
    assert stop.is_set()
  assert signal.getsignal(signal.SIGTERM) is before


def test_results_that_cannot_be_read_are_a_row_that_says_so(folder):
  def rows():
    raise ValueError("line 3 is torn")

  (row,) = run(folder, [a_part("part", QUICK, rows=rows)])
  assert row["state"] == "done" and row["rows"] == [{"note": "its results cannot be read: line 3 is torn"}]


def test_a_torn_last_line_is_dropped_and_the_others_stay(tmp_path):
  path = tmp_path / "rows.jsonl"
  command.Journal(path, ("x",)).add({"x": 1, "nan": float("nan")})
  with path.open("ab") as file:
    file.write(b'{"x": 2, "to')
  journal = command.Journal(path, ("x",))
  assert journal.rows == [{"x": 1, "nan": None}]
  journal.add({"x": 3})
  assert command.Journal(path, ("x",)).rows == [{"x": 1, "nan": None}, {"x": 3}]


@pytest.mark.parametrize("line", ["not JSON", "[1]", '{"y": 1}', "", "\xff"])
def test_a_line_that_is_none_of_ours_is_named(tmp_path, line):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(b'{"x": 1}\n' + line.encode("latin-1") + b"\n")
  with pytest.raises(ConfigError, match=r"^--out: .*rows.jsonl, line 2 is none of") as caught:
    command.Journal(path, ("x",))
  assert "\n" not in str(caught.value)
  assert path.read_bytes().startswith(b'{"x": 1}\n')
