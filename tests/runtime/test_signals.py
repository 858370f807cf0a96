"""Signals: a first one is answered at once and obeyed at the next dispatch, a second one ends the process."""

import os
import pathlib
import re
import select
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from sleep_jax.runtime import metrics, signals
from tests import forked

# They start processes, so they are no quick ones. They wait for what a process says or does, never for a
# time.
pytestmark = pytest.mark.slow

WAIT_S = 240  # for anything at all, on the busiest machine
# A process with a command line's listener; `work` is what its main thread does, JAX is never imported.
CHILD = """
import atexit, hashlib, os, signal, sys, threading, time
from sleep_jax.runtime import signals

def away():  # as in the compiler: no handler of Python runs meanwhile
  hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)

def look(received):
  while not received:
    time.sleep(0.01)

def hang():
  threading.Event().wait()

def say(line):
  print(f"{{line}}\\n", end="", flush=True)  # in one piece: two threads may speak at a time

listener = signals.own_process()
try:
  {work}
except KeyboardInterrupt:
  say("interrupted")
listener.leave()
say("leaving")
"""


def before_it_starts(ignored=()):
  """Signals as a shell in a terminal leaves them to its children, whatever ours were."""
  for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)


class Child:
  """A process whose lines are read one by one."""

  def __init__(self, work, ignored=(), stdin=None):
    source = CHILD.format(work=work.replace("\n", "\n  "))
    self.process = subprocess.Popen(
      [sys.executable, "-W", "ignore", "-c", source],
      stdin=stdin,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      env=forked.environment(),
      preexec_fn=lambda: before_it_starts(ignored),
    )
    self._read = b""  # and not yet given

  def line(self):
    while b"\n" not in self._read:
      assert self._more(), f"it ended after {self._read}"
    line, _, self._read = self._read.partition(b"\n")
    return line.decode()

  def send(self, number):
    self.process.send_signal(number)

  def end(self):
    """Its exit code, and what it wrote and nobody read."""
    while self._more():
      pass
    self.process.stdout.close()
    return self.process.wait(WAIT_S), self._read.decode()

  def wait_until(self, state):
    """Waits until its main thread is in a state of the system's: S sleeps, say."""
    path, deadline = f"/proc/{self.process.pid}/task/{self.process.pid}/stat", time.monotonic() + WAIT_S
    while pathlib.Path(path).read_text().rpartition(")")[2].split()[0] != state:
      assert time.monotonic() < deadline
      time.sleep(0.01)

  def _more(self):
    """Reads what there is, past any buffer; False at the end."""
    ready, _, _ = select.select([self.process.stdout], [], [], WAIT_S)
    if not ready:
      self.process.kill()
      raise AssertionError(f"it hangs; it wrote {self._read}")
    piece = os.read(self.process.stdout.fileno(), 4096)
    self._read += piece
    return piece


REQUEST = "with signals.stop_signals(say, 'saving') as got:\n  say('ready')\n  "


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_is_a_request(number):
  child = Child(REQUEST + "look(got)\n  say(got)")
  assert child.line() == "ready"
  child.send(number)
  name = signal.Signals(number).name
  code, out = child.end()
  answer = f"received {name}: saving; once more ends it now, unsaved"
  assert (code, set(out.splitlines())) == (0, {answer, f"['{name}']", "leaving"})


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_second_ends_it_although_the_main_thread_is_away(second):
  child = Child(REQUEST + "away()")
  assert child.line() == "ready"
  child.send(signal.SIGTERM)
  assert child.line().startswith("received SIGTERM: ")
  child.send(second)
  assert child.end() == (1, f"{signals.AT_ONCE}\n")


def test_while_something_is_compiled_the_first_says_so():
  child = Child(REQUEST + "with signals.until('the step is compiled'):\n    away()")
  assert child.line() == "ready"
  child.send(signal.SIGINT)
  assert child.line() == "Ctrl-C: stops as soon as the step is compiled; once more: at once"
  child.send(signal.SIGINT)
  assert child.end() == (1, f"{signals.AT_ONCE}\n")


@pytest.mark.parametrize("count", range(2, 9))
def test_many_within_a_tenth_of_a_second_end_it(count):
  child = Child(REQUEST + "look([])")
  assert child.line() == "ready"
  for _ in range(count):  # and on, should the system have made one of two that came together
    child.send(signal.SIGINT)
    time.sleep(0.1 / count)
  while child.process.poll() is None:
    child.send(signal.SIGINT)
    time.sleep(0.1)
  code, out = child.end()
  assert code == 1
  assert out.endswith(f"{signals.AT_ONCE}\n")


@pytest.mark.parametrize("hook", ["atexit.register(hang)", "threading.Thread(target=hang).start()"])
def test_exit_hooks_cannot_keep_it(hook):
  """Also where the interpreter is about to end and begins no thread any more, as Python 3.12 does."""
  child = Child(hook)
  assert child.line() == "leaving"
  child.wait_until("S")  # in the hook
  child.send(signal.SIGINT)
  assert child.end() == (1, f"{signals.AT_ONCE}\n")


def test_without_a_request_ctrl_c_interrupts_and_the_next_one_ends_it():
  child = Child("try:\n  say('ready')\n  look([])\nfinally:\n  say('cleaning up')\n  away()")
  assert child.line() == "ready"
  child.send(signal.SIGINT)
  assert child.line() == "cleaning up"
  child.send(signal.SIGINT)
  assert child.end() == (1, f"{signals.AT_ONCE}\n")


def test_a_reader_that_does_not_read_cannot_keep_it():
  child = Child(REQUEST + "while True:\n    sys.stdout.write('x' * 65536)")
  assert child.line() == "ready"
  child.wait_until("S")  # the pipe is full
  deadline = time.monotonic() + WAIT_S
  while child.process.poll() is None:  # two of them that come together are one
    assert time.monotonic() < deadline
    child.send(signal.SIGTERM)
    time.sleep(0.1)
  assert child.process.returncode == 1
  child.process.stdout.close()


def test_nohup_stays_nohup():
  child = Child(REQUEST + "sys.stdin.readline()\n  say(got)", ignored=(signal.SIGHUP,), stdin=subprocess.PIPE)
  assert child.line() == "ready"
  child.send(signal.SIGHUP)
  child.process.stdin.close()  # the signal was there before this
  assert child.end() == (0, "[]\nleaving\n")


def test_a_forked_child_neither_speaks_for_its_parent_nor_refuses_to_end():
  work = """pid = os.fork()
  if pid == 0:
    say(os.getpid())
    look([])
    os._exit(0)
  say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
  say(got)"""
  child = Child("with signals.stop_signals(say) as got:\n  " + work)
  forked_pid = int(child.line())
  for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
    os.kill(forked_pid, number)
  assert child.end() == (0, f"{-signal.SIGTERM}\n[]\nleaving\n")


def test_after_it_everything_is_as_before():
  numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
  original = [signal.signal(n, signal.SIG_DFL) for n in numbers]
  before = [signal.getsignal(n) for n in numbers]
  with signals.stop_signals(print):
    with signals.stop_signals(print):
      pass
    assert signal.getsignal(signal.SIGHUP) != before[2]
  assert [signal.getsignal(n) for n in numbers] == before
  for number, handler in zip(numbers, original, strict=True):
    signal.signal(number, handler)


def test_in_a_program_of_ones_own_a_second_one_interrupts():
  said = []
  with pytest.raises(KeyboardInterrupt), signals.stop_signals(said.append, "saving") as got:
    signal.raise_signal(signal.SIGTERM)
    assert got == ["SIGTERM"]
    signal.raise_signal(signal.SIGTERM)
  assert said == ["received SIGTERM: saving; once more ends it now, unsaved"]


@pytest.mark.slow
class TestOfRuns:
  """Whole runs, each stopped at another moment; none hangs, none says more than a line, each goes on."""

  FLAGS = (
    *("--config.train.steps=100000", "--config.train.log_every=1", "--config.train.save_every=20"),
    *("--config.train.eval_every=100000", "--config.train.steps_per_dispatch=1"),
  )

  def stopped(self, folder, moment, *numbers, gap=0.02):
    """Exit code and output of a run that gets signals when it writes a line."""
    process = subprocess.Popen(
      [sys.executable, "-m", "experiments.rule110", "--config=experiments/configs/rule110.py:tiny",
       f"--workdir={folder}", *self.FLAGS],
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=forked.ROOT, env=forked.environment(),
      preexec_fn=before_it_starts,
    )  # fmt: skip
    before = ""
    while moment and not re.search(moment, before):
      before += process.stdout.readline() or pytest.fail(before)
    if not moment:
      time.sleep(1.0)
    for number in numbers:
      process.send_signal(number)
      time.sleep(gap)
    try:
      out, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
      process.kill()
      raise
    assert "Traceback" not in before + out, before + out
    return process.returncode, before + out

  def test_one_after_the_other(self):
    with tempfile.TemporaryDirectory() as folder:
      run, S = pathlib.Path(folder, "run"), signal
      code, out = self.stopped(run, None, S.SIGINT)
      assert (code, out) == (-S.SIGINT, "")
      code, out = self.stopped(run, "compiling the step", S.SIGINT)
      assert code == 3
      assert "Ctrl-C: stops as soon as the step is compiled; once more: at once\n" in out
      assert out.endswith("stopped by SIGINT before step 1; rerun the same command to go on\n")
      code, out = self.stopped(run, "compiling the step", S.SIGTERM, S.SIGTERM, gap=0.3)
      assert (code, out.splitlines()[-1]) == (1, signals.AT_ONCE)
      step = 0
      for numbers in ([S.SIGHUP], [S.SIGTERM], [S.SIGINT]):
        code, out = self.stopped(run, "saved step", *numbers)
        assert code == 3, out
        *_, last = out.splitlines()
        assert last.startswith(f"stopped by {numbers[0].name}; saved step ")
        assert f"resuming at step {step} of" in out or not step
        step = int(last.split("saved step ")[1].split(",")[0])
      for numbers in ([S.SIGINT] * 5, [S.SIGTERM, S.SIGINT], [S.SIGHUP, S.SIGHUP]):
        code, out = self.stopped(run, "saved step", *numbers)
        assert (code, out.splitlines()[-1]) == (1, signals.AT_ONCE)
        [resumed] = re.findall(r"resuming at step (\d+)", out)
        assert int(resumed) >= step
        step = int(resumed)
      rows = metrics.read(run / "metrics.jsonl")
      steps = [row["step"] for row in rows if row["kind"] == "train"]
      assert steps == list(range(1, len(steps) + 1))
