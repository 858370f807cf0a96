"""The memory that a run cannot do without, counted from its config, against what there is.

All is plain arithmetic on sizes: whatever they are, nothing is allocated, traced or compiled. It is a lower
bound: a run that passes may still be too large. `footprint` counts more closely.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from sleep_jax import attention, config, model, params
from sleep_jax.config import ATTENTION, Config, ConfigError, ModelConfig, SleepConfig

FLOAT32, TOKEN = 4, 12  # bytes; of a token in a batch: its id, its target, its share in the loss
BLOCKS = "model.blocks"
CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check(cfg: Config, tokens: int, *, grouped: int = 1, available: int | None = None) -> None:
  """Refuses a run that cannot fit, before anything of it is made.

  Args:
    cfg: of the run.
    tokens: T, of the longest sequence.
    grouped: batches that the host holds at once.
    available: bytes. None: those of the devices, or of this machine where it is itself the device; an
      accelerator that does not say how much it has lets everything pass.

  Raises:
    ConfigError: naming the field that has most to do with it.
  """
  have = memory() if available is None else available
  need = total(cfg, tokens, grouped)
  if have is None or need <= have:
    return
  field, value = _largest(cfg, tokens, grouped)
  part, size = max(least(cfg, tokens, grouped).items(), key=lambda item: item[1])
  raise _refusal(field, value, have, "such a run", need, f" ({part}: {_bytes(size)})")


def check_weights(cfg: ModelConfig, fields: dict[str, int], *, available: int | None = None) -> None:
  """Refuses a model whose float32 weights cannot fit, before any of them is made.

  Args:
    fields: name -> value of the sizes that the user may have set; the largest is named.
    available: as in `check`.

  Raises:
    ConfigError: naming one of `fields`.
  """
  have, need = memory() if available is None else available, weights(cfg)
  if have is not None and need > have:
    field = max(fields, key=lambda name: fields[name])
    raise _refusal(field, fields[field], have, "such a model", need)


def check_session(
  cfg: ModelConfig, sleep_cfg: SleepConfig, rows: int = 1, *, available: int | None = None
) -> None:
  """Refuses a generation whose memory cannot fit, before any of it is made; weights aside.

  Args:
    rows: sequences that are read side by side.
    available: as in `check`.

  Raises:
    ConfigError: naming `window`, `rows` or `sleep.num_passes`.
  """
  have, need = memory() if available is None else available, session(cfg, sleep_cfg, rows)
  if have is not None and need > have:
    sizes = {"window": cfg.window, "rows": rows, "sleep.num_passes": sleep_cfg.num_passes}
    if not _kept(cfg, sleep_cfg):
      del sizes["sleep.num_passes"]
    field = max(sizes, key=lambda name: sizes[name])
    raise _refusal(field, sizes[field], have, "such a session", need)


def weights(cfg: ModelConfig) -> int:
  """Bytes of all weights in float32."""
  declared = jax.tree.leaves(model.declare(cfg), is_leaf=params.is_weight)
  return FLOAT32 * sum(math.prod(w.shape) for w in declared)


def session(cfg: ModelConfig, sleep_cfg: SleepConfig, rows: int = 1) -> int:
  """Bytes of a session of `generate` at least: S, the open window's cache, and what sliding eviction kept."""
  held = cfg.window + (sleep_cfg.spread or 0)
  cache = _keys(cfg) * held * sum(kind in ATTENTION for kind in cfg.blocks)
  tokens = cfg.window * 5  # an int32 and a bool
  return rows * (_state(cfg) + cache + tokens + _kept(cfg, sleep_cfg) + cfg.vocab_size * FLOAT32)


def total(cfg: Config, tokens: int, grouped: int = 1) -> int:
  """Bytes that a run needs at least, on all devices together."""
  return sum(least(cfg, tokens, grouped).values())


def least(cfg: Config, tokens: int, grouped: int = 1) -> dict[str, int]:
  """Bytes that a run needs at least, by what they are for.

  Args:
    cfg, tokens, grouped: as in `check`.
  """
  declared = jax.tree.leaves(model.declare(cfg.model), is_leaf=params.is_weight)
  count = {group: sum(math.prod(w.shape) for w in declared if w.group == group) for group in params.GROUPS}
  every = cfg.optim.trained == ("*",)  # of frozen weights nothing but themselves is held
  average = sum(count.values()) if cfg.optim.average else 0
  training = _awake(cfg.model, tokens, cfg.train.batch_size // cfg.train.microbatches)
  training += _asleep(cfg.model, cfg.sleep, tokens, cfg.train.batch_size // cfg.train.microbatches)
  testing = _awake(cfg.model, tokens, cfg.train.eval_batch_size) + cfg.train.eval_batch_size * tokens * TOKEN
  return {
    "weights": FLOAT32 * sum(count.values()),
    "gradients and optimizer": FLOAT32 * (2 * count["muon"] + 3 * count["adam"]) if every else 0,
    "average of the weights": FLOAT32 * average,
    "batch": grouped * cfg.train.batch_size * tokens * TOKEN,
    "activations": max(training, testing),
    "measurements": cfg.train.steps_per_dispatch * 2 * FLOAT32,
  }


def memory() -> int | None:
  """Bytes of all devices together, of the machines themselves where these are CPUs; None: it is not known."""
  devices = jax.devices()
  if devices[0].platform == "cpu":
    return _physical() * jax.process_count()
  stats = devices[0].memory_stats() or {}
  return stats["bytes_limit"] * len(devices) if "bytes_limit" in stats else None


def _physical() -> int:
  """Bytes of memory that this machine, or its container, has."""
  limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
  for path in map(pathlib.Path, CGROUPS):
    try:
      limits.append(int(path.read_text()))
    except (OSError, ValueError):  # no such limit
      continue
  return min(limits)


def _awake(cfg: ModelConfig, tokens: int, batch: int) -> int:
  """Bytes of a block's hidden states, of its scores and MLP, of S and of one answer's logits."""
  length, width = min(cfg.window, tokens), _width(cfg)
  keys = length + (cfg.window - 1 if cfg.eviction == "sliding" else 0)
  at_once = attention.scores_at_once(length, keys, cfg.attention.implementation)
  attends = at_once and bool(set(cfg.blocks) & set(ATTENTION))
  scores = cfg.attention.num_heads * length**2 * FLOAT32 if attends else 0
  mlp = (cfg.mlp_dim or 2 * cfg.embed_dim) * length * width if len(cfg.without_mlp) < len(cfg.blocks) else 0
  return batch * (cfg.embed_dim * length * width + max(scores, mlp) + _state(cfg) + cfg.vocab_size * FLOAT32)


def _asleep(cfg: ModelConfig, sleep_cfg: SleepConfig, tokens: int, batch: int) -> int:
  """Bytes that a gradient keeps of every pass it goes through: what the pass began with, h and S."""
  windows = max((tokens - 1) // cfg.window, 0)
  length = min(cfg.window, tokens)
  passes = 1 if sleep_cfg.remat == "offload" else sleep_cfg.backprop_passes or sleep_cfg.num_passes
  if not windows:
    return 0
  kept = batch * _kept(cfg, sleep_cfg)
  if passes == 1:
    return kept
  at_once = 1 if sleep_cfg.remat == "window" else windows
  state = _state(cfg, *sleep_cfg.looped(len(cfg.blocks)))
  return kept + batch * at_once * passes * (cfg.embed_dim * length * _width(cfg) + state)


def _state(cfg: ModelConfig, first: int = 0, last: int | None = None) -> int:
  """Bytes of a sequence's fast weights in blocks `first` .. `last` - 1."""
  memories = sum(kind not in ATTENTION for kind in cfg.blocks[first:last])
  return memories * cfg.fast.num_heads * cfg.fast.key_dim * cfg.fast.value_dim * FLOAT32


def _kept(cfg: ModelConfig, sleep_cfg: SleepConfig) -> int:
  """Bytes of a sequence's keys and values that sliding eviction keeps; N times where each pass has some."""
  if cfg.eviction != "sliding":
    return 0
  first, last = sleep_cfg.looped(len(cfg.blocks))
  passes = sleep_cfg.num_passes if sleep_cfg.kept == "each" else 1
  caches = sum(passes if first <= i < last else 1 for i, kind in enumerate(cfg.blocks) if kind in ATTENTION)
  return caches * (cfg.window - 1) * _keys(cfg)


def _keys(cfg: ModelConfig) -> int:
  """Bytes of a token's key and value in one block."""
  return 2 * cfg.num_kv_heads * cfg.head_dim * _width(cfg)


def _width(cfg: ModelConfig) -> int:
  """Bytes of an activation."""
  return 2 if cfg.dtype == "bfloat16" else 4


def _largest(cfg: Config, tokens: int, grouped: int) -> tuple[str, Any]:
  """The field whose usual value would save most, and its value; where all are usual, whose half would."""
  found = []
  for usual in (True, False):
    for name, value, smaller in _smaller(cfg, usual):
      try:
        other = _changed(cfg, name, smaller)
      except ConfigError:  # it does not fit the other fields
        continue
      length = getattr(other.data, "length", tokens) if name.startswith("data.") else tokens
      found.append((total(other, length, grouped), name, value))
    if found and min(found)[0] < total(cfg, tokens, grouped):
      return min(found)[1:]
  return "train.batch_size", cfg.train.batch_size


def _smaller(group: Any, usual: bool, path: str = "") -> Iterator[tuple[str, int, int]]:
  """Name, value and a smaller value, the usual one or the half, of every size in a config."""
  for field in dataclasses.fields(group):
    name, value = f"{path}{field.name}", getattr(group, field.name)
    default: Any = field.default
    if dataclasses.is_dataclass(value):
      yield from _smaller(value, usual, f"{name}.")
      continue
    if name == BLOCKS:
      value, default = len(value), len(default)
    if isinstance(value, int) and not isinstance(value, bool):
      default = default if isinstance(default, int) else 2
      smaller = default if usual else value // 2
      if 0 < smaller < value:
        yield name, value, smaller


def _changed(cfg: Config, name: str, smaller: int) -> Config:
  """The config with one size changed; of the blocks the first ones stay."""
  *groups, key = name.split(".")
  change: Any = {key: cfg.model.blocks[:smaller] if name == BLOCKS else smaller}
  for group in reversed(groups):
    change = {group: change}
  return config.replace(cfg, **change)


def _refusal(field: str, value: Any, have: int, what: str, need: int, most: str = "") -> ConfigError:
  """The error that names a field whose size cannot be."""
  return ConfigError(
    f"{field}: {value} is too much for the {_bytes(have)} of memory here: {what} needs at least"
    f" {_bytes(need)}{most}"
  )


def _bytes(size: int) -> str:
  """`3.2 GB`."""
  for power, unit in enumerate(("B", "kB", "MB", "GB", "TB", "PB")):
    if size < 1000 ** (power + 1):
      return f"{size / 1000**power:.3g} {unit}"
  return "more than 1000 PB"
