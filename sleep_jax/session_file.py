"""A session in a file: safetensors, with what it belongs to as JSON in the header.

The file appears when it is complete, or not at all, and what is read back is equal to the bit.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from sleep_jax import config, generate, model, params
from sleep_jax.config import ConfigError, ModelConfig, SleepConfig

FORMAT = 1
HEADER = "sleep_jax_session"
SAMPLED = 256  # entries of every tensor that `fingerprint` looks at


def fingerprint(weights: model.Params) -> str:
  """SHA-256 of the name, shape, dtype and first entries of every tensor: tells two trainings apart."""
  digest = hashlib.sha256()
  for path, x in jax.tree_util.tree_leaves_with_path(weights):
    first = np.asarray(x[(0,) * (x.ndim - 1)][:SAMPLED])
    digest.update(f"{params.name_of(path)} {x.shape} {x.dtype}\n".encode() + first.tobytes())
  return digest.hexdigest()


def save(
  path: str | os.PathLike,
  session: generate.Session,
  weights: model.Params,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
) -> None:
  """Writes a session, over the file that is there.

  Raises:
    ConfigError: if the file cannot be written.
  """
  path = pathlib.Path(path)
  arrays = {name: np.asarray(jax.device_get(x)) for name, x in _arrays(session).items()}
  header = _belongs_to(weights, cfg, sleep_cfg) | {
    "format": FORMAT,
    "sha256": _checksum(arrays),
    "batch": session.tokens.shape[0],
    "filled": session.filled,
    "windows": session.windows,
  }
  data = safetensors.numpy.save(arrays, metadata={HEADER: json.dumps(header)})
  try:
    handle, made = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
  except OSError as e:
    raise ConfigError(f"session: {path} cannot be written: {e.strerror}") from e
  try:
    with os.fdopen(handle, "wb") as out:
      out.write(data)
      out.flush()
      os.fsync(out.fileno())
    os.replace(made, path)
  except OSError as e:
    pathlib.Path(made).unlink(missing_ok=True)
    raise ConfigError(f"session: {path} cannot be written: {e.strerror}") from e


def load(
  path: str | os.PathLike, weights: model.Params, cfg: ModelConfig, sleep_cfg: SleepConfig
) -> generate.Session:
  """Reads a session back.

  Args:
    path: the file.
    weights, cfg, sleep_cfg: what it is to go on with; the same that it was saved with, except for what
      changes no number but by rounding (`kernel`, `remat`, `loops`, `backprop_passes`).

  Raises:
    ConfigError: if there is no such file, it is damaged, or it is another model's.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ConfigError(f"session: there is no file {path}")
  try:
    with safetensors.safe_open(path, framework="np") as opened:
      header = json.loads((opened.metadata() or {})[HEADER])
      arrays = {name: opened.get_tensor(name) for name in opened.keys()}
    batch, filled, windows = (int(header[name]) for name in ("batch", "filled", "windows"))
    version = header["format"]
  except (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError) as e:
    raise ConfigError(f"session: {path} is damaged or no session ({' '.join(str(e).split())})") from e
  config.check(version == FORMAT, "session", f"{path} is of format {version!r}, this program reads {FORMAT}")
  config.check(
    _checksum(arrays) == header.get("sha256"), "session", f"{path} is damaged: its checksum is wrong"
  )
  for name, now in _belongs_to(weights, cfg, sleep_cfg).items():
    _same(name, header.get(name), now, path)
  return _session(path, arrays, batch, filled, windows, cfg, sleep_cfg)


def _checksum(arrays: dict[str, np.ndarray]) -> str:
  digest = hashlib.sha256()
  for name, x in sorted(arrays.items()):
    digest.update(name.encode() + x.tobytes())
  return digest.hexdigest()


def _belongs_to(weights: model.Params, cfg: ModelConfig, sleep_cfg: SleepConfig) -> dict[str, Any]:
  """What must be the same for a session to go on, as plain data."""
  architecture = dataclasses.replace(cfg, fast=dataclasses.replace(cfg.fast, kernel=None))
  same = SleepConfig()
  nights = dataclasses.replace(
    sleep_cfg, remat=same.remat, loops=same.loops, backprop_passes=same.backprop_passes
  )
  values = {"model": architecture, "sleep": nights}
  plain = json.loads(json.dumps({name: config.to_dict(value) for name, value in values.items()}))
  return plain | {"weights": fingerprint(weights)}


def _same(name: str, before: Any, now: Any, path: pathlib.Path) -> None:
  """Raises `ConfigError` with the first field that differs."""
  if isinstance(now, dict) and isinstance(before, dict):
    for key, value in now.items():
      _same(f"{name}.{key}", before.get(key), value, path)
  elif name == "weights":
    config.check(before == now, "session", f"{path} is of other weights")
  else:
    config.check(before == now, "session", f"{path} is another model's: {name} was {before!r}, is {now!r}")


def _arrays(session: generate.Session) -> dict[str, Any]:
  """Every array by its path in the session."""
  return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(session)}


def _session(
  path: pathlib.Path,
  arrays: dict[str, np.ndarray],
  batch: int,
  filled: int,
  windows: int,
  cfg: ModelConfig,
  sleep_cfg: SleepConfig,
) -> generate.Session:
  """The session of arrays that were read, each checked against the one that a new session has."""
  in_range = batch >= 1 and 0 <= filled < cfg.window and windows >= 0
  config.check(in_range, "session", f"{path} is damaged: {batch} rows, {filled} tokens, {windows} windows")
  wanted = jax.eval_shape(lambda: generate.start(cfg, sleep_cfg, batch))
  leaves, treedef = jax.tree.flatten(wanted.replace(filled=filled, windows=windows))
  names = list(_arrays(wanted))
  wrong = sorted(set(names) ^ set(arrays)) or [
    name
    for name, x in zip(names, leaves, strict=True)
    if (arrays[name].shape, arrays[name].dtype) != (x.shape, x.dtype)
  ]
  config.check(
    not wrong, "session", f"{path} is damaged: {', '.join(wrong[:3])} missing, unknown or misshapen"
  )
  host = ("tokens", "valid")
  session = jax.tree.unflatten(treedef, [arrays[name] for name in names])
  on_device = jax.device_put(session.replace(**dict.fromkeys(host)))
  return on_device.replace(**{name: np.array(getattr(session, name)) for name in host})
