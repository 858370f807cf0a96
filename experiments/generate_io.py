"""What the command that generates reads and writes: prompts, the text on stdout, the lines on stderr."""

import array
import codecs
import contextlib
import dataclasses
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, TextIO

import numpy as np

from sleep_jax import config, generate
from sleep_jax.config import ConfigError
from sleep_jax.generate import SamplingConfig
from sleep_jax.pretrained.text_stream import StopStrings, TextStream, printable
from sleep_jax.pretrained.tokenizer import Tokenizer

LENGTH = "length"  # why a text ended that could go on
READ = 1 << 16  # bytes of a prompt read at a time
LINE = 1 << 24  # bytes of a line of a file of prompts


class Output:
  """Text to a stream that may fail. After it failed nothing more is written, and nothing is raised.

  A terminal gets no control characters; a pipe or a file gets everything.

  Args:
    out: the stream; None if there is none (a process can be started without a stdout).

  Attributes:
    failure: why it failed; None so far.
    unshown: the text that was not written.
  """

  def __init__(self, out: TextIO | None):
    self._out, self.unshown = out, ""
    self.failure = "it is closed" if out is None else None
    self._terminal = out is not None and not out.closed and out.isatty()

  def write(self, text: str) -> None:
    """Writes a text now; one that cannot be written is kept."""
    if not self._written(text):
      self.unshown += text

  def end_line(self) -> None:
    """Writes a line end, which is no part of the text."""
    self._written("\n")

  def _written(self, text: str) -> bool:
    if self._out is not None and self.failure is None:
      try:
        self._out.write(printable(text) if self._terminal else text)
        self._out.flush()
        return True
      except BrokenPipeError:
        self.failure = "its reader is gone"
      except UnicodeEncodeError as e:
        wrong = e.object[e.start]
        self.failure = f"its encoding {e.encoding} has no {wrong!a}; PYTHONIOENCODING=utf-8 sets one that has"
      except (OSError, ValueError) as e:
        self.failure = getattr(e, "strerror", None) or "it is closed"
      self._give_up()
    return False

  def _give_up(self) -> None:
    """Python flushes stdout once more when it ends; what is left in it must not fail again."""
    if self._out is sys.stdout:
      with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())


class Reporter:
  """Says on a stream what the model does and what it took; the watcher of `generate.read`.

  A stream that fails loses these lines and nothing else.
  """

  def __init__(self, passes: int, out: TextIO | None):
    self._passes, self._out = passes, out
    self._seconds = {"awake": 0.0, "asleep": 0.0}
    self._night = 0.0  # seconds of the sleep that is under way
    self._waits = array.array("d")

  def __call__(self, what: str, session: generate.Session, seconds: float) -> None:
    if what == "awake":
      self._seconds["awake"] += seconds
      return
    self._seconds["asleep"] += seconds
    self._night += seconds
    if what == "asleep":  # and no `pass` of a sleep that goes on
      self.say(f"\n[slept {1e3 * self._night:.1f} ms | {self.line(session)}]")
      self._night = 0.0

  def say(self, line: str) -> None:
    if self._out is not None:
      with contextlib.suppress(OSError, ValueError):
        print(line, file=self._out, flush=True)

  def note(self, line: str) -> None:
    """Says a line in brackets."""
    self.say(f"[{line}]")

  def waited(self, seconds: float) -> None:
    """Notes how long one token took, sleep at the end of its window included."""
    self._waits.append(seconds)

  def line(self, session: generate.Session) -> str:
    """What was read and what it took."""
    awake, asleep = (1e3 * self._seconds[name] for name in ("awake", "asleep"))
    return (
      f"{session.tokens_read} tokens read, {session.windows} windows slept on, {self._passes} passes each, "
      f"{generate.state_bytes(session)} bytes of state, {awake:.1f} ms awake, {asleep:.1f} ms asleep"
    )

  def stall(self) -> str:
    """A clause that says how long tokens took, the sleep at a window's end included; empty without tokens."""
    if not self._waits:
      return ""
    half, most, longest = self._percentiles()
    return f", a token took {half:.1f} ms (p50), {most:.1f} ms (p99), {longest:.1f} ms (most)"

  def _percentiles(self) -> list[float]:
    """Milliseconds that half of the tokens, 99 of 100 and all of them took at most."""
    return [float(ms) for ms in 1e3 * np.percentile(np.asarray(self._waits), (50, 99, 100))]

  def statistics(self, session: generate.Session) -> dict[str, Any]:
    """The same for a program, and the milliseconds that half, 99 of 100 and all of the tokens took."""
    half, most, longest = self._percentiles() if self._waits else (None, None, None)
    return {
      "tokens_read": session.tokens_read,
      "windows": session.windows,
      "passes": self._passes,
      "state_bytes": generate.state_bytes(session),
      "awake_ms": 1e3 * self._seconds["awake"],
      "asleep_ms": 1e3 * self._seconds["asleep"],
      "token_ms_p50": half,
      "token_ms_p99": most,
      "token_ms_most": longest,
    }


class Writer:
  """Tokens in, text out: decoded, ended at stop strings, written. What was held back goes on in another one.

  Args:
    tokenizer: of the tokens.
    stop_strings: end the text.
    output: to write to.
    state: of the writer of the session that goes on; None for a new text.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    stop_strings: Sequence[str],
    output: Output,
    state: dict[str, Any] | None = None,
  ):
    state = {"stream": None, "unshown": ""} if state is None else state
    config.check(isinstance(state.get("unshown"), str), "session", "its text state is no text")
    self._stream = TextStream(tokenizer, state.get("stream"))
    self._stops, self.output = StopStrings(stop_strings), output
    self._unshown, self._prompted = state["unshown"], False

  def known(self, parts: Iterable[list[int]]) -> Iterator[list[list[int]]]:
    """The parts of a prompt as `generate.read_parts` takes them; its text is not written."""
    for tokens in parts:
      self._unshown += self._stream.skip(tokens)
      self._prompted = True
      yield [tokens]

  def begin(self) -> str:
    """Writes what an earlier writer held back; a clause that says why that ends the text, or empty."""
    text, self._unshown = self._unshown, ""
    if not self._prompted:
      return self._write(text)
    self.output.write(text)  # it is before the prompt, and no stop string reaches across that
    return ""

  def add(self, token: int) -> str:
    """Writes what a token adds; a clause that says which stop string ended the text, or empty."""
    return self._write(self._stream.add(token))

  def end(self) -> None:
    """Writes what is held back: nothing goes on from here."""
    text, self._stops.held = self._stops.held + self._stream.end(), ""
    self.output.write(text)

  def pause(self) -> None:
    """A token ended the text, which may go on: writes what is complete."""
    text, self._stops.held = self._stops.held + self._stream.show(), ""
    self.output.write(text)

  def state(self) -> dict[str, Any]:
    """What another writer goes on from, as plain data."""
    return {"stream": self._stream.state(), "unshown": self.output.unshown + self._stops.held}

  def _write(self, text: str) -> str:
    shown, string = self._stops.add(text)
    self.output.write(shown)
    if string is None:
      return ""
    self._stream.skip([])  # the rest of the token that completed it is not shown, now or later
    return f"the text {string!r}"


@contextlib.contextmanager
def prompt_pieces(path: str) -> Iterator[Iterator[str]]:
  """The text of a prompt file in pieces; `-` is stdin. A file is first read once, to find what is wrong.

  Raises:
    ConfigError: if it cannot be read, is not UTF-8, or holds a NUL.
  """
  with _opened(path, "--prompt_file") as file:
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
      begin = file.tell()
      for _ in _decoded(file, f"--prompt_file: {path}"):
        pass
      file.seek(begin)
    yield _decoded(file, f"--prompt_file: {path}")


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One line of a file of prompts.

  Attributes:
    prompt: the text to go on from; or
    messages: of a chat, each with `role` and `content`.
    sampling: how its tokens are drawn.
    stop_strings: end the text; they are left out.
    max_new_tokens: tokens to generate.
    seed: of what is drawn.
  """

  prompt: config.FreeText | None = None
  messages: tuple[Any, ...] = ()
  sampling: SamplingConfig = SamplingConfig()
  stop_strings: tuple[config.FreeText, ...] = ()
  max_new_tokens: int = 200
  seed: int = 0

  def __post_init__(self):
    config.check((self.prompt is None) != (not self.messages), "prompt", "give it or messages, not both")
    config.check("" not in self.stop_strings, "stop_strings", "must not be empty")
    config.at_least(self.max_new_tokens, 0, "max_new_tokens")
    config.check(0 <= self.seed < 1 << 32, "seed", f"must lie in 0..{(1 << 32) - 1}, got {self.seed}")


def prompt_lines(path: str, defaults: dict[str, Any]) -> list[tuple[str, Prompt]]:
  """The prompts of a JSON-lines file, `-` for stdin: a line is a text, or an object with fields of `Prompt`.

  Args:
    path: the file.
    defaults: fields that a line does not give; those of `sampling` one by one. The seed is that of the first
      line and counts up.

  Returns:
    Where each prompt stands, for messages, and the prompt.

  Raises:
    ConfigError: if it cannot be read, or a line is no prompt; it names the line.
  """
  found: list[tuple[str, Prompt]] = []
  with _opened(path, "--prompts_file") as file:
    for number, line in enumerate(iter(lambda: file.readline(LINE), b""), 1):
      where = f"--prompts_file: {path}, line {number}"
      config.check(len(line) < LINE, where, f"is longer than {LINE} bytes")
      if not line.strip():
        continue
      try:
        values = json.loads(line.decode())
      except (ValueError, RecursionError) as e:
        raise ConfigError(f"{where}: is no JSON ({' '.join(str(e).split())[:100]})") from e
      values = {"prompt": values} if isinstance(values, str) else values
      config.check(isinstance(values, dict), where, "must be a text or an object")
      given = defaults | {"seed": defaults["seed"] + len(found)} | values
      if isinstance(values.get("sampling"), dict):
        given["sampling"] = defaults["sampling"] | values["sampling"]
      try:
        found.append((where, config.from_dict(Prompt, given)))
      except ConfigError as e:
        raise ConfigError(f"{where}: {e}") from e
  config.check(bool(found), "--prompts_file", f"{path} holds no prompt")
  return found


def _opened(path: str, flag: str) -> contextlib.AbstractContextManager[BinaryIO]:
  """A file, or stdin."""
  if path == "-":
    config.check(sys.stdin is not None, flag, "stdin is closed")
    return contextlib.nullcontext(sys.stdin.buffer)
  try:
    return open(path, "rb")
  except (OSError, ValueError) as e:
    name = path if path.isprintable() else repr(path)
    raise ConfigError(f"{flag}: {name:.200} cannot be read: {getattr(e, 'strerror', None) or e}") from e


def _decoded(file: BinaryIO, where: str) -> Iterator[str]:
  """The text of a file, piece by piece, line ends as they are."""
  decoder, at = codecs.getincrementaldecoder("utf-8")(), 0
  try:
    for data in iter(lambda: file.read(READ), b""):
      if (nul := data.find(0)) >= 0:
        raise ConfigError(f"{where} is no UTF-8 text: it holds a NUL (byte {at + nul})")
      held = len(decoder.getstate()[0])
      yield decoder.decode(data)
      at += len(data)
    held = len(decoder.getstate()[0])
    yield decoder.decode(b"", final=True)
  except UnicodeDecodeError as e:
    raise ConfigError(f"{where} is no UTF-8 text (byte {at - held + e.start})") from e
  except OSError as e:
    raise ConfigError(f"{where} cannot be read: {e.strerror}") from e
