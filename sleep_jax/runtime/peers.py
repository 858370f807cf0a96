"""How the processes of one run meet, and how each learns at once that another one is gone.

JAX's own service ends the process from C++ when the others do not come, when an address is wrong, or some
ten seconds after one of them died, and says all three in a page. So the processes meet here first, by one
connection of each to the first one, and keep it: the system closes it when a process dies, however it dies.
"""

import contextlib
import json
import os
import re
import select
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from sleep_jax.runtime.files import RunFailedError
from sleep_jax.runtime.signals import end_now

START_S = 300.0  # that processes wait for each other at the start
_OTHERS_S = 5.0  # that a process has for its own last words after another one failed
_HELLO_S = 5.0  # that a caller has to say who it is
_FAILED = 1
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s\[\]:/@]+):([0-9]{1,5})", re.ASCII)


class PeerError(ValueError):
  """The flags of this process do not fit those of the others, or name no place to meet; one line."""


class Peers:
  """The connections of this process: of the first one to all others, of each other one to the first.

  A thread waits for what they say. When a process is gone, the others end with one line and exit code 1.
  """

  def __init__(self, index: int, count: int, connections: dict[int, socket.socket]):
    self._index, self._count, self._connections = index, count, connections
    self._leaving = threading.Event()
    self._bad_news = threading.Event()
    self._done: set[int] = set()  # said goodbye
    for connection in connections.values():
      _keep_alive(connection)
      connection.setblocking(True)
    if index:
      _hush_jax()
    threading.Thread(target=self._listen, name="peers", daemon=True).start()

  def leave(self, code: int) -> None:
    """Says goodbye: from here on this process's end is no news, but for its exit code."""
    self._leaving.set()
    for connection in self._connections.values():
      _send(connection, f"bye {self._index} {code}")

  def wait_for_news(self, seconds: float = 2.0) -> None:
    """Waits whether what just failed here failed because of another process: then this one is ended."""
    if self._bad_news.wait(seconds):
      time.sleep(2 * _OTHERS_S)

  def _listen(self) -> None:
    with selectors.DefaultSelector() as waiting:
      for peer, connection in self._connections.items():
        waiting.register(connection, selectors.EVENT_READ, (peer, [b""]))
      while waiting.get_map():
        for key, _ in waiting.select():
          peer, rest = key.data
          data = _receive(key.fileobj)
          if not data:
            waiting.unregister(key.fileobj)
            if peer not in self._done:
              self._gone(peer, "ended without a word: killed, or out of memory?")
          *lines, rest[0] = (rest[0] + data).split(b"\n")
          for line in lines:
            self._hear(peer, line)

  def _hear(self, peer: int, line: bytes) -> None:
    word, *numbers = line.decode(errors="replace").split()
    if word == "bye" and len(numbers) == 2 and all(n.isdecimal() for n in numbers):
      self._done.add(peer)
      if int(numbers[1]) not in (0, 3):  # done, or asked to stop and saved: as we are
        self._gone(int(numbers[0]), f"failed with exit code {numbers[1]}", wait=True)
    elif word == "gone" and len(numbers) > 1 and numbers[0].isdecimal():
      self._gone(int(numbers[0]), " ".join(numbers[1:]))

  def _gone(self, peer: int, how: str, *, wait: bool = False) -> None:
    """Ends this process because another one is gone, unless it ends by itself."""
    if self._leaving.is_set():
      return
    if wait and self._leaving.wait(_OTHERS_S):
      return
    self._bad_news.set()
    if self._index == 0:
      for other, connection in self._connections.items():
        if other != peer and other not in self._done:
          _send(connection, f"gone {peer} {how}")
    speaks = self._index == (1 if peer == 0 else 0)
    line = f"failed: process {peer} of {self._count} {how}; the same command goes on from the last checkpoint"
    if self._index == 0:
      time.sleep(0.5)  # JAX's service is in this process: the others end before it
    elif select.select([], [2], [], 0)[1]:  # there is no time to lose: JAX's own last words are a page long
      os.write(2, f"{line}\n".encode() if speaks else b"")
      os._exit(_FAILED)
    end_now(line if speaks else "", _FAILED)


def parse_address(text: str) -> tuple[str, int]:
  """Host and port of HOST:PORT, where the host can be found.

  Raises:
    PeerError: if it is not of that form, the port is none, or nobody knows the host.
  """
  match = _ADDRESS.fullmatch(text)
  if not match:
    raise PeerError(f"--coordinator_address: must be HOST:PORT, got {text!r:.80}")
  host, port = match[1].strip("[]"), int(match[2])
  if not 1 <= port <= 65535:
    raise PeerError(f"--coordinator_address: the port must lie in 1..65535, got {port}")
  try:
    socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
  except (OSError, UnicodeError) as e:
    told = e.strerror if isinstance(e, OSError) else "no name of a host"
    raise PeerError(f"--coordinator_address: host {host!r:.80} is not known here: {told}") from e
  return host, port


def is_local(host: str) -> bool:
  """Whether a host is this machine, and reached by nobody else."""
  return host in ("localhost", "::1") or host.startswith("127.")


def meet(
  host: str, port: int, index: int, count: int, report: Callable[[str], None], wait_s: float | None = None
) -> Peers | None:
  """Waits until all processes are there; the first one lets the others in.

  Args:
    host, port: where the first process listens until all have come.
    index, count: which process this is, of how many.
    report: takes a line about who is waited for, after some seconds.
    wait_s: by default `START_S`.

  Returns:
    The connections, None if there is one process only.

  Raises:
    PeerError: if the port is taken, or two processes disagree about how many there are or which one they are.
    RunFailedError: if not all have come in time.
  """
  deadline = time.monotonic() + (START_S if wait_s is None else wait_s)
  if index == 0:
    connections = _let_in(host, port, count, report, deadline)
  else:
    connections = {0: _call(host, port, index, count, report, deadline)}
  return Peers(index, count, connections) if connections else None


def _let_in(
  host: str, port: int, count: int, report: Callable[[str], None], deadline: float
) -> dict[int, socket.socket]:
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  try:
    door = socket.create_server((host if is_local(host) else "", port), family=family, backlog=count)
  except OSError as e:
    raise PeerError(f"--coordinator_address: cannot listen on port {port}: {e.strerror}") from e
  inside: dict[int, socket.socket] = {}
  said_at = time.monotonic() + 10
  try:
    with door:
      door.settimeout(0.5)
      while len(inside) < count - 1:
        missing = ", ".join(str(i) for i in range(1, count) if i not in inside)
        if time.monotonic() > deadline:
          raise RunFailedError(f"--distributed: of {count} processes these have not come: {missing}")
        if time.monotonic() > said_at:
          report(f"process 0 of {count} waits for these: {missing}")
          said_at += 30
        with contextlib.suppress(TimeoutError):
          caller, _ = door.accept()
          _admit(caller, count, inside)
    for connection in inside.values():
      _send(connection, "come")
  except BaseException:
    for connection in inside.values():
      connection.close()
    raise
  return inside


def _admit(caller: socket.socket, count: int, inside: dict[int, socket.socket]) -> None:
  """Takes a caller in who says that it is one of us; sends others away."""
  try:
    caller.settimeout(_HELLO_S)
    hello = json.loads(_line(caller))
    index, of = hello["process"], hello["of"]
    if not all(isinstance(x, int) and not isinstance(x, bool) for x in (index, of)):
      raise TypeError("no numbers")
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    caller.close()
    return
  if of != count:
    _send(caller, f"no --num_processes: process 0 has {count}, process {index} has {of}")
    caller.close()
    raise PeerError(f"--num_processes: process 0 has {count}, process {index} has {of}")
  if index in inside or not 0 < index < count:
    _send(caller, f"no --process_id: there is a process {index} already")
    caller.close()
    return
  inside[index] = caller


def _call(
  host: str, port: int, index: int, count: int, report: Callable[[str], None], deadline: float
) -> socket.socket:
  said_at = time.monotonic() + 10
  while True:
    if time.monotonic() > deadline:
      raise RunFailedError(f"--distributed: process 0 does not answer at {host}:{port}")
    if time.monotonic() > said_at:
      report(f"process {index} of {count} waits for process 0 at {host}:{port}")
      said_at += 30
    with contextlib.suppress(OSError):
      connection = socket.create_connection((host, port), timeout=_HELLO_S)
      _send(connection, json.dumps({"process": index, "of": count}))
      answer = None
      while answer is None and time.monotonic() < deadline:  # it waits for the others
        with contextlib.suppress(TimeoutError):
          answer = _line(connection)
      if answer == b"come":
        return connection
      connection.close()
      if answer and answer.startswith(b"no "):
        raise PeerError(answer[3:].decode(errors="replace"))
    time.sleep(0.2)


def _hush_jax() -> None:
  """Keeps out of stderr the page that JAX's client prints from C++ when the first process has died.

  All that goes to stderr is read by another process, since this one may be ended before it could.
  """
  command = [sys.executable, "-S", "-E", "-c", _FILTER]
  with contextlib.suppress(OSError):
    reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=2, stderr=subprocess.DEVNULL)
    os.dup2(reader.stdin.fileno(), 2)
    reader.stdin.close()


_FILTER = r"""
import re, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
  signal.signal(number, signal.SIG_IGN)
dying = None
for line in sys.stdin.buffer:
  dying = dying or re.match(rb"F[0-9]{4} .*Terminating process because the JAX distributed service", line)
  if not dying or line.startswith(b"failed: "):
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()
"""


def _line(connection: socket.socket) -> bytes:
  """The next line, of at most 256 bytes; what there is of it if the other side hangs up."""
  line = b""
  while len(line) < 256:
    byte = connection.recv(1)
    if byte in (b"", b"\n"):
      break
    line += byte
  return line


def _send(connection: socket.socket, line: str) -> None:
  with contextlib.suppress(OSError):
    connection.sendall(line.encode() + b"\n")


def _receive(connection: socket.socket) -> bytes:
  try:
    return connection.recv(4096)
  except OSError:
    return b""


def _keep_alive(connection: socket.socket) -> None:
  """Has the system ask now and then: a machine that lost its power says nothing."""
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
    if hasattr(socket, name):
      connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def ends_in(seconds: float, line: str) -> threading.Timer:
  """A started timer that ends the process with a line, unless it is cancelled first."""
  timer = threading.Timer(seconds, end_now, (line, _FAILED))
  timer.daemon = True
  timer.start()
  return timer
