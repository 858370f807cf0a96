"""From a folder in published format to a config and a tree of weights, and back, to the bit."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import config, model, params, sharding
from sleep_jax.config import ModelConfig
from sleep_jax.pretrained import dense, jet_nemotron, ouro, safetensors_io, weight_map
from sleep_jax.pretrained.fields import Fields, PretrainedError

ARCHITECTURES: dict[str, Callable[[Fields], dict[str, Any]]] = {
  jet_nemotron.ARCHITECTURE: jet_nemotron.read_config,
  ouro.ARCHITECTURE: ouro.read_config,
  dense.QWEN2: functools.partial(dense.read_config, bias=True),
  dense.LLAMA: functools.partial(dense.read_config, bias=False),
}
# What is added to a model lies beside it, so that the rest stays what was published.
MEMORY_CONFIG, MEMORY_TENSORS = "memory.json", "memory.safetensors"
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
COMPANIONS = (
  "tokenizer.json tokenizer_config.json special_tokens_map.json vocab.json merges.txt generation_config.json"
  " LICENSE".split()
)


@dataclasses.dataclass(frozen=True)
class Source:
  """A checkpoint in published format, opened and checked: its headers agree with its config.

  Attributes:
    folder: where it lies.
    config: `config.json`.
    model: the architecture.
    tensors: of the published model.
    memory: of added blocks; None without.
    ignore: fields of `config` that are known to change nothing.
  """

  folder: pathlib.Path
  config: dict[str, Any]
  model: ModelConfig
  tensors: safetensors_io.Tensors
  memory: safetensors_io.Tensors | None = None
  ignore: tuple[str, ...] = ()


def open_source(folder: str | os.PathLike, *, ignore: Collection[str] = (), **changes: Any) -> Source:
  """Reads config and headers, no weights.

  Args:
    folder: with `config.json` and safetensors.
    ignore: fields of `config.json` that are known to change nothing, beside those known here.
    changes: fields of `ModelConfig` that a checkpoint does not say, or is to be run with: `window`, `dtype`,
      `predict_passes`. L is 2000 unless changed, more if a sliding layer needs it.

  Raises:
    PretrainedError: if the architecture is unknown, a field or tensor unknown, missing or misshapen.
    ConfigError: if the fields do not fit each other.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise PretrainedError(f"{folder}: there is no such folder")
  published = safetensors_io.read_json(folder / "config.json")
  names = published.get("architectures")
  name = names[0] if isinstance(names, list) and len(names) == 1 else names
  if not isinstance(name, str) or name not in ARCHITECTURES:
    raise PretrainedError(f"config.json: unknown architecture {name!r}; known: {', '.join(ARCHITECTURES)}")
  fields = Fields(published, "config.json")
  fields.only("attention_dropout", (None, 0, 0.0), "there is no dropout")
  values = ARCHITECTURES[name](fields)
  fields.finish(ignore)
  memory = None
  if (folder / MEMORY_CONFIG).exists():
    values |= _memory_fields(safetensors_io.read_json(folder / MEMORY_CONFIG), values["blocks"])
    memory = safetensors_io.Tensors(folder, MEMORY_TENSORS)
  window = max(2000, values["attention"].swa_window or 0)
  cfg = ModelConfig(**{"window": window, **values, **changes})
  source = Source(folder, published, cfg, safetensors_io.Tensors(folder), memory, tuple(ignore))
  _check_tensors(source)
  return source


def load(
  folder: str | os.PathLike, *, param_dtype: str = "float32", ignore: Collection[str] = (), **changes: Any
) -> tuple[ModelConfig, model.Params, Source]:
  """A checkpoint as a config and weights, each put tensor by tensor where the mesh that is set wants it.

  On the host there is never more than one open shard and one tensor (and its copy in another dtype).

  Args:
    folder, ignore, changes: as for `open_source`.
    param_dtype: of matrices and embeddings, `float32` (to train) or `bfloat16`. Norms, biases and decays are
      float32 always.

  Returns:
    The config, the weights, and what `export` needs to know.
  """
  config.one_of(param_dtype, ("float32", "bfloat16"), "param_dtype")
  source = open_source(folder, ignore=ignore, **changes)
  declared = model.declare(source.model)
  files = {**source.tensors.files, **({} if source.memory is None else source.memory.files)}
  placed = {}
  for entry in sorted(weight_map.entries(source.model), key=lambda e: (e.memory, files[e.name])):
    tensors = source.memory if entry.memory else source.tensors
    dtype = jnp.dtype(param_dtype if entry.weight.decay else "float32")
    placed[entry.path] = _place(entry.to_ours(tensors.read(entry.name)), entry.weight, dtype)
  if _repeats_the_embedding(source):
    same = np.array_equal(source.tensors.read(HEAD), source.tensors.read(EMBED))
    config.check(same, HEAD, "differs from the embedding, to which config.json ties it")
  paths, treedef = jax.tree_util.tree_flatten_with_path(declared, is_leaf=params.is_weight)
  return source.model, jax.tree.unflatten(treedef, [placed[params.name_of(p)] for p, _ in paths]), source


def export(
  folder: str | os.PathLike,
  cfg: ModelConfig,
  weights: model.Params,
  source: Source,
  *,
  dtype: str = "published",
) -> None:
  """Writes weights in the format of `source`: its names, shapes, dtypes, shards and config.

  Weights that were loaded in a dtype at least as wide come out bit-equal. Added blocks go to
  `memory.safetensors` (float32; `memory.layers.{j}.` and the names of a JetBlock) with their places and sizes
  in `memory.json`; the other files stay a checkpoint that other programs read.

  Args:
    folder: must not exist. It appears when it is complete, or not at all.
    cfg: of the weights.
    weights: the tree.
    source: the checkpoint that the weights come from.
    dtype: `published`: each tensor's in `source`, to which trained weights are rounded. `float32`: of all
      tensors, which loses nothing; `config.json` then says so.

  Raises:
    PretrainedError: if `folder` exists, or the model is not that of `source`, additions aside.
  """
  config.one_of(dtype, ("published", "float32"), "dtype")
  folder = pathlib.Path(folder)
  if folder.exists():
    raise PretrainedError(f"{folder}: exists already")
  kinds = {n: "F32" if dtype == "float32" else kind for n, kind in source.tensors.dtypes.items()}
  entries = {e.name: e for e in weight_map.entries(cfg)}
  flat = {params.name_of(p): x for p, x in jax.tree_util.tree_flatten_with_path(weights)[0]}
  wanted = {name: e.shape for name, e in entries.items() if not e.memory}
  there = {
    n: s for n, s in source.tensors.shapes.items() if n in wanted or not _repeats_the_embedding(source)
  }
  if wanted != {n: s for n, s in there.items() if n != HEAD or HEAD in wanted}:
    raise PretrainedError(f"{folder}: the weights are not those of a model like {source.folder}")

  def get(name: str) -> np.ndarray:
    entry = entries[EMBED if name == HEAD and HEAD not in entries else name]
    return entry.to_published(np.asarray(jax.device_get(flat[entry.path])))

  folder.parent.mkdir(parents=True, exist_ok=True)
  made = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
  try:
    for file in sorted(set(source.tensors.files.values())):
      inside = [name for name, f in source.tensors.files.items() if f == file]
      safetensors_io.write(made / file, {n: (kinds[n], source.tensors.shapes[n]) for n in inside}, get)
    if memory := {n: ("F32", e.shape) for n, e in entries.items() if e.memory}:
      safetensors_io.write(made / MEMORY_TENSORS, memory, get)
      (made / MEMORY_CONFIG).write_text(json.dumps(_memory_json(cfg), indent=2) + "\n", encoding="utf-8")
    for name in ("config.json", safetensors_io.INDEX, *COMPANIONS):
      if (source.folder / name).is_file():
        shutil.copyfile(source.folder / name, made / name)
    if kinds != source.tensors.dtypes:
      _say_float32(made, source)
    os.chmod(made, 0o755)
    os.rename(made, folder)
  finally:
    shutil.rmtree(made, ignore_errors=True)


def differing(source: Source, weights: model.Params) -> list[str]:
  """Names of the tensors that do not hold what `weights` do, to the bit in float32; read one at a time."""
  flat = {params.name_of(p): x for p, x in jax.tree_util.tree_flatten_with_path(weights)[0]}
  told = []
  for entry in weight_map.entries(source.model):
    stored = (source.memory if entry.memory else source.tensors).read(entry.name)
    wanted = entry.to_published(np.asarray(jax.device_get(flat[entry.path]), np.float32))
    if not np.array_equal(np.float32(stored).view(np.uint32), np.ascontiguousarray(wanted).view(np.uint32)):
      told.append(entry.name)
  return told


def _say_float32(folder: pathlib.Path, source: Source) -> None:
  """Corrects what the copied files say of dtypes and sizes."""
  named = {name: "float32" for name in ("torch_dtype", "dtype") if name in source.config}
  written = {"config.json": source.config | named}
  if source.tensors.index is not None:
    total = sum(4 * math.prod(shape) for shape in source.tensors.shapes.values())
    told = source.tensors.index.get("metadata") or {}
    written[safetensors_io.INDEX] = source.tensors.index | {"metadata": told | {"total_size": total}}
  for name, values in written.items():
    (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _place(x: np.ndarray, weight: params.Weight, dtype: jnp.dtype) -> jax.Array:
  """A host array on the devices that the mesh gives its parts to; each part is cast and sent by itself."""
  spec = sharding.spec(weight.axes, weight.shape)
  if spec is None:
    return jnp.asarray(np.ascontiguousarray(x, dtype))
  layout = jax.NamedSharding(jax.sharding.get_mesh(), spec)
  return jax.make_array_from_callback(x.shape, layout, lambda index: np.ascontiguousarray(x[index], dtype))


def _repeats_the_embedding(source: Source) -> bool:
  return source.model.tied_embeddings and HEAD in source.tensors.files


def _check_tensors(source: Source) -> None:
  """Refuses missing, unexpected and misshapen tensors, all in one message."""
  entries = weight_map.entries(source.model)
  problems = []
  for memory, tensors in ((False, source.tensors), (True, source.memory)):
    if tensors is None:
      continue
    wanted = {e.name: e.shape for e in entries if e.memory == memory}
    if not memory and _repeats_the_embedding(source):
      wanted[HEAD] = wanted[EMBED]
    there = tensors.shapes
    missing, unexpected = sorted(set(wanted) - set(there)), sorted(set(there) - set(wanted))
    misshapen = [
      f"{n} {list(there[n])} instead of {list(wanted[n])}"
      for n in sorted(set(wanted) & set(there))
      if there[n] != wanted[n]
    ]
    for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)):
      problems += [f"{kind}: {safetensors_io.listing(names)}"] if names else []
  if problems:
    raise PretrainedError(f"{source.folder}: tensors do not fit config.json; {'; '.join(problems)}")


def _memory_json(cfg: ModelConfig) -> dict[str, Any]:
  """Places and sizes of added blocks."""
  return {
    "blocks": {str(i): cfg.blocks[i] for i in cfg.without_mlp},
    "fast": config.to_dict(dataclasses.replace(cfg.fast, kernel=None)),
  }


def _memory_fields(values: dict[str, Any], blocks: tuple[str, ...]) -> dict[str, Any]:
  """Fields of `ModelConfig` that `memory.json` changes; blocks are counted with the added ones among them."""
  added = values.get("blocks")
  size = len(blocks) + (len(added) if isinstance(added, dict) else 0)
  numbers = {str(i) for i in range(size)}
  if set(values) != {"blocks", "fast"} or not isinstance(added, dict) or not set(added) <= numbers:
    raise PretrainedError(f"{MEMORY_CONFIG}: must hold blocks (number below {size} -> kind) and fast")
  rest = iter(blocks)
  return {
    "blocks": tuple(str(added[str(i)]) if str(i) in added else next(rest) for i in range(size)),
    "without_mlp": tuple(sorted(map(int, added))),
    "fast": config.from_dict(config.FastConfig, values["fast"], f"{MEMORY_CONFIG}: fast."),
    "predict_passes": 1,
  }
