"""Text from a published checkpoint that falls asleep whenever its window is full.

    python -m experiments.generate --config=experiments/configs/generate.py:jet \
      --config.checkpoint=checkpoints/Jet-Nemotron-2B --prompt='The first rule of sleep is'

The text goes to stdout as it comes, what the model does to stderr. With --session=FILE it goes on from there
if the file exists, and is stored there in the end; then the prompt may be left out. Ctrl-C or SIGTERM while
it generates stores the session after the token that it is at (exit code 3). A stdout that fails ends it too,
after the session is stored (exit code 1). --prompts_file reads several prompts side by side.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

import jax
from absl import flags

from sleep_jax import config, generate, model, session_file
from sleep_jax.config import ATTENTION, ConfigError, ModelConfig, SleepConfig
from sleep_jax.experiments import cli, generate_many
from sleep_jax.experiments.generate_io import LENGTH, Output, Reporter, Writer, prompt_pieces
from sleep_jax.experiments.generate_model import Checkpoint, GenerateConfig
from sleep_jax.pretrained.text_stream import TextStream, printable
from sleep_jax.runtime.files import RunFailedError
from sleep_jax.runtime.signals import stop_signals
from sleep_jax.train import PreemptedError

__all__ = ["GenerateConfig", "TextStream", "main", "printable", "run"]

CONFIG = cli.define_config_flag()
PROMPT = flags.DEFINE_string("prompt", None, "the text to go on from")
PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "a UTF-8 file with that text, of any length; -: stdin")
PROMPTS_FILE = flags.DEFINE_string(
  "prompts_file", None, "a JSON-lines file with several prompts, read side by side; -: stdin"
)
SESSION = flags.DEFINE_string(
  "session", None, "a file to go on from, if it exists, and to store the session in"
)
CHAT = flags.DEFINE_bool(
  "chat", False, "put the prompt into the checkpoint's chat template, as what a user says"
)
JSON = flags.DEFINE_bool("json", False, "print a JSON object in the end, with the text and what it took")

FIELDS = {"": GenerateConfig}


def run(
  cfg: GenerateConfig,
  text: str | Iterable[str] | None,
  session_path: pathlib.Path | None,
  out: TextIO | None,
  told: TextIO | None,
  *,
  as_chat: bool = False,
  as_json: bool = False,
) -> None:
  """Reads the text and generates.

  Args:
    cfg: as asked for.
    text: to read first, whole or in pieces. None: go on from the session.
    session_path: where the session is stored. None: nowhere.
    out: for the text; None if it is closed.
    told: for what the model does; None if it is closed.
    as_chat: the text is what a user says.
    as_json: write one JSON object in the end in place of the text.

  Raises:
    ConfigError: for whatever is wrong with the config, the checkpoint, the text or the session.
    PreemptedError: if it was asked to stop while it generated; the session is stored.
    RunFailedError: if a weight is not finite, or if `out` failed; the session is stored then.
    NotFiniteError, SessionError: if logits are not finite; if the session cannot be stored.
  """
  checkpoint, report = Checkpoint(cfg), Reporter(cfg.sleep.num_passes, told)
  if session_path is not None:
    session_file.check_path(session_path, checkpoint.model, cfg.sleep)
  tokens = None
  if text is not None and not as_chat:
    tokens = _begun(checkpoint.tokenizer.encode_parts(_pieces(text), report=report.note))
  weights = checkpoint.weights()
  session, state = _opened(session_path, weights, checkpoint.model, cfg.sleep)
  if text is not None and as_chat:
    tokens = checkpoint.tokenizer.encode_parts([_turn(checkpoint, "".join(_pieces(text)), state)])
  if set(checkpoint.model.blocks) <= set(ATTENTION):
    report.note("this model has no fast weights: what leaves the window is forgotten")
  text_out = io.StringIO() if as_json else out
  writer = Writer(checkpoint.tokenizer, cfg.stop_strings, Output(text_out), state.get("writer"))
  if tokens is not None:
    known = writer.known(tokens)
    session = generate.read_parts(weights, known, session, checkpoint.model, cfg.sleep, watch=report)
  made = _Made(session)
  with _listening(session_path, report) as stopped:
    try:
      _generate(cfg, checkpoint, weights, made, writer, report, stopped)
      if session_path is None:
        writer.end()
      elif made.end_token:
        writer.pause()
    except generate.NotFiniteError:
      raise  # there is nothing to go on from
    except Exception:
      _store(session_path, made, writer, weights, checkpoint.model, cfg.sleep)
      raise
    if not as_json:
      writer.output.end_line()
    _store(session_path, made, writer, weights, checkpoint.model, cfg.sleep)
    if made.why not in ("", LENGTH):
      report.note(f"ended at {made.why}")
    report.note(f"{report.line(made.session)}{report.stall()}, compilation included")
  if isinstance(text_out, io.StringIO) and as_json:
    writer.output = Output(out)
    row = {"text": text_out.getvalue(), "tokens": made.count, "ended": made.why or "stopped"}
    row["statistics"] = report.statistics(made.session)
    writer.output.write(json.dumps(row, ensure_ascii=False) + "\n")
    if writer.output.failure:  # what was to be in it comes first when the session goes on
      writer.output.unshown = row["text"]
      _store(session_path, made, writer, weights, checkpoint.model, cfg.sleep)
  where = f"the session is stored in {session_path}, the same command without a prompt goes on"
  if failure := writer.output.failure:
    rest = f"; {where}" if session_path is not None else ""
    raise RunFailedError(f"stdout cannot be written: {failure}; {made.count} tokens were made{rest}")
  if stopped and not made.why:
    raise PreemptedError(f"stopped by {stopped[0]} after {made.count} tokens; {where}")


@dataclasses.dataclass
class _Made:
  """What was generated so far.

  Attributes:
    session: after the last token.
    count: tokens.
    why: the text ended; empty if it did not.
    end_token: the one at which it ended, as text; empty if it did not end at one.
  """

  session: generate.Session
  count: int = 0
  why: str = ""
  end_token: str = ""


def _generate(
  cfg: GenerateConfig,
  checkpoint: Checkpoint,
  weights: model.Params,
  made: _Made,
  writer: Writer,
  report: Reporter,
  stopped: list[str],
) -> None:
  """Generates into `made` until the text ends, somebody asks to stop, or nothing can be written any more."""
  tokens = generate.generate(
    weights,
    made.session,
    checkpoint.model,
    cfg.sleep,
    count=cfg.max_new_tokens,
    key=jax.random.key(cfg.seed),
    sampling=cfg.sampling,
    watch=report,
    reuse=True,
  )
  made.why = writer.begin() or (LENGTH if cfg.max_new_tokens == 0 else "")
  while not (made.why or stopped or writer.output.failure):
    begun = time.perf_counter()
    token, made.session = next(tokens)
    report.waited(time.perf_counter() - begun)
    made.count += 1
    made.why = writer.add(int(token[0]))
    if not made.why and (ending := checkpoint.ending(int(token[0]), cfg.sampling)):
      made.why, made.end_token = ending, checkpoint.tokenizer.name_of(int(token[0])) or ""
    if not made.why and made.count == cfg.max_new_tokens:
      made.why = LENGTH


def _store(
  path: pathlib.Path | None,
  made: _Made,
  writer: Writer,
  weights: model.Params,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
) -> None:
  """Stores the session, and what of its text was not shown."""
  if path is not None:
    text = {"writer": writer.state(), "ended": made.end_token}
    session_file.save(path, made.session, weights, cfg, sleep_cfg, text=text)


def _listening(path: pathlib.Path | None, report: Reporter) -> contextlib.AbstractContextManager[list[str]]:
  """Signals that ask to stop; without a session to store there is nothing to do but to end."""
  if path is None:
    return contextlib.nullcontext([])
  return stop_signals(lambda line: report.say(f"\n[{line}]"), "storing the session after this token")


def _opened(
  path: pathlib.Path | None, weights: model.Params, cfg: ModelConfig, sleep_cfg: SleepConfig
) -> tuple[generate.Session, dict[str, Any]]:
  """The stored session and the state of its text, or a new one."""
  if path is None or not path.exists():
    return generate.start(cfg, sleep_cfg), {}
  session, text = session_file.load_with_text(path, weights, cfg, sleep_cfg)
  rows = session.tokens.shape[0]
  config.check(rows == 1, "session", f"{path} holds {rows} sequences, here one is read")
  known = text is None or (isinstance(text, dict) and isinstance(text.get("ended"), str))
  config.check(known, "session", f"{path} has a text state that is not understood")
  return session, text or {}


def _turn(checkpoint: Checkpoint, said: str, state: dict[str, Any]) -> str:
  """What a user says, as the chat template writes it: at the beginning, or behind a session's answer."""
  if "ended" in state:
    return checkpoint.next_turn(said, state["ended"])
  return checkpoint.chat([[{"role": "user", "content": said}]])[0]


def _pieces(text: str | Iterable[str]) -> Iterable[str]:
  return [text] if isinstance(text, str) else text


def _begun(parts: Iterator[list[int]]) -> Iterator[list[int]]:
  """The same parts, of which the first is there already: what is wrong with it is said now."""
  return itertools.chain([next(parts)], parts)


@contextlib.contextmanager
def _prompt(
  text: str | None, file: str | None, session: pathlib.Path | None
) -> Iterator[str | Iterable[str] | None]:
  """The text of the one flag that was given; None if a session that exists makes it needless."""
  if text is not None and file is not None:
    raise ConfigError("--prompt and --prompt_file: give one of them, not both")
  if file is not None:
    with prompt_pieces(file) as pieces:
      yield pieces
    return
  if text is None and not (session is not None and session.exists()):
    raise ConfigError("--prompt or --prompt_file is required")
  yield text


def main() -> int:
  values = cli.required("config", CONFIG.value).to_dict()
  cfg = config.from_dict(GenerateConfig, values)
  path = None if SESSION.value is None else pathlib.Path(SESSION.value)
  if path is not None and not path.parent.is_dir():
    raise ConfigError(f"--session: there is no folder {path.parent}")
  try:
    if PROMPTS_FILE.value is not None:
      given = [f"--{f.name}" for f in (PROMPT, PROMPT_FILE, SESSION, CHAT) if f.value]
      config.check(not given, "--prompts_file", f"goes without {', '.join(given)}")
      generate_many.run(cfg, PROMPTS_FILE.value, sys.stdout, sys.stderr, statistics=JSON.value)
      return cli.DONE
    with _prompt(PROMPT.value, PROMPT_FILE.value, path) as text:
      run(cfg, text, path, sys.stdout, sys.stderr, as_chat=CHAT.value, as_json=JSON.value)
  except (generate.NotFiniteError, session_file.SessionError) as e:
    raise RunFailedError(str(e)) from e
  return cli.DONE


if __name__ == "__main__":
  cli.run(main)
