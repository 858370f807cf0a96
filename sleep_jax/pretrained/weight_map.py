"""Which published tensor is which weight of ours, and how its axes lie.

Published matrices are [out, in], ours [*in, *out]; what has several heads is flat there. The taps of a
dynamic convolution are flat as (channel, tap), tap fastest, which is our order [H, V, c] too; those of a
short one are [channel, 1, tap], ours [c, H, K or V]. Some families hold several weights in one tensor, one
behind the other.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping

import jax
import numpy as np

from sleep_jax import model, params
from sleep_jax.config import ATTENTION, ModelConfig
from sleep_jax.pretrained import published

_MODEL = {
  "embed": "model.embed_tokens.weight",
  "final_norm": "model.norm.weight",
  "head": "lm_head.weight",
  "exit_gate/w": "model.early_exit_gate.weight",
  "exit_gate/b": "model.early_exit_gate.bias",
}
_BLOCK = {
  "norm": "input_layernorm.weight",
  "post_norm": "input_layernorm_2.weight",
  "mlp_norm": "post_attention_layernorm.weight",
  "mlp_post_norm": "post_attention_layernorm_2.weight",
  "mlp/gate": "mlp.gate_proj.weight",
  "mlp/up": "mlp.up_proj.weight",
  "mlp/down": "mlp.down_proj.weight",
  "mixer/q": "self_attn.q_proj.weight",
  "mixer/k": "self_attn.k_proj.weight",
  "mixer/v": "self_attn.v_proj.weight",
  "mixer/o": "self_attn.o_proj.weight",
  "mixer/q_norm": "self_attn.q_norm.weight",
  "mixer/k_norm": "self_attn.k_norm.weight",
  "mixer/q_bias": "self_attn.q_proj.bias",
  "mixer/k_bias": "self_attn.k_proj.bias",
  "mixer/v_bias": "self_attn.v_proj.bias",
  "mixer/o_bias": "self_attn.o_proj.bias",
  "mlp/gate_bias": "mlp.gate_proj.bias",
  "mlp/up_bias": "mlp.up_proj.bias",
  "mlp/down_bias": "mlp.down_proj.bias",
  "mixer/gate": "self_attn.g_proj.weight",
  "mixer/a": "self_attn.a_proj.weight",
  "mixer/b": "self_attn.b_proj.weight",
  "mixer/A_log": "self_attn.A_log",
  "mixer/dt_bias": "self_attn.dt_bias",
  "mixer/out_norm": "self_attn.o_norm.weight",
  "mixer/conv_w1": "self_attn.dynamic_conv1d.kernel_generator.w1.weight",
  "mixer/conv_w2": "self_attn.dynamic_conv1d.kernel_generator.w2.weight",
  "mixer/conv_b2": "self_attn.dynamic_conv1d.kernel_generator.w2.bias",
}
# The layer of Gated DeltaNet, inside of a block: as OLMo-Hybrid names it, and as Qwen3.5 does.
_DELTA_NET = {
  f"mixer/{ours}": f"linear_attn.{theirs}.weight"
  for ours, theirs in [(x, f"{x}_proj") for x in "qkvabo"]
  + [(f"{x}_conv", "conv1d") for x in "qkv"]
  + [("gate", "g_proj"), ("out_norm", "o_norm")]
} | {"mixer/A_log": "linear_attn.A_log", "mixer/dt_bias": "linear_attn.dt_bias"}
_QWEN_DELTA_NET = _DELTA_NET | {
  f"mixer/{ours}": f"linear_attn.{theirs}.weight"
  for ours, theirs in [("a", "in_proj_a"), ("b", "in_proj_b"), ("gate", "in_proj_z"), ("out_norm", "norm")]
  + [("o", "out_proj"), ("q", "in_proj_qkv"), ("k", "in_proj_qkv"), ("v", "in_proj_qkv")]
}
# Kimi Linear: Kimi Delta Attention, and attention of a latent.
_KIMI_DELTA = {
  f"mixer/{ours}": f"self_attn.{theirs}.weight"
  for ours, theirs in [(f"{x}_conv", f"{x}_conv1d") for x in "qkv"]
  + [(f"f_{x}", f"f_{x}_proj") for x in "ab"]
  + [(f"gate_{x}", f"g_{x}_proj") for x in "ab"]
}
_LATENT = {
  "mixer/kv_down": "self_attn.kv_a_proj_with_mqa.weight",
  "mixer/latent_norm": "self_attn.kv_a_layernorm.weight",
  "mixer/kv_up": "self_attn.kv_b_proj.weight",
}
_VECTORS = ("norm", "bias", "A_log", "conv_b2", "exit_gate/b")  # how the names of our vectors end


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a family names its tensors, where that differs from the rest.

  Attributes:
    root: what all names begin with but the head's.
    attention, fast: names inside of a block of attention, and of fast weights, by our own names. Weights of
      one name lie in one tensor, queries, keys and values in this order.
    others: (pattern, replacement), in turn: what the same tensor is called in other files of the family.
    split: (end of a name, ends of the pieces): a tensor that files may hold in pieces, one behind the other,
      wherever they are cut.
    beside: tensors of the files that are no part of the model here. They are not read, and written back.
    axes: of vectors that are not flat in the files, their shapes, with -1 for the vector's length.
  """

  root: str = "model."
  attention: Mapping[str, str] = dataclasses.field(default_factory=dict)
  fast: Mapping[str, str] = dataclasses.field(default_factory=dict)
  others: tuple[tuple[str, str], ...] = ()
  split: tuple[str, tuple[str, ...]] | None = None
  beside: str = ""
  axes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

  def names(self, name: str) -> list[str]:
    """A tensor's name and the others that it may have."""
    found = (re.sub(pattern, replacement, name) for pattern, replacement in self.others)
    return list(dict.fromkeys([name, *found]))

  def pieces(self, name: str) -> list[str]:
    """The names of the pieces that a tensor may be held in; empty if it is never cut."""
    if self.split is None or not name.endswith(self.split[0]):
      return []
    return [name.removesuffix(self.split[0]) + end for end in self.split[1]]


PLAIN = Layout()
_QWEN3_5 = Layout(
  fast=_QWEN_DELTA_NET,
  others=((r"^model\.(?!language_model\.)", "model.language_model."),),
  beside=r"(?:mtp|model\.visual)\..*",
)
LAYOUTS = {
  published.QWEN3_5: _QWEN3_5,
  published.QWEN3_5_WITH_IMAGES: dataclasses.replace(_QWEN3_5, root="model.language_model.", others=()),
  published.OLMO_HYBRID: Layout(
    attention={
      "post_norm": "post_attention_layernorm.weight",
      "mlp_post_norm": "post_feedforward_layernorm.weight",
    },
    fast=_DELTA_NET | {"norm": "attention_layer_norm.weight", "mlp_norm": "feedforward_layer_norm.weight"},
    # When transformers 5 writes a file, it renames the norms of all blocks alike, and cuts the taps of q, k
    # and v in three equal pieces.
    split=(".conv1d.weight", tuple(f".{x}_conv1d.weight" for x in "qkv")),
    others=((r"\.post_attention_layernorm\.", ".feedforward_layer_norm."),),
  ),
  published.KIMI_LINEAR: Layout(
    attention=_LATENT,
    fast=_KIMI_DELTA,
    # When transformers 5 writes a file, it names every MLP as if it had experts.
    others=((r"\.mlp\.", ".block_sparse_moe."),),
    axes={"mixer/A_log": (1, 1, -1, 1)},
  ),
}


def layout_of(architecture: str) -> Layout:
  """How an architecture names its tensors."""
  return LAYOUTS.get(architecture, PLAIN)


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor, or what one of our weights is of it.

  Attributes:
    name: in the file.
    path: of our weight, as `blocks/0/mixer/q`.
    weight: its declaration.
    memory: whether it belongs to a block that was added (`ModelConfig.without_mlp`) and lies in a file beside
      the published ones.
    published: whether it has the published layout; otherwise it lies in the file as it is here.
    first, rows: where in the tensor the weight begins, and how many rows that has. None: it is all of it.
    axes: of a vector, how it lies in the file, with -1 for its length. None: flat.
  """

  name: str
  path: str
  weight: params.Weight
  memory: bool = False
  published: bool = True
  first: int = 0
  rows: int | None = None
  axes: tuple[int, ...] | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the tensor in the file."""
    own = self._shape
    return own if self.rows is None else (self.rows, *own[1:])

  def part(self, x: np.ndarray) -> np.ndarray:
    """What the weight is of the tensor, in the file's layout; a view."""
    return x if self.rows is None else x[self.first : self.first + self._shape[0]]

  def to_ours(self, x: np.ndarray) -> np.ndarray:
    """A tensor of the file in our layout; a view."""
    x, ours = self.part(x), self.weight.shape
    if self._taps:
      return np.moveaxis(x.reshape(*ours[1:], ours[0]), -1, 0)
    return (x.T if self._turned else x).reshape(ours)

  def to_published(self, x: np.ndarray) -> np.ndarray:
    """Our array in the file's layout: the weight's part of the tensor."""
    if self._taps:
      x = np.moveaxis(x, 0, -1)
    return x.reshape(self._shape[::-1]).T if self._turned else x.reshape(self._shape)

  @property
  def _shape(self) -> tuple[int, ...]:
    """Of the weight in the file."""
    ours, n = self.weight.shape, self.weight.num_in
    if not self.published or self.path == "embed":
      return ours
    if self._taps:
      return (math.prod(ours[1:]), 1, ours[0])
    if self.path.endswith(_VECTORS):
      return tuple(math.prod(ours) if size == -1 else size for size in self.axes or (-1,))
    return (math.prod(ours[n:]), math.prod(ours[:n]))

  @property
  def _taps(self) -> bool:
    return self.published and self.path.endswith("_conv")

  @property
  def _turned(self) -> bool:
    return self.published and self.path != "embed" and len(self._shape) == 2


def entries(cfg: ModelConfig, layout: Layout = PLAIN) -> list[Entry]:
  """Every weight of a model of a published architecture, with its published name.

  Added blocks are `memory.layers.{j}.*`, counted from 0, with the names that a JetBlock has; the others keep
  the numbers that they had before. What a JetBlock lacks (the short convolutions of a `gdn` block, say) has
  our name and our layout.

  Args:
    layout: of the family, from `LAYOUTS`.
  """
  numbers, memories = {}, {}
  for i in range(len(cfg.blocks)):
    group = memories if i in cfg.without_mlp else numbers
    group[str(i)] = len(group)
  found = []
  for ours, weight in _declared(cfg):
    if not ours.startswith("blocks/"):
      name = _MODEL[ours]
      name = layout.root + name.removeprefix("model.") if name.startswith("model.") else name
      found.append(Entry(name, ours, weight))
      continue
    _, i, inner = ours.split("/", 2)
    if i in numbers:
      own = layout.attention if cfg.blocks[int(i)] in ATTENTION else layout.fast
      name = own[inner] if inner in own else _BLOCK[inner]
      named = f"{layout.root}layers.{numbers[i]}.{name}"
      found.append(Entry(named, ours, weight, axes=layout.axes.get(inner)))
      continue
    name = _BLOCK.get(inner, f"self_attn.{inner.rpartition('/')[2]}")
    found.append(Entry(f"memory.layers.{memories[i]}.{name}", ours, weight, True, inner in _BLOCK))
  return _one_behind_the_other(found)


def _one_behind_the_other(found: list[Entry]) -> list[Entry]:
  """The entries, those of one tensor with their places in it: queries, keys, values."""
  sharing = collections.defaultdict(list)
  for entry in found:
    sharing[entry.name].append(entry)
  placed = []
  for some in sharing.values():
    some = sorted(some, key=lambda e: "qkv".find(e.path.rpartition("/")[2][0]))
    sizes = [e.shape[0] for e in some]
    rows = sum(sizes) if len(some) > 1 else None
    placed += [dataclasses.replace(e, first=sum(sizes[:k]), rows=rows) for k, e in enumerate(some)]
  return placed


def plain_entries(cfg: ModelConfig) -> list[Entry]:
  """Every weight of any model under our own name, with dots for slashes, in our own layout."""
  return [Entry(ours.replace("/", "."), ours, weight, published=False) for ours, weight in _declared(cfg)]


def _declared(cfg: ModelConfig) -> list[tuple[str, params.Weight]]:
  """Name and declaration of every weight."""
  paths, _ = jax.tree_util.tree_flatten_with_path(model.declare(cfg), is_leaf=params.is_weight)
  return [(params.name_of(path), weight) for path, weight in paths]
