"""From a folder of safetensors and `config.json` to a config and a tree of weights."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import config, layers, model, params, rules, sharding
from sleep_jax.config import ConfigError, ModelConfig
from sleep_jax.pretrained import (
  delta_nets,
  dense,
  files,
  jet_nemotron,
  kimi_linear,
  ouro,
  own_format,
  published,
  safetensors_io,
  weight_map,
)
from sleep_jax.pretrained.fields import LARGEST, Fields, PretrainedError, listing, shown

ARCHITECTURES: dict[str, Callable[[Fields], dict[str, Any]]] = {
  published.JET_NEMOTRON: jet_nemotron.read_config,
  published.OURO: ouro.read_config,
  published.QWEN2: functools.partial(dense.read_config, bias=True),
  published.QWEN3: functools.partial(dense.read_config, mlp_bias=False, qk_norm=True),
  published.LLAMA: dense.read_config,
  published.SMOLLM3: functools.partial(dense.read_config, kinds=dense.with_nope),
  published.QWEN3_5: delta_nets.read_qwen3_5,
  published.QWEN3_5_WITH_IMAGES: delta_nets.read_qwen3_5_with_images,
  published.OLMO_HYBRID: delta_nets.read_olmo_hybrid,
  published.KIMI_LINEAR: kimi_linear.read_config,
}
CONFIG = "config.json"
# What is added to a model lies beside it, so that the rest stays what was published.
MEMORY_CONFIG, MEMORY_TENSORS = "memory.json", "memory.safetensors"
HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Source:
  """A checkpoint that was opened and checked: its headers agree with its config.

  Attributes:
    folder: where it lies.
    config: `config.json`.
    model: the architecture.
    tensors: of the model.
    memory: of added blocks; None without.
    ignore: dotted names of unknown fields of `config` that change nothing.
  """

  folder: pathlib.Path
  config: dict[str, Any]
  model: ModelConfig
  tensors: safetensors_io.Tensors
  memory: safetensors_io.Tensors | None = None
  ignore: tuple[str, ...] = ()

  @property
  def own(self) -> bool:
    """Whether the checkpoint is in our own format, not in a published one."""
    return own_format.is_own(self.config)

  @property
  def layout(self) -> weight_map.Layout:
    """How the family names its tensors."""
    return weight_map.PLAIN if self.own else weight_map.layout_of(_architecture(self.config))

  def entries(self, cfg: ModelConfig | None = None) -> list[weight_map.Entry]:
    """The weights of a model (by default this one) with their names in files like these."""
    cfg = self.model if cfg is None else cfg
    return weight_map.plain_entries(cfg) if self.own else weight_map.entries(cfg, self.layout)

  @property
  def embed(self) -> str:
    """The published name of the embedding."""
    return f"{self.layout.root}embed_tokens.weight"

  def stored_name(self, name: str) -> str:
    """The tensor that holds a weight. A tied model may have its embedding under the head's name alone."""
    found = next((n for n in self.layout.names(name) if n in self.tensors.files), None)
    tied = self.model.tied_embeddings and not self.own
    return found or (HEAD if tied and name == self.embed else name)

  def stored(self, name: str) -> list[str]:
    """The tensors that hold what one of this name does: one, or pieces of it, one behind the other."""
    one, pieces = self.stored_name(name), self.layout.pieces(name)
    there = self.tensors.files
    return pieces if pieces and one not in there and all(piece in there for piece in pieces) else [one]

  def whole_shapes(self, names: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors, in which the pieces of one of `names` count as that."""
    shapes = dict(self.tensors.shapes)
    for name in names:
      pieces = self.stored(name)
      if len(pieces) > 1 and len({shapes[p][1:] for p in pieces}) == 1 and shapes[pieces[0]]:
        shapes[name] = (sum(shapes[p][0] for p in pieces), *shapes[pieces[0]][1:])
        for piece in pieces:
          del shapes[piece]
    return shapes

  @property
  def repeated(self) -> str | None:
    """The head's name, if the model is tied and holds the embedding under that name as well."""
    if self.own or not self.model.tied_embeddings or HEAD not in self.tensors.files:
      return None
    return None if self.stored_name(self.embed) == HEAD else HEAD

  @property
  def buffers(self) -> list[str]:
    """Tensors that are no parameters of the model."""
    return [] if self.own else [n for n, s in self.tensors.shapes.items() if self.is_buffer(n, s)]

  def is_buffer(self, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is not read, but written back."""
    return published.is_buffer(name, shape) or bool(re.fullmatch(self.layout.beside, name))


def open_source(folder: str | os.PathLike, *, ignore: Collection[str] = (), **changes: Any) -> Source:
  """Reads config and headers, no weights.

  Args:
    folder: with `config.json` and safetensors; in published format or in our own.
    ignore: dotted names of unknown fields of `config.json` that change nothing:
      `rope_parameters.mrope_section`.
    changes: fields of `ModelConfig` that a checkpoint does not say, or is to be run with: `window`, `dtype`,
      `predict_passes`. Of a published checkpoint, L is 2000 unless changed, more if a sliding layer needs it.

  Raises:
    PretrainedError: if the architecture is unknown, a field or tensor is unknown, missing or misshapen, or a
      file is damaged, missing or lies outside of the folder.
    ConfigError: if the fields do not fit each other.
  """
  folder = pathlib.Path(folder)
  if not files.is_folder(folder):
    raise PretrainedError(f"{folder}: there is no such folder")
  values = files.read_json(folder / CONFIG)
  if own_format.is_own(values):
    with blamed(CONFIG):
      cfg = own_format.read_config(values)
    cfg = config.replace(cfg, **changes)
    source = Source(folder, values, cfg, safetensors_io.Tensors(folder), None, tuple(ignore))
    _check_tensors(source, {})
    return source
  fields = _fields(values, ignore)
  with blamed(CONFIG, fields):
    said = ARCHITECTURES[_architecture(values)](fields)
    fields.finish()
    cfg = ModelConfig(**{"window": max(2000, said["attention"].swa_window or 0), **said})
  memory = None
  if files.is_there(folder / MEMORY_CONFIG):
    with blamed(MEMORY_CONFIG):
      cfg = dataclasses.replace(cfg, **_memory_fields(files.read_json(folder / MEMORY_CONFIG), cfg.blocks))
    memory = safetensors_io.Tensors(folder, MEMORY_TENSORS)
  cfg = dataclasses.replace(cfg, **changes)
  source = Source(folder, values, cfg, safetensors_io.Tensors(folder), memory, tuple(ignore))
  _check_tensors(source, fields.assumed)
  return source


def load(
  folder: str | os.PathLike, *, param_dtype: str = "float32", ignore: Collection[str] = (), **changes: Any
) -> tuple[ModelConfig, model.Params, Source]:
  """A checkpoint as a config and weights. Each tensor goes where the mesh that is set wants it.

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
  places = {**source.tensors.files, **({} if source.memory is None else source.memory.files)}
  placed = {}
  for entry in sorted(source.entries(), key=lambda e: (e.memory, places[source.stored(e.name)[0]])):
    dtype = jnp.dtype(param_dtype if entry.weight.decay else "float32")
    placed[entry.path] = _place(entry.to_ours(read(source, entry)), entry.weight, dtype)
  _check_repeated(source)
  paths, treedef = jax.tree_util.tree_flatten_with_path(declared, is_leaf=params.is_weight)
  return source.model, jax.tree.unflatten(treedef, [placed[params.name_of(p)] for p, _ in paths]), source


def read(source: Source, entry: weight_map.Entry) -> np.ndarray:
  """The tensor of a weight, as it is stored."""
  tensors = source.memory if entry.memory and source.memory is not None else source.tensors
  parts = [tensors.read(name) for name in source.stored(entry.name)]
  return parts[0] if len(parts) == 1 else np.concatenate(parts)


def differing(source: Source, weights: model.Params) -> list[str]:
  """Names of the tensors that do not hold what `weights` do, to the bit in float32; read one at a time."""
  flat = {params.name_of(p): x for p, x in jax.tree_util.tree_flatten_with_path(weights)[0]}
  names = []
  for entry in source.entries():
    stored = read(source, entry)
    stored = entry.part(stored)
    wanted = entry.to_published(np.asarray(jax.device_get(flat[entry.path]), np.float32))
    if not np.array_equal(np.float32(stored).view(np.uint32), np.ascontiguousarray(wanted).view(np.uint32)):
      names.append(entry.name)
  return list(dict.fromkeys(names))


def _architecture(values: Mapping[str, Any]) -> str:
  """The name of the architecture: `architectures`, or where that is absent what `model_type` stands for."""
  names, kind = values.get("architectures"), values.get("model_type")
  by_type = {family.model_type: name for name, family in published.FAMILIES.items()}
  if names is None and isinstance(kind, str) and kind in by_type:
    return by_type[kind]
  name = names[0] if isinstance(names, list) and len(names) == 1 else names
  if not isinstance(name, str) or name not in ARCHITECTURES:
    raise PretrainedError(f"{CONFIG}: unknown architecture {shown(name)}; known: {', '.join(ARCHITECTURES)}")
  wanted = published.FAMILIES[name].model_type
  if kind is not None and kind != wanted:
    raise PretrainedError(f"{CONFIG}: model_type = {shown(kind)} is not supported ({name} is {wanted!r})")
  return name


def _fields(values: dict[str, Any], ignore: Collection[str]) -> Fields:
  """The fields of a published `config.json`, of which those are checked that all architectures share."""
  family = published.FAMILIES[_architecture(values)]
  fields = Fields(values, CONFIG, defaults=family.defaults, ignore=ignore)
  fields.settle(family.reads)
  return fields


@contextlib.contextmanager
def blamed(file: str, fields: Fields | None = None) -> Iterator[None]:
  """Names the file in the error of a config that it gives, and the defaults that went into it."""
  try:
    yield
  except PretrainedError:
    raise
  except (ConfigError, OverflowError) as e:
    clause = "" if fields is None else _assumptions(fields.assumed, fields.values)
    raise PretrainedError(f"{file}: {' '.join(str(e).split())}{clause}") from e


def _assumptions(assumed: Mapping[str, Any], values: Mapping[str, Any]) -> str:
  """A clause that says which sizes were taken from the published defaults; empty if none were."""
  if not assumed:
    return ""
  source = published.FAMILIES[_architecture(values)].source.rpartition(" ")[2]
  said = listing([f"{name} = {value}" for name, value in sorted(assumed.items())])
  return f" (where {CONFIG} says nothing, the defaults of {source} hold: {said})"


def _place(x: np.ndarray, weight: params.Weight, dtype: jnp.dtype) -> jax.Array:
  """A host array on the devices that the mesh gives its parts to; each part is cast and sent by itself."""
  spec = sharding.spec(weight.axes, weight.shape)
  if spec is None:
    return jnp.asarray(np.ascontiguousarray(x, dtype))
  layout = jax.NamedSharding(jax.sharding.get_mesh(), spec)
  return jax.make_array_from_callback(x.shape, layout, lambda index: np.ascontiguousarray(x[index], dtype))


def _check_repeated(source: Source) -> None:
  """Refuses a tied model whose file holds a head that is not the embedding."""
  if source.repeated is not None:
    same = np.array_equal(source.tensors.read(HEAD), source.tensors.read(source.stored_name(source.embed)))
    config.check(same, HEAD, "differs from the embedding, to which config.json ties it")


def _check_tensors(source: Source, assumed: dict[str, Any]) -> None:
  """Refuses missing, unexpected and misshapen tensors, all in one message; and buffers that say otherwise."""
  problems = []
  for memory, tensors in ((False, source.tensors), (True, source.memory)):
    if tensors is None:
      continue
    wanted = {source.stored_name(e.name): e.shape for e in source.entries() if e.memory == memory}
    if not memory:
      if source.repeated is not None:
        wanted[HEAD] = wanted[source.stored_name(source.embed)]
      wanted |= {name: tensors.shapes[name] for name in source.buffers}
    there = tensors.shapes if memory else source.whole_shapes(wanted)
    missing, unexpected = sorted(set(wanted) - set(there)), sorted(set(there) - set(wanted))
    misshapen = [
      f"{n} {list(there[n])} instead of {list(wanted[n])}"
      for n in sorted(set(wanted) & set(there))
      if there[n] != wanted[n]
    ]
    for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)):
      problems += [f"{kind}: {listing(names)}"] if names else []
  if problems:
    clause = _assumptions(assumed, source.config)
    raise PretrainedError(f"{source.folder}: tensors do not fit config.json; {'; '.join(problems)}{clause}")
  _check_absent(source)
  _check_buffers(source)


def _check_absent(source: Source) -> None:
  """Refuses an index that names tensors which no shard holds, unless nobody needs them."""
  needless = {HEAD, *source.layout.names(source.embed)} if source.model.tied_embeddings else set()
  lacking = [n for n in source.tensors.absent if n not in needless and not source.is_buffer(n, ())]
  if lacking:
    raise PretrainedError(
      f"{safetensors_io.INDEX}: weight_map and the shards disagree about {listing(lacking)}"
    )


def _check_buffers(source: Source) -> None:
  """Refuses stored frequencies of rotary angles that are not those which config.json says.

  Older programs read them, so that a model can depend on them. They may be rounded to the dtype of the file,
  and scaled already or not.
  """
  attention = source.model.attention
  half = (attention.rotary_dim or source.model.head_dim) // 2
  for name in source.buffers:
    if not name.endswith("inv_freq"):
      continue
    if source.tensors.shapes[name] != (half,):
      turned = "head_dim" if attention.rotary_dim is None else "what is turned of a head"
      raise PretrainedError(f"{name}: must have shape [{half}], half of {turned}")
    stored = np.asarray(source.tensors.read(name), np.float64)
    plain = attention.rope_theta ** (-np.arange(half) / half)
    scaled = layers.scaled(jnp.asarray(plain, jnp.float32), attention.rope_scaling)
    if not any(np.allclose(stored, x, rtol=2.0**-7, atol=2.0**-24) for x in (plain, np.asarray(scaled))):
      theta = f"rope_theta = {attention.rope_theta} in config.json"
      raise PretrainedError(f"{name}: differs from what {theta} gives")


def _memory_fields(values: dict[str, Any], blocks: tuple[str, ...]) -> dict[str, Any]:
  """Fields of `ModelConfig` that `memory.json` changes; blocks are counted with the added ones among them."""
  added = values.get("blocks")
  size = len(blocks) + (len(added) if isinstance(added, dict) else 0)
  numbers = {str(i) for i in range(size)}
  if set(values) != {"blocks", "fast"} or not isinstance(added, dict) or not set(added) <= numbers:
    raise PretrainedError(f"{MEMORY_CONFIG}: must hold blocks (number below {size} -> kind) and fast")
  for number, kind in added.items():
    known = isinstance(kind, str) and kind in rules.RULES
    names = ", ".join(rules.RULES)
    config.check(known, f"{MEMORY_CONFIG}: blocks.{number}", f"= {shown(kind)} is not one of {names}")
  rest = iter(blocks)
  return {
    "blocks": tuple(added[str(i)] if str(i) in added else next(rest) for i in range(size)),
    "without_mlp": tuple(sorted(map(int, added))),
    "fast": _memory_sizes(values["fast"]),
    "predict_passes": 1,
    "exit_threshold": None,
  }


def _memory_sizes(values: Any) -> config.FastConfig:
  """The sizes of added layers."""
  where = f"{MEMORY_CONFIG}: fast"
  if not isinstance(values, dict):
    raise PretrainedError(f"{where} must be an object, got {shown(values)}")
  for name, value in values.items():
    numbers = value if isinstance(value, list) else [value]
    if any(isinstance(x, (int, float)) and not abs(x) <= LARGEST for x in numbers):
      raise PretrainedError(
        f"{where}.{listing([name])} must lie in -{LARGEST}..{LARGEST}, got {shown(value)}"
      )
  if values.get("kernel") is not None:
    raise PretrainedError(f"{where}.kernel must be null, got {shown(values['kernel'])}")
  return config.from_dict(config.FastConfig, values, f"{where}.")
