"""Signals as a request: whoever is at work looks, finishes, saves and stops. A second one ends the process.

Python runs a handler only when the main thread comes back from the compiler, the device or the disk, and one
that raises in the middle of an exit hook can leave the process hanging. So a command line listens in a thread
of its own: that answers while the main thread is away, and it ends the process by itself, past every hook.
"""

import contextlib
import multiprocessing
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from absl import logging

AT_ONCE = "stopped at once; what was saved before stays"
_FAILED = 1  # exit code
_ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # SIGHUP: the terminal was closed
_GRACE_S = 1.0  # for last words: whoever should read them may not do so


class _Request:
  """A first signal, if there was one. `received` holds its name."""

  def __init__(self, report: Callable[[str], None], when: str, forward: int | None):
    self.received: list[str] = []
    self.doing: str | None = None  # what has to end before anybody looks
    self._report, self._when, self._forward = report, when, forward
    self.heard = threading.Event()  # set by a listener, which may come a little later than the handler
    self.reporting: threading.Thread | None = None  # who tells the user
    self._lock = threading.Lock()
    self._answered = False

  def note(self, number: int) -> None:
    """Books a signal; called in any thread, and more than once for one signal."""
    with self._lock:
      if not self.received:
        self.received.append(signal.Signals(number).name)

  def answer(self, number: int) -> bool:
    """Books a signal and tells the user, once; whether this was the first one."""
    self.note(number)
    if self._answered:
      return False
    self._answered = True
    name = signal.Signals(number).name
    if self.doing:
      said = "Ctrl-C" if number == signal.SIGINT else name
      line = f"{said}: stops as soon as {self.doing}; once more: at once"
    else:
      line = f"received {name}: {self._when}; once more ends it now, unsaved"
    if threading.current_thread() is threading.main_thread():
      self._report(line)
    else:  # who listens does not wait until somebody reads
      self.reporting = threading.Thread(target=self._report, args=(line,), daemon=True)
      self.reporting.start()
    if self._forward is not None and number != self._forward:
      os.kill(os.getpid(), self._forward)
    return True


class Listener:
  """A thread that hears every signal at once, from `own_process` to `close`."""

  def __init__(self):
    self.request: _Request | None = None
    self._interrupted, self._leaving = False, False
    self._read, self._write = os.pipe()
    os.set_blocking(self._write, False)
    self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # a job in the background
    self._before = None if ignored else signal.signal(signal.SIGINT, self.handle)
    self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
    self._thread.start()

  def leave(self) -> None:
    """Nothing is left to do but to end: from here on a first signal ends the process, exit hooks or not."""
    self._leaving = True

  def close(self) -> None:
    """Stops listening; signals do again what they did before."""
    global _listener
    _listener = None
    if self._before is not None:
      signal.signal(signal.SIGINT, self._before)
    signal.set_wakeup_fd(self._fd_before)
    os.close(self._write)
    self._thread.join()
    os.close(self._read)

  def handle(self, number: int, frame: object) -> None:
    """The handler of Python: a request is booked, Ctrl-C without one interrupts what the main thread does."""
    del frame
    request = self.request
    if request is not None:
      request.note(number)
    elif number == signal.SIGINT and not self._leaving:
      raise KeyboardInterrupt

  def _listen(self) -> None:
    while data := os.read(self._read, 64):
      for number in data:
        if number in _ASKING and signal.getsignal(number) == self.handle:
          self._heard(number)

  def _heard(self, number: int) -> None:
    request = self.request
    if request is not None:
      first = request.answer(number)
      request.heard.set()
    else:
      first, self._interrupted = not (self._interrupted or self._leaving), True
    if not first:
      end_now(AT_ONCE)


_listener: Listener | None = None  # of the command line that this process runs, if it runs one
_request: _Request | None = None


def own_process() -> Listener | None:
  """Listens for a command line: a second signal, whenever it comes, ends the process at once.

  Returns:
    The listener; None if there is one, or if this is not the main thread.
  """
  global _listener
  if _listener is not None or threading.current_thread() is not threading.main_thread():
    return None
  _listener = Listener()
  return _listener


def _after_fork() -> None:
  """A child does not speak for its parent: SIGTERM ends it, and Ctrl-C is the parent's to answer."""
  if _listener is not None or _request is not None:
    if _listener is not None:
      signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGHUP):
      signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def stop_signals(
  report: Callable[[str], None],
  when: str = "saving at the end of this dispatch",
  *,
  forward: int | None = None,
) -> Iterator[list[str]]:
  """A list that SIGTERM, Ctrl-C and SIGHUP add their name to; a second one ends the process at once.

  Where no command line runs (a notebook, say), a second one raises KeyboardInterrupt instead. SIGHUP stays
  ignored where it was, as under nohup.

  Args:
    report: takes a line for the user, in any thread.
    when: what will be saved, and when.
    forward: a signal that somebody else handles; the others are passed on as this one.
  """
  global _request
  request = _Request(report, when, forward)
  listener = _listener

  def handler(number, frame):
    del frame
    if not request.answer(number):
      raise KeyboardInterrupt

  previous = {}
  try:
    for number in _ASKING:
      kept = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
      if number != forward and not kept:
        previous[number] = signal.signal(number, listener.handle if listener else handler)
  except ValueError:  # not the main thread: whoever owns it handles signals
    logging.info("signals are not handled: this does not run in the main thread")
  outer, _request = _request, request
  if listener:
    listener.request = request
  try:
    yield request.received
  finally:
    if listener and request.received:
      request.heard.wait(_GRACE_S)
      if request.reporting is not None:
        request.reporting.join(_GRACE_S)
    _request = outer
    if listener:
      listener.request = outer
    for number, old in previous.items():
      signal.signal(number, old)


@contextlib.contextmanager
def until(done: str) -> Iterator[None]:
  """What a first signal has to wait for meanwhile: `the step is compiled`, say."""
  request = _request
  if request is None:
    yield
    return
  before, request.doing = request.doing, done
  try:
    yield
  finally:
    request.doing = before


def end_now(line: str, code: int = _FAILED) -> None:
  """Ends the process from any thread: a last line to stderr, if any, and no exit hook that could hang."""
  with contextlib.suppress(Exception):
    if line and select.select([], [2], [], _GRACE_S)[1]:  # or nobody reads, and writing would wait for ever
      os.write(2, f"{line}\n".encode(errors="backslashreplace"))
  with contextlib.suppress(Exception):
    for child in multiprocessing.active_children():
      child.kill()
  with contextlib.suppress(Exception):  # from Python 3.12 on no thread begins while the interpreter ends
    flushing = threading.Thread(
      target=sys.stdout.flush, daemon=True
    )  # it may wait for a full pipe, or a lock
    flushing.start()
    flushing.join(_GRACE_S)
  os._exit(code)
