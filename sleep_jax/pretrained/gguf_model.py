"""A GGUF file of the Llama kind as a checkpoint in published format.

    header = gguf_header.read("SmolLM2-135M-Instruct.Q4_1.gguf")
    checkpoint = Checkpoint(header)
    checkpoint.write(folder)

Quantised tensors become float32, exactly what the file stands for; float16 and bfloat16 stay what they are.
Programs that run such files turn rotary angles pairwise, so the rows of queries and keys lie in another order
there: channel i of the first half of a head is followed by channel i of the second.
"""

import dataclasses
import json
import math
import pathlib
import tempfile
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

import sleep_jax

try:
  import gguf
except ImportError:
  sleep_jax.require("gguf", "gguf")
  raise

import jax.numpy as jnp

from sleep_jax import layers
from sleep_jax.config import ModelConfig, RopeScaling
from sleep_jax.pretrained import files, gguf_tokenizer, loading, published, safetensors_io, weight_map
from sleep_jax.pretrained.fields import LAYERS, Fields, PretrainedError, listing, shown
from sleep_jax.pretrained.gguf_header import Header
from sleep_jax.pretrained.tokenizer import Tokenizer

KIND = "llama"  # `general.architecture`
TENSORS = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",
}
BLOCK = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
STRETCHED = "rope_freqs.weight"  # by how much each rotary angle is slower, in models with llama3 scaling
# The published scalings of that kind: the factors differ, these do not (Llama 3.1, 3.2, 3.3).
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Types of tensors that can be read.
KINDS = (
  *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
  *("IQ4_NL", "IQ4_XS"),
)
NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """Where the tensor of a published name lies, and how it is stored.

  Attributes:
    name: in the file.
    kind: GGML type.
    shape: of the tensor.
    start, length: bytes in the file.
    heads: of queries or keys, whose rows are to be put back in order; 0 for any other tensor.
  """

  name: str
  kind: gguf.GGMLQuantizationType
  shape: tuple[int, ...]
  start: int
  length: int
  heads: int

  @property
  def dtype(self) -> str:
    """What it becomes, as safetensors names it."""
    return self.kind.name if self.kind.name in NAMES else "F32"


class Checkpoint:
  """A GGUF file that was checked: its tensors are those that its metadata say, and its tokenizer works.

  Args:
    header: of the file.
    float32: make float32 of all tensors.
    ignore: unknown fields of the architecture that change nothing: `llama.note`.

  Attributes:
    config: what becomes `config.json`.
    model: the architecture.
    tensors: name -> (dtype, shape), as they are written.
    texts: name -> text of the files beside the weights.

  Raises:
    PretrainedError: if the architecture is not supported, a field, a tensor or the tokenizer is not
      understood, or tensors do not lie where and as the header says.
  """

  def __init__(self, header: Header, *, float32: bool = False, ignore: Collection[str] = ()):
    self._header = header
    _check_kind(header)
    made = gguf_tokenizer.make(header)
    self.config = _config(header, ignore) | made.ids
    fields = Fields(self.config, header.path.name, defaults=published.FAMILIES[published.LLAMA].defaults)
    with loading.blamed(header.path.name):
      self.model = ModelConfig(window=2000, **loading.ARCHITECTURES[published.LLAMA](fields))
    self._stored = _tensors(header, self.model)
    self.tensors = {name: ("F32" if float32 else t.dtype, t.shape) for name, t in self._stored.items()}
    kinds = {NAMES[dtype] for dtype, shape in self.tensors.values() if len(shape) == 2}
    self.config["dtype"] = kinds.pop() if len(kinds) == 1 else "float32"
    self.texts = made.texts | {loading.CONFIG: json.dumps(self.config, indent=2) + "\n"}
    with tempfile.TemporaryDirectory() as folder:
      _write_texts(pathlib.Path(folder), made.texts)
      try:
        Tokenizer(folder, self.model).encode("Who reads this?")
      except PretrainedError as e:
        raise header.error(f"its tokenizer does not work: {e}") from e

  @property
  def parameters(self) -> int:
    """How many numbers the tensors have."""
    return sum(math.prod(shape) for _, shape in self.tensors.values())

  def write(self, made: pathlib.Path) -> None:
    """Writes it into an empty folder, and compares what it has written.

    Raises:
      PretrainedError: if a tensor holds NaN or infinity, or the file has changed since it was opened.
      OSError: if it cannot be written.
    """
    _write_texts(made, self.texts)
    ordered = safetensors_io.in_order(self.tensors)
    safetensors_io.write(made / safetensors_io.SINGLE, ordered, self.read, {"format": "pt"})

  def read(self, name: str) -> np.ndarray:
    """A tensor by its published name, float32 or as it is stored if that is no quantisation.

    Raises:
      PretrainedError: as `write`.
    """
    stored = self._stored[name]
    with files.open_regular(self._header.path) as file:
      try:
        file.seek(stored.start)
        data = np.frombuffer(file.read(stored.length), np.uint8)
      except OSError as e:
        raise self._header.error(str(e.strerror)) from e
    if data.size < stored.length:
      raise self._header.error("has become shorter while it was read")
    if stored.dtype != "F32" or stored.kind.name == "F32":
      array = data.view(safetensors_io.DTYPES[stored.dtype]).reshape(stored.shape)
    else:
      with np.errstate(all="ignore"):  # a damaged scale overflows, and is refused below
        rows = data.reshape(*stored.shape[:-1], -1)
        array = gguf.dequantize(rows, stored.kind).reshape(stored.shape)
    if not np.all(np.isfinite(array)):
      raise self._header.error(f"tensor {stored.name} holds NaN or infinity")
    return _in_order(array, stored.heads) if stored.heads else array


def _in_order(x: np.ndarray, heads: int) -> np.ndarray:
  """Rows of queries or keys [heads * width, ...], of each head first the first halves of all pairs."""
  width = x.shape[0] // heads
  return x.reshape(heads, width // 2, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def _check_kind(header: Header) -> None:
  """Refuses what is no model of the Llama kind in one file."""
  values = header.values
  kind = values.get("general.architecture")
  if kind != KIND:
    raise header.error(f"general.architecture = {shown(kind)} is not supported; known: {KIND}")
  sort = values.get("general.type", "model")
  if sort != "model":
    raise header.error(f"general.type = {shown(sort)} is not supported (it must be a whole model)")
  if (parts := values.get("split.count", 0)) not in (0, 1):
    raise header.error(f"split.count = {shown(parts)} is not supported (the model must lie in one file)")


def _config(header: Header, ignore: Collection[str]) -> dict[str, Any]:
  """`config.json`, but for the tokens that it names."""
  prefix = f"{KIND}."
  inside = {n.removeprefix(prefix): x for n, x in header.values.items() if n.startswith(prefix)}
  fields = Fields(
    inside, header.path.name, prefix=prefix, ignore=ignore,
    defaults={"rope.freq_base": 10_000.0, "attention.head_count_kv": None, "rope.scaling.type": "none"},
  )  # fmt: skip
  width, heads = fields.size("embedding_length"), fields.size("attention.head_count")
  head_dim = fields.size("attention.key_length", max(1, width // heads))
  for name in ("attention.value_length", "rope.dimension_count"):
    fields.only(name, (head_dim,), f"a head is {head_dim} wide")
  for name in ("expert_count", "expert_used_count", "expert_group_count"):
    fields.only(name, (0,), "the MLP is dense")
  if (embedding := header.tensors.get("token_embd.weight")) is None:
    raise header.error("tensor token_embd.weight is missing")
  rows = embedding.shape[0]
  fields.only("vocab_size", (rows,), f"the embedding has {rows} rows")
  fields.skip("rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout")
  config = {
    "architectures": [published.LLAMA],
    "model_type": published.FAMILIES[published.LLAMA].model_type,
    "vocab_size": rows,
    "hidden_size": width,
    "intermediate_size": fields.size("feed_forward_length"),
    "num_hidden_layers": fields.size("block_count", most=LAYERS),
    "num_attention_heads": heads,
    "num_key_value_heads": fields.size("attention.head_count_kv", heads),
    "head_dim": head_dim,
    "hidden_act": "silu",
    "rms_norm_eps": _short(fields.positive("attention.layer_norm_rms_epsilon")),
    "rope_theta": _short(fields.positive("rope.freq_base")),
    "max_position_embeddings": fields.size("context_length"),
    "attention_bias": "blk.0.attn_q.bias" in header.tensors,
    "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
    "tie_word_embeddings": "output.weight" not in header.tensors,
  }
  config["rope_scaling"] = _scaling(header, fields, config["rope_theta"], head_dim)
  fields.finish()
  return config


def _short(x: float) -> float:
  """The shortest decimal number that is this float32: what was written before it became one."""
  return float(str(np.float32(x)))


def _scaling(header: Header, fields: Fields, theta: float, head_dim: int) -> dict[str, Any] | None:
  """How rotary angles are scaled, as `config.json` says it."""
  fields.only("rope.scaling.type", ("none", "linear"), "known: none, linear")
  factors = {fields.get(n, float) for n in ("rope.scaling.factor", "rope.scale_linear") if fields.given(n)}
  fields.skip("rope.scaling.factor", "rope.scale_linear")
  if len(factors) > 1:
    raise fields.error("rope.scale_linear", "says otherwise than rope.scaling.factor")
  factor = _short(factors.pop()) if factors else 1.0
  if STRETCHED not in header.tensors:
    return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}
  if factor != 1.0:
    raise header.error(f"{STRETCHED} and rope.scaling.factor scale rotary angles twice")
  stored = _stored(header, STRETCHED)
  if stored.shape != (head_dim // 2,) or stored.kind.name != "F32":
    raise header.error(f"{STRETCHED}: must be [{head_dim // 2}] in float32")
  with files.open_regular(header.path) as file:
    file.seek(stored.start)
    stretched = np.frombuffer(file.read(stored.length), "<f4")
  factor = float(np.max(stretched, initial=1.0)) if np.all(np.isfinite(stretched)) else 0.0
  if factor == 1.0 and np.all(stretched == 1.0):
    return None
  low, high, original = LLAMA3.values()
  plain = theta ** (-np.arange(head_dim // 2) / (head_dim // 2))
  if factor > 1.0:
    scaling = RopeScaling("llama3", factor, low, high, int(original))
    slow = np.asarray(layers.scaled(jnp.asarray(plain, jnp.float32), scaling))
    if np.allclose(plain / slow, stretched, rtol=1e-3):
      return {"rope_type": "llama3", "factor": _short(factor), **LLAMA3}
  raise header.error(f"{STRETCHED}: scales rotary angles in a way that is not supported; known: llama3")


def _tensors(header: Header, cfg: ModelConfig) -> dict[str, _Tensor]:
  """Published name -> tensor; refuses missing, unexpected and misshapen ones, and bad places."""
  heads = {"attn_q": cfg.attention.num_heads, "attn_k": cfg.num_kv_heads}
  found, unexpected = {}, []
  for name in _checked_places(header):
    if name == STRETCHED:
      continue
    published_name, part = _name(name)
    if published_name is None:
      unexpected.append(name)
      continue
    found[published_name] = dataclasses.replace(_stored(header, name), heads=heads.get(part, 0))
  wanted = {entry.name: entry.shape for entry in weight_map.entries(cfg)}
  unexpected += [found[n].name for n in found if n not in wanted]
  missing = [n for n in wanted if n not in found]
  misshapen = [
    f"{found[n].name} {list(found[n].shape)} instead of {list(shape)}"
    for n, shape in wanted.items()
    if n in found and found[n].shape != shape
  ]
  lists = (("missing", missing), ("unexpected", sorted(unexpected)), ("misshapen", misshapen))
  if problems := [f"{kind}: {listing(names)}" for kind, names in lists if names]:
    raise header.error(f"tensors do not fit its metadata; {'; '.join(problems)}")
  return found


def _name(name: str) -> tuple[str | None, str]:
  """The published name of a tensor, None if there is none, and which part of a block it is."""
  if name in TENSORS:
    return TENSORS[name], ""
  match name.split("."):
    case ["blk", number, part, kind] if part in BLOCK and kind in ("weight", "bias"):
      if number.isascii() and number.isdigit() and number == str(int(number[:9])):
        return f"model.layers.{number}.{BLOCK[part]}.{kind}", part
  return None, ""


def _stored(header: Header, name: str) -> _Tensor:
  """Kind and length in bytes of a tensor."""
  stored = header.tensors[name]
  try:
    kind = gguf.GGMLQuantizationType(stored.kind)
  except ValueError:
    raise header.error(f"tensor {listing([name])} is of an unknown type, {stored.kind}") from None
  if kind.name not in KINDS:
    raise header.error(f"tensor {listing([name])}: {kind.name} is not supported; known: {', '.join(KINDS)}")
  block, size = gguf.GGML_QUANT_SIZES[kind]
  if stored.shape[-1] % block:
    raise header.error(
      f"tensor {listing([name])}: rows of {stored.shape[-1]} are no blocks of {block} ({kind.name})"
    )
  return _Tensor(name, kind, stored.shape, stored.start, math.prod(stored.shape) // block * size, 0)


def _checked_places(header: Header) -> Iterable[str]:
  """The names of all tensors; refuses those that overlap, leave gaps or end behind the file."""
  at = None
  for name, stored in header.tensors.items():
    if at is not None and stored.start != at:
      raise header.error(
        f"is damaged: tensor {listing([name])} begins at byte {stored.start} instead of {at}"
      )
    end = stored.start + _stored(header, name).length
    if end > header.size:
      raise header.error(
        f"is damaged or cut off: tensor {listing([name])} ends at byte {end} of {header.size}"
      )
    at = -(-end // header.alignment) * header.alignment
  return header.tensors


def _write_texts(folder: pathlib.Path, texts: dict[str, str]) -> None:
  for name, text in texts.items():
    (folder / name).write_text(text, encoding="utf-8")
