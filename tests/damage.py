"""Damage to files and values, one case at a time: what a test that fuzzes puts in their place."""

import contextlib
import copy
import json
import pathlib
import resource
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

from sleep_jax import config

REMOVED = object()
POOL: list[Any] = [
  REMOVED, None, True, False, "", "text", "16", "../x", "\ud800", "a\nb", [], {}, [1], {"a": 1}, [[]] * 3,
  0, -1, 1, 3, 0.5, -0.0, 2**31, 2**63, 10**9, 16777216, 16777217, 10**400, 1e308, 1e-320,
  float("nan"), float("inf"), float("-inf"),
]  # fmt: skip
DEEP: Any = 1
for _ in range(900):
  DEEP = [DEEP]

Cases = Iterator[tuple[str, Callable[[], bytes]]]  # what is wrong, and the content of the file


def paths_of(value: Any, path: tuple = ()) -> Iterator[tuple]:
  """The place of every value in a JSON object: each field, and the first and last of a list."""
  if path:
    yield path
  if isinstance(value, dict):
    for name, inner in value.items():
      yield from paths_of(inner, (*path, name))
  elif isinstance(value, list) and value:
    for i in {0, len(value) - 1}:
      yield from paths_of(value[i], (*path, i))


def with_value(values: Any, path: tuple, value: Any) -> Any:
  """A copy with one value replaced or removed."""
  values = copy.deepcopy(values)
  inside = values
  for step in path[:-1]:
    inside = inside[step]
  if value is REMOVED:
    del inside[path[-1]]
  else:
    inside[path[-1]] = value
  return values


def named(value: Any) -> str:
  """A value in the name of a case."""
  return "removed" if value is REMOVED else config.shown(value)[:20]


def encoded(text: str) -> bytes:
  """UTF-8, and what is none where the text holds half of a pair."""
  return text.encode("utf-8", "surrogatepass")


def json_cases(text: str) -> Cases:
  """A JSON file: every field with every value, and damage to the whole."""
  values = json.loads(text)
  for path in paths_of(values):
    where = ".".join(map(str, path))
    for value in [*POOL, DEEP]:
      changed = lambda p=path, v=value: encoded(json.dumps(with_value(values, p, v)))  # noqa: E731
      yield f"{where} = {named(value)}", changed
    if isinstance(path[-1], str):
      pair = f'"{path[-1]}":'
      yield f"{where} twice", lambda pair=pair: encoded(text.replace(pair, f"{pair} 1, {pair}", 1))
  yield "an unknown field", lambda: encoded(json.dumps(values | {"un\nknown": 1}))
  yield from text_cases(text)


def text_cases(text: str) -> Cases:
  """Damage to the whole of a file of text."""
  for content in ("", "{", "[]", "null", "1", '"x"', "{}", "\ufeff" + text, text + "}"):
    yield f"{content!r:.12}", lambda content=content: encoded(content)
  yield "nested lists", lambda: b"[" * 100_000
  yield "nested objects", lambda: b'{"a":' * 50_000
  yield "another encoding", lambda: b"\xff\xfe" + text.encode("utf-16-le")
  yield "zeros", lambda: bytes(100)
  yield "17 MB", lambda: b"{" + b" " * (17 << 20)
  yield "5000 digits", lambda: b'{"a": ' + b"9" * 5000 + b"}"
  for at in range(1, len(text), max(1, len(text) // 12)):
    yield f"cut at {at}", lambda at=at: text[:at].encode()


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
  """Raises TimeoutError in what takes longer; on the main thread only."""

  def alarmed(*_):
    raise TimeoutError(f"it takes more than {seconds} s")

  before = signal.signal(signal.SIGALRM, alarmed)
  signal.alarm(seconds)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def bounded(most: float) -> Iterator[None]:
  """Raises MemoryError in what asks for so many bytes more than the process has, used or not.

  On Linux by the address space, which takes no time. It sees every large claim, those of C++ too, and not
  what comes out of memory that the process has kept: for bounds of some hundred MB. Elsewhere by
  `tracemalloc`, with which all takes twice as long: AssertionError in the end.
  """
  held = pathlib.Path("/proc/self/statm")
  if not held.exists():
    tracemalloc.start()
    try:
      yield
      assert tracemalloc.get_traced_memory()[1] < most
    finally:
      tracemalloc.stop()
    return
  before = resource.getrlimit(resource.RLIMIT_AS)
  now = int(held.read_text().split()[0]) * resource.getpagesize()
  resource.setrlimit(resource.RLIMIT_AS, (now + int(most), before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_AS, before)


def one_line(error: BaseException, most: int = 1000) -> str:
  """Its message, which is one line that a terminal can show."""
  text = str(error)
  assert text and text.isprintable() and len(text) <= most, repr(text[:300])
  return text
