"""How the processes of one run meet, and how each learns at once that another one is gone.

JAX's own service ends the process from C++ when the others do not come, when an address is wrong, or some
ten seconds after one of them died, and says all three in a page. So the processes meet here first, by one
connection of each to the first one, and keep it: the system closes it when a process dies, however it dies.

What goes over it are lines of a word and numbers, at most `_LONGEST` bytes each. Whoever calls and says
anything else is sent away, and cannot keep others waiting.
"""

import contextlib
import errno
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
_CALLERS = 64  # who may be about to say so; one more, and the first of them is sent away
_LONGEST = 128  # bytes of a line
_FAILED, _KILLED = 1, 137  # exit codes; the second one stands for an end without a word
_HOST = r"[A-Za-z0-9](?:[\w.-]*[\w.])?"
_ADDRESS = re.compile(rf"(\[[0-9A-Fa-f:.]+\]|{_HOST}):([0-9]{{1,5}})", re.ASCII)
_HELLO = re.compile(rb"sleep_jax ([0-9]{1,9}) ([0-9]{1,9}) ([0-9a-f]{0,64})")
_NEWS = re.compile(rb"(bye|gone) ([0-9]{1,9}) ([0-9]{1,3})")


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
          data = _receive(self._connections[peer])
          if not data:
            waiting.unregister(key.fileobj)
            if peer not in self._done:
              self._gone(peer, _KILLED)
          *lines, last = (rest[0] + data).split(b"\n")
          rest[0] = last[:_LONGEST]
          for line in lines:
            self._hear(peer, line)

  def _hear(self, peer: int, line: bytes) -> None:
    news = _NEWS.fullmatch(line)
    if not news:
      return
    about, code = int(news[2]), int(news[3])
    if news[1] == b"gone":
      self._gone(about, code)
    else:
      self._done.add(peer)
      if code not in (0, 3):  # done, or asked to stop and saved: as we are
        self._gone(peer, code, wait=True)

  def _gone(self, peer: int, code: int, *, wait: bool = False) -> None:
    """Ends this process because another one is gone, unless it ends by itself."""
    if self._leaving.is_set():
      return
    if wait and self._leaving.wait(_OTHERS_S):
      return
    self._bad_news.set()
    if self._index == 0:
      for other, connection in self._connections.items():
        if other != peer and other not in self._done:
          _send(connection, f"gone {peer} {code}")
    how = f"failed with exit code {code}"
    if code == _KILLED:
      how = "ended without a word: killed, or out of memory?"
    line = f"failed: process {peer} of {self._count} {how}; the same command goes on from the last checkpoint"
    if self._index != (1 if peer == 0 else 0):
      line = _SAID if self._index else ""  # by another one
    if self._index == 0:
      time.sleep(0.5)  # JAX's service is in this process: the others end before it
    elif select.select([], [2], [], 0)[1]:  # there is no time to lose: JAX's own last words are a page long
      os.write(2, f"{line}\n".encode())
      os._exit(_FAILED)
    end_now(line, _FAILED)


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


def own_address(host: str, port: int) -> str | None:
  """The address of this machine that a host's name stands for, which is the only one to listen at.

  Returns:
    A numeric address. None, for all of them: where the host stands for a door in front of this machine, or
    is a name that leads to 127.0.0.1 here and, no doubt, to another address elsewhere.

  Raises:
    PeerError: if its port is taken.
  """
  local = host in ("localhost", "::1") or host.startswith("127.")
  for family, _, _, _, (first, *_) in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
    address = str(first)
    if not local and (address == "::1" or address.startswith("127.")):
      continue
    try:
      socket.create_server((address, port), family=family).close()
    except OSError as e:
      if e.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        continue
      raise _no_door(port, e) from e
    return address
  return None


def meet(
  host: str,
  port: int,
  index: int,
  count: int,
  report: Callable[[str], None],
  *,
  wait_s: float | None = None,
  secret: str = "",
) -> Peers | None:
  """Waits until all processes are there; the first one lets the others in.

  Args:
    host, port: where the first process listens until all have come.
    index, count: which process this is, of how many.
    report: takes a line about who is waited for, after some seconds.
    wait_s: by default `START_S`.
    secret: hexadecimal digits that only these processes know, if there are any.

  Returns:
    The connections, None if there is one process only.

  Raises:
    PeerError: if the port is taken, or two processes disagree about how many there are or which one they are.
    RunFailedError: if not all have come in time.
  """
  deadline = time.monotonic() + (START_S if wait_s is None else wait_s)
  hello = f"sleep_jax {index} {count} {secret}"
  if count == 1:
    return None
  if index == 0:
    connections = _Door(host, port, count, secret).let_in(report, deadline)
  else:
    connections = {0: _call(host, port, hello, report, deadline)}
  return Peers(index, count, connections)


class _Door:
  """Where the first process listens until all others have come."""

  def __init__(self, host: str, port: int, count: int, secret: str):
    address = own_address(host, port)
    family, backlog = socket.AF_INET, max(count, 2 * _CALLERS)
    if address and ":" in address:
      family = socket.AF_INET6
    try:
      self._door = socket.create_server((address or "", port), family=family, backlog=backlog)
    except OSError as e:
      raise _no_door(port, e) from e
    self._count, self._secret = count, secret.encode()
    self._inside: dict[int, socket.socket] = {}
    self._callers: dict[socket.socket, tuple[float, bytes]] = {}  # until when each is heard, what it said

  def let_in(self, report: Callable[[str], None], deadline: float) -> dict[int, socket.socket]:
    """Connections to all other processes."""
    said_at = time.monotonic() + 10
    try:
      self._door.setblocking(False)
      while len(self._inside) < self._count - 1:
        now = time.monotonic()
        missing = ", ".join(str(i) for i in range(1, self._count) if i not in self._inside)
        if now > deadline:
          raise RunFailedError(f"--distributed: of {self._count} processes these have not come: {missing}")
        if now > said_at:
          report(f"process 0 of {self._count} waits for these: {missing}")
          said_at += 30
        for caller in [c for c, (until, _) in self._callers.items() if now > until]:
          self._send_away(caller)
        for there in select.select([self._door, *self._callers], [], [], 0.2)[0]:
          self._open() if there is self._door else self._hear(there)
      for connection in self._inside.values():
        _send(connection, "come")
    except BaseException:
      for connection in self._inside.values():
        connection.close()
      raise
    finally:
      for caller in list(self._callers):
        self._send_away(caller)
      self._door.close()
    return self._inside

  def _open(self) -> None:
    with contextlib.suppress(OSError):
      caller, _ = self._door.accept()
      caller.setblocking(False)
      if len(self._callers) >= _CALLERS:
        self._send_away(next(iter(self._callers)))
      self._callers[caller] = time.monotonic() + _HELLO_S, b""

  def _hear(self, caller: socket.socket) -> None:
    if caller not in self._callers:
      return
    until, said = self._callers[caller]
    data = _receive(caller)
    said += data
    if b"\n" in said:
      self._admit(caller, said.partition(b"\n")[0])
    elif not data or len(said) > _LONGEST:
      self._send_away(caller)
    else:
      self._callers[caller] = until, said

  def _admit(self, caller: socket.socket, hello: bytes) -> None:
    """Takes a caller in who says that it is one of us; sends others away."""
    told = _HELLO.fullmatch(hello)
    if not told or told[3] != self._secret:
      self._send_away(caller)
      return
    index, count = int(told[1]), int(told[2])
    if count != self._count:
      self._send_away(caller, f"count {self._count}")
      raise PeerError(f"--num_processes: process 0 has {self._count}, process {index} has {count}")
    if index in self._inside or not 0 < index < count:
      self._send_away(caller, f"taken {index}")
      return
    del self._callers[caller]
    self._inside[index] = caller
    _send(caller, "wait")

  def _send_away(self, caller: socket.socket, answer: str = "") -> None:
    self._callers.pop(caller)
    if answer:
      _send(caller, answer)
    caller.close()


def _call(host: str, port: int, hello: str, report: Callable[[str], None], deadline: float) -> socket.socket:
  """A connection to the first process, once all have come."""
  _, index, count, *_ = hello.split()
  said_at = time.monotonic() + 10
  while time.monotonic() < deadline:
    if time.monotonic() > said_at:
      report(f"process {index} of {count} waits for process 0 at {host}:{port}")
      said_at += 30
    with contextlib.suppress(OSError):
      connection = socket.create_connection((host, port), timeout=_HELLO_S)
      _send(connection, hello)
      answer = _line(connection)
      if answer == b"wait":
        connection.settimeout(max(deadline - time.monotonic(), 0) + _HELLO_S)
        with contextlib.suppress(OSError):
          if _line(connection) == b"come":
            return connection
        connection.close()
        raise RunFailedError("--distributed: process 0 ended before all processes had come")
      connection.close()
      word, _, number = answer.partition(b" ")
      if word == b"count" and number.isdigit():
        raise PeerError(f"--num_processes: process 0 has {int(number)}, process {index} has {count}")
      if word == b"taken":
        raise PeerError(f"--process_id: there is a process {index} already")
    time.sleep(0.2)
  raise RunFailedError(f"--distributed: process 0 does not answer at {host}:{port}")


def _no_door(port: int, error: OSError) -> PeerError:
  return PeerError(f"--coordinator_address: cannot listen on port {port}: {error.strerror}")


def _hush_jax() -> None:
  """Keeps out of stderr the page that JAX's client prints from C++ when the first process has died.

  All that goes to stderr is read by another process, since this one may be ended before it could. It keeps
  those lines back, and passes them on at the end unless it was said here which process went.
  """
  command = [sys.executable, "-S", "-E", "-c", _FILTER]
  with contextlib.suppress(OSError):
    reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=2, stderr=subprocess.DEVNULL)
    if reader.stdin is not None:
      os.dup2(reader.stdin.fileno(), 2)
      reader.stdin.close()


_SAID = "\0"  # a line to the filter: another process has said it
_FILTER = r"""
import re, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
  signal.signal(number, signal.SIG_IGN)
kept, said, dying = [], False, False
for line in sys.stdin.buffer:
  dying = dying or re.match(rb"F[0-9]{4} .*Terminating process because the JAX distributed service", line)
  mine = line.startswith(b"failed: ") or line == b"\0\n"
  said = said or mine
  if not mine and (dying or re.match(rb"[EW][0-9]{4} .*coordination_service", line)):
    kept.append(line)
  elif line != b"\0\n":
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()
if not said:
  sys.stdout.buffer.write(b"".join(kept))
"""


def _line(connection: socket.socket) -> bytes:
  """The next line, or as much of it as there is; waits as long as the connection's time limit says."""
  line = b""
  while len(line) < _LONGEST:
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
