"""Text from a published checkpoint that falls asleep whenever its window is full.

    python -m experiments.generate --config=experiments/configs/generate.py:jet \
      --config.checkpoint=checkpoints/Jet-Nemotron-2B --prompt='The first rule of sleep is'

The text goes to stdout as it comes, what the model does to stderr. With --session=FILE it goes on from there
if the file exists, and is stored there in the end; then the prompt may be left out. Ctrl-C or SIGTERM while
it generates stores the session after the token that it is at (exit code 3).
"""

import contextlib
import dataclasses
import pathlib
import sys
import unicodedata
from typing import Literal, TextIO

import jax
import numpy as np
from absl import flags

from sleep_jax import config, generate, pretrained, session_file
from sleep_jax.config import ATTENTION, ConfigError, ModelConfig, SleepConfig
from sleep_jax.experiments import cli
from sleep_jax.generate import SamplingConfig
from sleep_jax.pretrained.tokenizer import Tokenizer
from sleep_jax.runtime.signals import stop_signals
from sleep_jax.train import PreemptedError

CONFIG = cli.define_config_flag()
PROMPT = flags.DEFINE_string("prompt", None, "the text to go on from")
PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "a UTF-8 file with that text; of any length")
SESSION = flags.DEFINE_string(
  "session", None, "a file to go on from, if it exists, and to store the session in"
)

LONGEST_CHARACTER = 4  # bytes in UTF-8; so many tokens may have to be put together


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
  """One generation.

  Attributes:
    checkpoint: folder in published format, with its `tokenizer.json`.
    window: L. None: what `pretrained.load` takes.
    eviction: `hard` or `sliding`.
    predict_passes: passes awake. None: as published, 1 for a model with a memory.
    dtype: of activations.
    param_dtype: of weights.
    sleep: how a full window is slept on.
    sampling: how tokens are drawn.
    max_new_tokens: tokens to generate; 0 only reads.
    stop: tokens after which generation ends.
    seed: of what is drawn.
    ignore: fields of the checkpoint's `config.json` that are known to change nothing.
  """

  checkpoint: str | None = None
  window: config.Count | None = None
  eviction: Literal["hard", "sliding"] = "hard"
  predict_passes: config.Count | None = None
  dtype: Literal["float32", "bfloat16"] = "float32"
  param_dtype: Literal["float32", "bfloat16"] = "float32"
  sleep: SleepConfig = SleepConfig()
  sampling: SamplingConfig = SamplingConfig()
  max_new_tokens: config.Natural = 200
  stop: tuple[int, ...] = ()
  seed: config.Seed = 0
  ignore: tuple[str, ...] = ()

  def __post_init__(self):
    config.check_fields(self)
    config.check(bool(self.checkpoint), "checkpoint", "is required: the folder with config.json")

  @property
  def changes(self) -> dict[str, object]:
    """What is changed of the checkpoint's `ModelConfig`."""
    asked = {"window": self.window, "predict_passes": self.predict_passes}
    given = {name: value for name, value in asked.items() if value is not None}
    return given | {"eviction": self.eviction, "dtype": self.dtype}


FIELDS = {"": GenerateConfig}


class Report:
  """Says on a stream what the model does and what it took; the watcher of `generate.read`."""

  def __init__(self, passes: int, out: TextIO):
    self._passes, self._out = passes, out
    self._seconds = {"awake": 0.0, "asleep": 0.0}

  def __call__(self, what: str, session: generate.Session, seconds: float) -> None:
    self._seconds[what] += seconds
    if what == "asleep":
      print(f"\n[slept {1e3 * seconds:.1f} ms | {self.line(session)}]", file=self._out, flush=True)

  def line(self, session: generate.Session) -> str:
    """What was read and what it took."""
    awake, asleep = (1e3 * self._seconds[name] for name in ("awake", "asleep"))
    return (
      f"{session.tokens_read} tokens read, {session.windows} windows slept on, {self._passes} passes each, "
      f"{generate.state_bytes(session)} bytes of state, {awake:.1f} ms awake, {asleep:.1f} ms asleep"
    )


class TextStream:
  """Tokens in, the text that each adds out; a character whose bytes are not all there is held back."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._shown: list[int] = []  # the tokens shown last: a text may begin otherwise than it goes on
    self._held: list[int] = []

  def add(self, token: int) -> str:
    """The printable text that is known now."""
    self._held.append(token)
    return self._show(wait=len(self._held) < LONGEST_CHARACTER)

  def end(self) -> str:
    """What was held back."""
    return self._show(wait=False)

  def _show(self, wait: bool) -> str:
    text = self._tokenizer.decode(self._shown + self._held)
    if wait and text.endswith("\N{REPLACEMENT CHARACTER}"):
      return ""
    new = text[len(self._tokenizer.decode(self._shown)) :]
    self._shown, self._held = self._held or self._shown, []
    return printable(new)


def printable(text: str) -> str:
  """The text without characters that steer a terminal; line ends and tabs stay."""
  return "".join(c for c in text if c in "\n\t" or not unicodedata.category(c).startswith("C"))


def run(
  cfg: GenerateConfig, text: str | None, session_path: pathlib.Path | None, out: TextIO, told: TextIO
) -> None:
  """Reads the text and generates.

  Args:
    cfg: as asked for.
    text: to read first. None: go on from the session.
    session_path: where the session is stored. None: nowhere.
    out: for the text.
    told: for what the model does.

  Raises:
    ConfigError: for whatever is wrong with the config, the checkpoint, the text or the session.
    PreemptedError: if it was asked to stop while it generated; the session is stored.
  """
  folder = pathlib.Path(cfg.checkpoint)
  source = pretrained.open_source(folder, ignore=cfg.ignore, **cfg.changes)
  config.check_sleep(cfg.sleep, source.model)
  tokenizer = Tokenizer(folder, source.model)
  tokens = None if text is None else tokenizer.encode(text)
  architecture, weights, _ = pretrained.load(
    folder, param_dtype=cfg.param_dtype, ignore=cfg.ignore, **cfg.changes
  )
  report = Report(cfg.sleep.num_passes, told)
  session = _opened(session_path, weights, architecture, cfg.sleep)
  if set(architecture.blocks) <= set(ATTENTION):
    print("[this model has no fast weights: what leaves the window is forgotten]", file=told)
  if tokens is not None:
    session = generate.read(weights, np.array([tokens]), session, architecture, cfg.sleep, watch=report)
  stream = TextStream(tokenizer)
  made = generate.generate(
    weights,
    session,
    architecture,
    cfg.sleep,
    count=cfg.max_new_tokens,
    key=jax.random.key(cfg.seed),
    sampling=cfg.sampling,
    watch=report,
  )
  count, ended = 0, False
  with _listening(session_path, told) as stopped:
    for token, after in made:
      session = after
      print(stream.add(int(token[0])), end="", file=out, flush=True)
      count += 1
      ended = count == cfg.max_new_tokens or int(token[0]) in cfg.stop
      if ended or stopped:
        break
    print(stream.end(), file=out, flush=True)
    print(f"[{report.line(session)}, compilation included]", file=told, flush=True)
    if session_path is not None:
      session_file.save(session_path, session, weights, architecture, cfg.sleep)
  if stopped and not ended:
    raise PreemptedError(
      f"stopped by {stopped[0]} after {count} tokens; the session is stored in {session_path}, the same"
      " command without a prompt goes on"
    )


def _listening(path: pathlib.Path | None, told: TextIO) -> contextlib.AbstractContextManager[list[str]]:
  """Signals that ask to stop; without a session to store there is nothing to do but to end."""
  if path is None:
    return contextlib.nullcontext([])
  return stop_signals(
    lambda line: print(f"\n[{line}]", file=told, flush=True), "storing the session after this token"
  )


def _opened(
  path: pathlib.Path | None, weights: object, cfg: ModelConfig, sleep_cfg: SleepConfig
) -> generate.Session:
  """The stored session, or a new one."""
  if path is None or not path.exists():
    return generate.start(cfg, sleep_cfg)
  session = session_file.load(path, weights, cfg, sleep_cfg)
  rows = session.tokens.shape[0]
  config.check(rows == 1, "session", f"{path} holds {rows} sequences, here one is read")
  return session


def _prompt(text: str | None, file: str | None, session: pathlib.Path | None) -> str | None:
  """The text of the one flag that was given; None if a session that exists makes it needless."""
  if text is not None and file is not None:
    raise ConfigError("--prompt and --prompt_file: give one of them, not both")
  if text is not None:
    return text
  if file is None:
    if session is not None and session.exists():
      return None
    raise ConfigError("--prompt or --prompt_file is required")
  try:
    return pathlib.Path(file).read_text(encoding="utf-8")
  except OSError as e:
    raise ConfigError(f"--prompt_file: {file} cannot be read: {e.strerror}") from e
  except UnicodeDecodeError as e:
    raise ConfigError(f"--prompt_file: {file} is no UTF-8 text (byte {e.start})") from e


def main() -> int:
  values = cli.required("config", CONFIG.value).to_dict()
  path = None if SESSION.value is None else pathlib.Path(SESSION.value)
  if path is not None and not path.parent.is_dir():
    raise ConfigError(f"--session: there is no folder {path.parent}")
  text = _prompt(PROMPT.value, PROMPT_FILE.value, path)
  run(config.from_dict(GenerateConfig, values), text, path, sys.stdout, sys.stderr)
  return cli.DONE


if __name__ == "__main__":
  cli.run(main)
