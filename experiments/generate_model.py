"""What is asked of a generation, and the checkpoint that it is asked of."""

import dataclasses
import pathlib
from typing import Literal

from sleep_jax import config, model, pretrained
from sleep_jax.config import SleepConfig
from sleep_jax.cost import need
from sleep_jax.generate import SamplingConfig
from sleep_jax.pretrained import chat
from sleep_jax.pretrained.ends import end_tokens
from sleep_jax.pretrained.finite import first_not_finite
from sleep_jax.pretrained.tokenizer import Tokenizer
from sleep_jax.runtime.files import RunFailedError


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
    sampling: how tokens are drawn, and whether the checkpoint's end tokens end the text.
    max_new_tokens: tokens to generate; 0 only reads.
    stop: more tokens after which generation ends.
    stop_strings: texts before which generation ends.
    rows: prompts of --prompts_file that are read side by side.
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
  stop_strings: tuple[config.FreeText, ...] = ()
  rows: config.Count = 8
  seed: config.Seed = 0
  ignore: tuple[str, ...] = ()

  def __post_init__(self):
    config.check_fields(self)
    config.check(bool(self.checkpoint), "checkpoint", "is required: the folder with config.json")
    config.check("" not in self.stop_strings, "stop_strings", "must not be empty")

  @property
  def changes(self) -> dict[str, object]:
    """What is changed of the checkpoint's `ModelConfig`."""
    asked = {"window": self.window, "predict_passes": self.predict_passes}
    given = {name: value for name, value in asked.items() if value is not None}
    return given | {"eviction": self.eviction, "dtype": self.dtype}


class Checkpoint:
  """A checkpoint of which headers and tokenizer are read, and not yet the weights.

  Attributes:
    model: the architecture.
    tokenizer: the checkpoint's own.
    ends: tokens that end a text unless `sampling.stop_at_end` is False.

  Raises:
    ConfigError: if something is wrong with it, or it does not fit what is asked.
  """

  def __init__(self, cfg: GenerateConfig):
    self._cfg, self._folder = cfg, pathlib.Path(cfg.checkpoint or "")
    self.model = pretrained.open_source(self._folder, ignore=cfg.ignore, **cfg.changes).model
    config.check_sleep(cfg.sleep, self.model)
    need.check_session(self.model, cfg.sleep)
    self.tokenizer = Tokenizer(self._folder, self.model)
    for token in cfg.stop:
      inside = 0 <= token < self.model.vocab_size
      config.check(inside, "stop", f"tokens must lie in 0..{self.model.vocab_size - 1}, got {token}")
    self.ends = end_tokens(self._folder)

  def weights(self) -> model.Params:
    """Reads the weights.

    Raises:
      ConfigError: if they do not fit.
      RunFailedError: if one of them is NaN or infinite.
    """
    cfg = self._cfg
    _, weights, source = pretrained.load(
      self._folder, param_dtype=cfg.param_dtype, ignore=cfg.ignore, **cfg.changes
    )
    if (name := first_not_finite(source, weights)) is not None:
      raise RunFailedError(f"{self._folder}: tensor {name} holds NaN or infinity in {cfg.param_dtype}")
    return weights

  def ending(self, token: int, sampling: SamplingConfig) -> str:
    """A clause that names a token at which a text ends; empty for any other."""
    if token in self._cfg.stop or (sampling.stop_at_end and token in self.ends):
      return f"token {token} {self.tokenizer.name_of(token)!r}"
    return ""

  def chat(self, chats: list[list[chat.Message]]) -> list[str]:
    """See `chat.render`."""
    return chat.render(self._folder, chats)

  def next_turn(self, text: str, ended: str) -> str:
    """See `chat.next_turn`."""
    return chat.next_turn(self._folder, text, ended)
