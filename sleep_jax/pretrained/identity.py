"""Which checkpoint it is, wherever it lies: a digest of its content."""

import hashlib
import json
import os
import pathlib
from typing import Any

from sleep_jax.pretrained import files, safetensors_io
from sleep_jax.pretrained.fields import PretrainedError

_NAMED = ("config.json", safetensors_io.INDEX, "memory.json", "memory.safetensors", "tokenizer.json")
# What may differ between two states of one run: where things lie, and how long and how closely it is watched.
_TRAIN = ("steps", "log_every", "eval_every", "save_every", "keep_checkpoints", "init_from")


def digest(folder: str | os.PathLike) -> str:
  """SHA-256 over the files of a checkpoint that decide what it is: config, weights, memory and tokenizer.

  All weights are read. Two copies of a checkpoint have the same digest; one changed bit gives another.

  Raises:
    PretrainedError: if a file cannot be read.
  """
  folder = pathlib.Path(folder)
  names = [name for name in _NAMED if files.is_there(folder / name)]
  names += safetensors_io.Tensors(folder).metadata
  whole = hashlib.sha256()
  for name in sorted(set(names)):
    with files.open_regular(folder / name) as file:
      try:
        content = hashlib.file_digest(file, "sha256")
      except OSError as e:
        raise PretrainedError(f"{folder / name}: {e.strerror}") from e
    whole.update(f"{name} {content.hexdigest()}\n".encode())
  return whole.hexdigest()


def run_digest(values: dict[str, Any]) -> str:
  """SHA-256 of a run's `config.json`: which run it is, whatever step it has reached and wherever it lies.

  The checkpoint with which it began counts by its digest (`train.init_digest`), not by its path.
  """
  data = values.get("data")
  data = {name: x for name, x in data.items() if name != "tokenizer"} if isinstance(data, dict) else data
  train = {name: x for name, x in values["train"].items() if name not in _TRAIN}
  kept = {name: x for name, x in values.items() if name != "mesh"} | {"data": data, "train": train}
  return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
