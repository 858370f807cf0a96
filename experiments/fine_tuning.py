"""What a run's config takes from a checkpoint: the model, its weights, its tokenizer.

A preset for a checkpoint has a group `pretrained` (`sleep_jax.pretrained.StartConfig`) and none of the fields
that this fills in: what is said once cannot disagree.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from sleep_jax import config, pretrained
from sleep_jax.pretrained.tokenizer import Tokenizer

FILLED = (("train", "init_from"), ("train", "init_ignore"), ("optim", "trained"), ("data", "tokenizer"))


def filled_in(values: Mapping[str, Any]) -> dict[str, Any]:
  """Nested values without the group `pretrained`, with what it stands for.

  Args:
    values: nested; `model` holds what a checkpoint does not say (`window`, `eviction`, `dtype`, ...).

  Raises:
    ConfigError: if the checkpoint cannot be read, its tokenizer does not fit its vocabulary, or a field is
      given that it says.
  """
  values = {name: dict(x) if isinstance(x, Mapping) else x for name, x in values.items()}
  start = config.from_dict(pretrained.StartConfig, values.pop("pretrained"), "pretrained.")
  for group, name in FILLED:
    given = name in values.setdefault(group, {})
    config.check(not given, f"{group}.{name}", "is said by the group `pretrained`; leave it out")
  model = pretrained.start_model(start, values.get("model", {}))
  published = pretrained.published_folder(start.folder)
  Tokenizer(published, model)  # refuses one that does not fit
  values["model"] = model
  values["train"] |= {"init_from": str(pathlib.Path(start.folder).resolve()), "init_ignore": start.ignore}
  values["optim"]["trained"] = pretrained.trained_weights(start, model)
  values["data"]["tokenizer"] = str((published / "tokenizer.json").resolve())
  return values
