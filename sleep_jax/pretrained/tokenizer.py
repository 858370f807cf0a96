"""Text to tokens and back, from a checkpoint's `tokenizer.json`. No chat template, no added tokens."""

import os
import pathlib

import sleep_jax

try:
  import tokenizers
except ImportError:
  sleep_jax.require("tokenizers", "tokenizers")
  raise

from sleep_jax.config import ModelConfig
from sleep_jax.pretrained.fields import PretrainedError


class Tokenizer:
  """A checkpoint's own tokenizer.

  Args:
    folder: which holds `tokenizer.json`.
    cfg: of the model that is to read the tokens.

  Raises:
    PretrainedError: if there is no tokenizer, it cannot be read, or it has a token that the embedding lacks.
      (An embedding may have rows to spare, as that of Qwen2.5 does.)
  """

  def __init__(self, folder: str | os.PathLike, cfg: ModelConfig):
    path = pathlib.Path(folder) / "tokenizer.json"
    if not path.is_file():
      raise PretrainedError(f"{path}: there is no such file")
    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises nothing narrower
      raise PretrainedError(f"{path.name}: is no tokenizer ({str(e).splitlines()[0]})") from e
    highest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if not 0 <= highest < cfg.vocab_size:
      raise PretrainedError(
        f"{path.name}: its tokens go up to {highest}, the model's vocabulary to {cfg.vocab_size - 1}"
      )

  def encode(self, text: str) -> list[int]:
    """Tokens of a text, nothing added.

    Raises:
      PretrainedError: if there are none.
    """
    tokens = self._tokenizer.encode(text, add_special_tokens=False).ids
    if not tokens:
      raise PretrainedError("prompt: has no tokens")
    return tokens

  def decode(self, tokens: list[int]) -> str:
    """Text of tokens; special ones are left out."""
    return self._tokenizer.decode(tokens, skip_special_tokens=True)
