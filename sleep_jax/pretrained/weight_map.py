"""Which published tensor is which weight of ours, and how its axes lie.

Published matrices are [out, in], ours [*in, *out]; what has several heads is flat there. The taps of a
dynamic convolution are flat as (channel, tap), tap fastest, which is our order [H, V, c] too.
"""

import dataclasses
import math

import jax
import numpy as np

from sleep_jax import model, params
from sleep_jax.config import ModelConfig

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
_VECTORS = ("norm", "bias", "A_log", "conv_b2", "exit_gate/b")  # how the names of our vectors end


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor.

  Attributes:
    name: in the file.
    path: of our weight, as `blocks/0/mixer/q`.
    weight: its declaration.
    memory: whether it belongs to a block that was added (`ModelConfig.without_mlp`) and lies in a file beside
      the published ones.
    published: whether it has the published layout; otherwise it lies in the file as it is here.
  """

  name: str
  path: str
  weight: params.Weight
  memory: bool = False
  published: bool = True

  @property
  def shape(self) -> tuple[int, ...]:
    """In the file."""
    ours, n = self.weight.shape, self.weight.num_in
    if not self.published or self.path == "embed":
      return ours
    if self.path.endswith(_VECTORS):
      return (math.prod(ours),)
    return (math.prod(ours[n:]), math.prod(ours[:n]))

  def to_ours(self, x: np.ndarray) -> np.ndarray:
    """A tensor of the file in our layout; a view."""
    return (x.T if self._turned else x).reshape(self.weight.shape)

  def to_published(self, x: np.ndarray) -> np.ndarray:
    """Our array in the file's layout."""
    return x.reshape(self.shape[::-1]).T if self._turned else x.reshape(self.shape)

  @property
  def _turned(self) -> bool:
    return self.published and self.path != "embed" and len(self.shape) == 2


def entries(cfg: ModelConfig) -> list[Entry]:
  """Every weight of a model of a published architecture, with its published name.

  Added blocks are `memory.layers.{j}.*`, counted from 0, with the names that a JetBlock has; the others keep
  the numbers that they had before. What a JetBlock lacks (the short convolutions of a `gdn` block, say) has
  our name and our layout.
  """
  numbers, memories = {}, {}
  for i in range(len(cfg.blocks)):
    group = memories if i in cfg.without_mlp else numbers
    group[str(i)] = len(group)
  found = []
  for ours, weight in _declared(cfg):
    if not ours.startswith("blocks/"):
      found.append(Entry(_MODEL[ours], ours, weight))
      continue
    _, i, inner = ours.split("/", 2)
    if i in numbers:
      found.append(Entry(f"model.layers.{numbers[i]}.{_BLOCK[inner]}", ours, weight))
      continue
    name = _BLOCK.get(inner, f"self_attn.{inner.rpartition('/')[2]}")
    found.append(Entry(f"memory.layers.{memories[i]}.{name}", ours, weight, True, inner in _BLOCK))
  return found


def plain_entries(cfg: ModelConfig) -> list[Entry]:
  """Every weight of any model under our own name, with dots for slashes, in our own layout."""
  return [Entry(ours.replace("/", "."), ours, weight, published=False) for ours, weight in _declared(cfg)]


def _declared(cfg: ModelConfig) -> list[tuple[str, params.Weight]]:
  """Name and declaration of every weight."""
  paths, _ = jax.tree_util.tree_flatten_with_path(model.declare(cfg), is_leaf=params.is_weight)
  return [(params.name_of(path), weight) for path, weight in paths]
