"""What a run's config takes from a checkpoint: the model, its weights, its tokenizer.

A preset for a checkpoint has a group `pretrained` (`sleep_jax.pretrained.StartConfig`) and none of the fields
that this fills in: what is said once cannot disagree. A checkpoint may be moved while a run rests: the run
knows it by its content.
"""

import contextlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from sleep_jax import config, pretrained
from sleep_jax.pretrained import files
from sleep_jax.pretrained.tokenizer import Tokenizer

FILLED = (("train", "init_from"), ("train", "init_ignore"), ("optim", "trained"), ("data", "tokenizer"))


def filled_in(values: Mapping[str, Any]) -> dict[str, Any]:
  """Nested values without the group `pretrained`, with what it stands for.

  Args:
    values: nested; `model` holds what a checkpoint does not say (`window`, `eviction`, `dtype`, ...).

  Raises:
    ConfigError: if the checkpoint cannot be read, its tokenizer does not fit its vocabulary, a field is
      given that it says, or there is no `data`.
  """
  values = {name: dict(x) if isinstance(x, Mapping) else x for name, x in values.items()}
  config.check("data" in values, "data", "is required")
  start = config.from_dict(pretrained.StartConfig, values.pop("pretrained"), "pretrained.")
  for group in ("train", "optim", "data", "model"):
    fields = values.setdefault(group, {})
    config.check(isinstance(fields, dict), group, f"must be a group of fields, got {config.shown(fields)}")
  for group, name in FILLED:
    given = name in values[group]
    config.check(not given, f"{group}.{name}", "is said by the group `pretrained`; leave it out")
  model = pretrained.start_model(start, values["model"])
  tokenizer = pretrained.tokenizer_file(start.folder)
  Tokenizer(tokenizer.parent, model)  # refuses one that does not fit
  values["model"] = model
  values["train"] |= {"init_from": str(pathlib.Path(start.folder).resolve()), "init_ignore": start.ignore}
  values["optim"]["trained"] = pretrained.trained_weights(start, model)
  values["data"]["tokenizer"] = str(tokenizer.resolve())
  return values


def identified(cfg: config.Config, workdir: str | os.PathLike) -> tuple[config.Config, tuple[str, ...]]:
  """Adds the digest of a run's checkpoint to its config, and finds what may differ from the run's workdir.

  Where the workdir holds the same digest, the checkpoint may lie elsewhere than before. Where it lies at the
  same place, a workdir of an older version, which holds no digest, is given one; and a run may have gone on.

  Args:
    cfg: of the run.
    workdir: which may hold the run already.

  Returns:
    The config, and the dotted names of the fields that may differ.

  Raises:
    PretrainedError: if the checkpoint cannot be read.
    ConfigError: if the config asks for another digest.
  """
  folder, wanted = cfg.train.init_from, cfg.train.init_digest
  if folder is None:
    return cfg, ()
  digest = pretrained.start_digest(folder)
  config.check(wanted in (None, digest), "train.init_digest", f"is {wanted}, that of {folder} is {digest}")
  cfg = config.replace(cfg, train={"init_digest": digest})
  known = _stored(pathlib.Path(workdir) / "config.json")
  before = known["train"].get("init_from")
  if known["train"].get("init_digest") == digest:
    tokenizer = ["data.tokenizer"] if _of_checkpoint(cfg, known, before) else []
    earlier = ["train.init_digest"] if pretrained.is_run(folder) else []  # of checkpoints before it went on
    return cfg, ("train.init_from", *tokenizer, *earlier)
  again = known["train"].get("init_digest") is None or pretrained.is_run(folder)
  return cfg, ("train.init_digest",) if before == folder and again else ()


def _of_checkpoint(cfg: config.Config, known: dict[str, Any], before: Any) -> bool:
  """Whether the tokenizers of a config and of a workdir are both those of their checkpoints."""
  now, then = getattr(cfg.data, "tokenizer", None), known["data"].get("tokenizer")
  if not now or not isinstance(then, str) or pathlib.Path(now).name != "tokenizer.json":
    return False
  behind = pretrained.is_run(cfg.train.init_from)  # the tokenizer is that of a checkpoint behind the run
  return pathlib.Path(now) == pretrained.tokenizer_file(cfg.train.init_from).resolve() and (
    behind or then == f"{before}/tokenizer.json"
  )


def _stored(path: pathlib.Path) -> dict[str, dict[str, Any]]:
  """The groups `train` and `data` of a run's config.json; empty where `workdir.prepare` will find a fault."""
  values: dict[str, Any] = {}
  with contextlib.suppress(pretrained.PretrainedError):
    values = files.read_json(path)
  groups = {name: values.get(name) for name in ("train", "data")}
  return {name: x if isinstance(x, dict) else {} for name, x in groups.items()}
