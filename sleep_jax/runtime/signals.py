"""Ctrl-C and SIGTERM as a request: whoever is at work looks, finishes what it is at, saves and stops."""

import contextlib
import signal
from collections.abc import Callable, Iterator

from absl import logging


@contextlib.contextmanager
def stop_signals(
  report: Callable[[str], None], when: str = "saving at the end of this dispatch"
) -> Iterator[list[str]]:
  """A list that SIGTERM and Ctrl-C add their name to; a second one ends the process at once.

  Args:
    report: takes a line for the user.
    when: what will be saved, and when.
  """
  received: list[str] = []

  def handler(number, frame):
    del frame
    if received:
      raise KeyboardInterrupt
    received.append(signal.Signals(number).name)
    report(f"received {received[0]}: {when}; once more ends it now, unsaved")

  previous = {}
  try:
    for number in (signal.SIGTERM, signal.SIGINT):
      previous[number] = signal.signal(number, handler)
  except ValueError:  # not the main thread: whoever owns it handles signals
    logging.info("signals are not handled: this does not run in the main thread")
  try:
    yield received
  finally:
    for number, old in previous.items():
      signal.signal(number, old)
