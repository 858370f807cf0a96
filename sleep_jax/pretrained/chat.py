"""What people and models say to each other, as the one text that a checkpoint's chat template makes of it."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from sleep_jax.pretrained.fields import PretrainedError
from sleep_jax.pretrained.files import read_json

Message = Mapping[str, str]  # with `role` and `content`
TEMPLATE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
LARGEST = 1 << 20  # bytes of a template
SECONDS = 30.0  # for the process that renders, which bounds its own work to ten
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
RENDER = pathlib.Path(__file__).with_name("chat_render.py")
ANSWER = "4f1c the answer 9ae2"  # stands for what a model said before


def render(folder: str | os.PathLike, chats: Sequence[Sequence[Message]]) -> list[str]:
  """The text of each chat, up to where the model is to answer.

  Args:
    folder: of the checkpoint, with `chat_template.jinja`, or a template in `tokenizer_config.json`.
    chats: each a list of messages.

  Raises:
    PretrainedError: if there is no template, it fails, or a message has no role or no content.
  """
  for chat in chats:
    for message in chat:
      given = isinstance(message, Mapping) and all(
        isinstance(message.get(k), str) for k in ("role", "content")
      )
      if not given:
        raise PretrainedError(f"messages: each must have a role and a content, got {message!r:.80}")
  return _render(folder, [{"messages": list(chat), "add_generation_prompt": True} for chat in chats])


def next_turn(folder: str | os.PathLike, text: str, ended: str) -> str:
  """What a chat goes on with when a user says something after the model has answered.

  Args:
    folder: of the checkpoint.
    text: what the user says.
    ended: the end token with which the answer ended; empty if it did not end by itself.

  Raises:
    PretrainedError: as `render`, or if the template writes what was said before anew at each turn.
  """
  before = [{"role": "user", "content": "."}, {"role": "assistant", "content": ANSWER}]
  old, new = _render(
    folder,
    [
      {"messages": before, "add_generation_prompt": False},
      {"messages": [*before, {"role": "user", "content": text}], "add_generation_prompt": True},
    ],
  )
  said, answer, _ = old.rpartition(ANSWER)
  if not answer or not new.startswith(said + answer):
    raise PretrainedError(
      "the chat template changes what was said before: a chat cannot go on from a session"
    )
  return new[len(said + answer) :].removeprefix(ended)


def _render(folder: str | os.PathLike, chats: list[dict[str, Any]]) -> list[str]:
  template, context = _template(pathlib.Path(folder))
  asked = json.dumps({"template": template, "context": context, "chats": chats})
  program = [sys.executable, "-I", str(RENDER)]
  try:
    done = subprocess.run(program, input=asked.encode(), capture_output=True, timeout=SECONDS, check=False)
  except subprocess.TimeoutExpired as e:
    raise PretrainedError(f"the chat template is not done after {SECONDS:.0f} s") from e
  try:
    answer = json.loads(done.stdout)
  except ValueError as e:
    raise PretrainedError(
      f"the chat template takes too much time or memory (exit code {done.returncode})"
    ) from e
  if "error" in answer:
    raise PretrainedError(f"the chat template fails: {answer['error']}")
  return answer["texts"]


def _template(folder: pathlib.Path) -> tuple[str, dict[str, str]]:
  """The template and the special tokens that it may use."""
  values = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
  context = {}
  for name in NAMED:
    token = values.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str):
      context[name] = token
  path = folder / TEMPLATE
  if path.exists():
    try:
      if not path.is_file() or path.stat().st_size > LARGEST:
        raise PretrainedError(f"{TEMPLATE}: is no file, or larger than {LARGEST >> 20} MB")
      return path.read_text(encoding="utf-8"), context
    except (OSError, UnicodeDecodeError) as e:
      raise PretrainedError(f"{TEMPLATE}: cannot be read ({e})") from e
  template = values.get("chat_template")
  if isinstance(template, list):  # several, each with a name
    named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
    template = named.get("default")
  if not isinstance(template, str):
    raise PretrainedError(f"{folder}: there is no {TEMPLATE}, and no chat_template in {CONFIG}")
  return template, context
