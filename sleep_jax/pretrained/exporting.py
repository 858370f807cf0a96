"""From a config and a tree of weights back to a folder, to the bit, with what else the checkpoint held."""

import contextlib
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging

from sleep_jax import config, model, params
from sleep_jax.config import ModelConfig
from sleep_jax.pretrained import files, own_format, safetensors_io, weight_map
from sleep_jax.pretrained.fields import PretrainedError, listing
from sleep_jax.pretrained.loading import CONFIG, MEMORY_CONFIG, MEMORY_TENSORS, Source

# What a folder holds beside config and weights, and what a program needs to open it: tokenizers, chat
# templates, settings of generation, licences and notices, the model card, and the Python files that
# `auto_map` names or that these import. All are copied as data.
_COMPANION = re.compile(
  r".+\.(?:json|jinja|txt|md|model|py|tiktoken|pdf)"
  r"|(?:LICEN[CS]E|NOTICE|COPYING|COPYRIGHT|README|.*USE_POLICY|MODEL_CARD).*",
  re.IGNORECASE | re.DOTALL,
)
_TEMPLATES = "additional_chat_templates"  # the one folder among them
_WEIGHTS = re.compile(
  r".+\.(?:safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx|pkl)(?:\.index\.json)?", re.DOTALL
)
_WRITTEN = (CONFIG, safetensors_io.INDEX, MEMORY_CONFIG, MEMORY_TENSORS)


def export(
  folder: str | os.PathLike,
  cfg: ModelConfig,
  weights: model.Params,
  source: Source,
  *,
  dtype: str = "published",
  report: Callable[[str], None] = logging.warning,
) -> None:
  """Writes weights in the format of `source`: its names, shapes, dtypes, shards and config.

  Weights that were loaded in a dtype at least as wide come out bit-equal; so do buffers. Added blocks go to
  `memory.safetensors` (float32; `memory.layers.{j}.` and the names of a JetBlock) with their places and sizes
  in `memory.json`; the other files stay a checkpoint that other programs read. Tokenizer, chat templates,
  licences, model card and the Python files of `auto_map` are copied as they are. A checkpoint in our own
  format is written in our own format, with whatever was added.

  Args:
    folder: must not exist. It appears when it is complete, or not at all.
    cfg: of the weights.
    weights: the tree.
    source: the checkpoint that the weights come from.
    dtype: `published`: each tensor's in `source`, to which trained weights are rounded. `float32`: of all
      weights, which loses nothing; `config.json` then says so.
    report: takes a line for every file of `source` that is not copied.

  Raises:
    PretrainedError: if `folder` exists, or the model is not that of `source`, additions aside.
    OSError: if it cannot be written.
  """
  appear(folder, lambda made: write_like(made, cfg, weights, source, dtype=dtype, report=report))


def export_own(
  folder: str | os.PathLike,
  cfg: ModelConfig,
  weights: model.Params,
  *,
  step: int | None = None,
  tokenizer: str | os.PathLike | None = None,
) -> None:
  """Writes any model in our own format (`own_format`): `config.json` and `model.safetensors` in float32.

  Args:
    folder: must not exist. It appears when it is complete, or not at all.
    cfg, weights: the model.
    step: of the run that trained it, for the record.
    tokenizer: a `tokenizer.json` to copy. None: the model has none.

  Raises:
    PretrainedError: if `folder` exists, or the tokenizer is not a file.
    OSError: if it cannot be written.
  """
  appear(folder, lambda made: write_own(made, cfg, weights, step=step, tokenizer=tokenizer))


def write_like(
  made: pathlib.Path,
  cfg: ModelConfig,
  weights: model.Params,
  source: Source,
  *,
  dtype: str = "published",
  report: Callable[[str], None] = logging.warning,
) -> None:
  """`export` into an empty folder."""
  config.one_of(dtype, ("published", "float32"), "dtype")
  if source.own:
    write_own(made, cfg, weights, step=source.config.get("step"))
    _copy_companions(source, made, report)
    return
  tensors, buffers = source.tensors, set(source.buffers)
  kinds = {n: kind if n in buffers or dtype == "published" else "F32" for n, kind in tensors.dtypes.items()}
  entries: dict[str, list[weight_map.Entry]] = {}
  for e in source.entries(cfg):
    entries.setdefault(source.stored_name(e.name), []).append(e)
  wanted = {name: some[0].shape for name, some in entries.items() if not some[0].memory}
  shapes = source.whole_shapes(wanted)
  there = {n: shape for n, shape in shapes.items() if n not in buffers and n != source.repeated}
  if wanted != there:
    raise PretrainedError(f"the weights are not those of a model like {source.folder}")
  flat = _flat(weights)
  cut: dict[str, tuple[str, int]] = {}  # a piece of a tensor -> that, and the piece's first row
  for name in wanted:
    first = 0
    for piece in (pieces := source.stored(name)):
      if len(pieces) > 1:
        cut[piece] = name, first
        first += tensors.shapes[piece][0]

  def get(name: str) -> np.ndarray:
    if name in buffers:
      return tensors.read(name)
    if name in cut:
      whole, first = cut[name]
      return get(whole)[first : first + tensors.shapes[name][0]]
    some = entries[source.stored_name(source.embed) if name == source.repeated else name]
    parts = [_array(flat, e) for e in some]
    return np.concatenate(parts) if len(parts) > 1 else parts[0]

  for file, metadata in tensors.metadata.items():
    inside = {n: (kinds[n], tensors.shapes[n]) for n, f in tensors.files.items() if f == file}
    if kinds != tensors.dtypes:
      inside = safetensors_io.in_order(inside)
    safetensors_io.write(made / file, inside, get, metadata)
  if memory := {n: ("F32", some[0].shape) for n, some in entries.items() if some[0].memory}:
    safetensors_io.write(made / MEMORY_TENSORS, safetensors_io.in_order(memory), get, {"format": "pt"})
    _write_json(made / MEMORY_CONFIG, _memory_json(cfg))
  for name in (CONFIG, *([] if tensors.index is None else [safetensors_io.INDEX])):
    _copy(source.folder / name, made / name)
  if kinds != tensors.dtypes:
    _say_float32(made, source, kinds)
  _copy_companions(source, made, report)


def write_own(
  made: pathlib.Path,
  cfg: ModelConfig,
  weights: model.Params,
  *,
  step: int | None = None,
  tokenizer: str | os.PathLike | None = None,
) -> None:
  """`export_own` into an empty folder."""
  entries, flat = {e.name: e for e in weight_map.plain_entries(cfg)}, _flat(weights)
  tensors = safetensors_io.in_order({name: ("F32", e.shape) for name, e in entries.items()})
  _write_json(made / CONFIG, own_format.config_json(cfg, step))
  safetensors_io.write(
    made / safetensors_io.SINGLE, tensors, lambda name: _array(flat, entries[name]), {"format": "pt"}
  )
  if tokenizer is not None:
    _copy(pathlib.Path(tokenizer), made / "tokenizer.json")


def appear(folder: str | os.PathLike, write: Callable[[pathlib.Path], Any]) -> None:
  """Makes a folder that appears when it is complete, or not at all.

  Args:
    folder: must not exist. Folders above it are made, and are removed again if `write` fails.
    write: fills an empty folder.

  Raises:
    PretrainedError: if `folder` exists.
  """
  folder = pathlib.Path(folder)
  if files.is_there(folder):
    raise PretrainedError(f"{folder}: exists already")
  above = [path for path in folder.parents if not path.exists()]
  made = None
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = pathlib.Path(tempfile.mkdtemp(prefix=".export-", dir=folder.parent))
    write(made)
    os.chmod(made, 0o755)
    os.rename(made, folder)
  except BaseException:
    if made is not None:
      shutil.rmtree(made, ignore_errors=True)
    for path in above:
      with contextlib.suppress(OSError):
        path.rmdir()
    raise


def _flat(weights: model.Params) -> dict[str, jax.Array]:
  return {params.name_of(path): x for path, x in jax.tree_util.tree_flatten_with_path(weights)[0]}


def _array(flat: dict[str, jax.Array], entry: weight_map.Entry) -> np.ndarray:
  """A weight in the layout of its file, on the host."""
  return entry.to_published(np.asarray(jax.device_get(flat[entry.path])))


def _say_float32(made: pathlib.Path, source: Source, kinds: dict[str, str]) -> None:
  """Corrects what the copied files say about dtypes and sizes."""

  def said(values: dict[str, Any]) -> dict[str, Any]:
    named = {name: "float32" for name in ("torch_dtype", "dtype") if values.get(name) is not None}
    inner = {name: said(values[name]) for name in ("text_config",) if isinstance(values.get(name), dict)}
    return values | named | inner

  _write_json(made / CONFIG, said(source.config))
  tensors = source.tensors
  if tensors.index is not None:
    sizes = (math.prod(s) * safetensors_io.DTYPES[kinds[n]].itemsize for n, s in tensors.shapes.items())
    metadata = tensors.index.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    _write_json(
      made / safetensors_io.INDEX, tensors.index | {"metadata": metadata | {"total_size": sum(sizes)}}
    )


def _memory_json(cfg: ModelConfig) -> dict[str, Any]:
  """Places and sizes of added blocks."""
  return {
    "blocks": {str(i): cfg.blocks[i] for i in cfg.without_mlp},
    "fast": config.to_dict(config.replace(cfg.fast, kernel=None)),
  }


def _copy_companions(source: Source, made: pathlib.Path, report: Callable[[str], None]) -> None:
  """Copies what lies beside config and weights; says what is not copied. Hidden files are not."""
  others = []
  for path, wanted in _beside(source):
    relative = path.relative_to(source.folder)
    if not wanted:
      others.append(str(relative))
      continue
    (made / relative).parent.mkdir(exist_ok=True)
    try:
      _copy(path, made / relative)
    except PretrainedError as e:
      report(f"not copied: {e}")
  if others:
    report(f"not copied from {source.folder}: {listing(sorted(others))}")


def _beside(source: Source) -> Iterator[tuple[pathlib.Path, bool]]:
  """Every file of a checkpoint that `write_like` does not write, and whether it is copied."""
  skipped = {*_WRITTEN, *source.tensors.metadata}
  for path in sorted(source.folder.iterdir()):
    if path.name in skipped or path.name.startswith("."):
      continue
    if path.name == _TEMPLATES and path.is_dir() and not path.is_symlink():
      yield from ((inside, inside.suffix == ".jinja") for inside in sorted(path.iterdir()))
      continue
    wanted = not path.is_dir() and not _WEIGHTS.fullmatch(path.name)
    yield path, wanted and bool(_COMPANION.fullmatch(path.name))


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies a regular file's content; refuses a link that leaves its folder."""
  with files.open_regular(source) as read, open(target, "xb") as written:
    shutil.copyfileobj(read, written)


def _write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
  path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
