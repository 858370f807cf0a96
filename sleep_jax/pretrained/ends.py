"""Tokens that end a text, as a checkpoint names them."""

import os
import pathlib

from sleep_jax.pretrained.fields import PretrainedError
from sleep_jax.pretrained.files import read_json

FIELD = "eos_token_id"


def end_tokens(folder: str | os.PathLike) -> tuple[int, ...]:
  """The end tokens of `generation_config.json` and `config.json`, each in its order, none twice.

  Raises:
    PretrainedError: if one of them is no whole number.
  """
  found: list[int] = []
  for name in ("generation_config.json", "config.json"):
    path = pathlib.Path(folder) / name
    values = read_json(path) if path.exists() else {}
    inner = values.get("text_config")  # of a model that reads images too
    value = values.get(FIELD)
    value = inner.get(FIELD) if value is None and isinstance(inner, dict) else value
    tokens = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int for token in tokens):
      raise PretrainedError(f"{name}: {FIELD} must be a token or a list of tokens, got {value!r:.60}")
    found += tokens
  return tuple(dict.fromkeys(found))
