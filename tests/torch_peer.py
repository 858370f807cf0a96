"""The gated-delta-rule layer of somebody else: OLMo-Hybrid's, from transformers, on the CPU.

`OlmoHybridGatedDeltaNet` with `linear_allow_neg_eigval` off computes the "gdn" layer of this project
(arXiv:2412.06464, and as arXiv:2605.26099 uses it) with the same order of operations: project, causal
depthwise convolution, SiLU, l2 norm, rule, RMSNorm (eps 1e-5), SiLU gate, output. It differs in layout:
linear weights are [out, in], one convolution runs over the concatenation of q, k and v, and heads are
flattened. It computes in float32 whatever it is given.

torch and transformers are imported inside the functions, so this module can be imported without them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

Layer = Mapping[str, Any]  # parameters of one "gdn" mixer in this project's layout


def olmo_hybrid_config(layer_params: Layer) -> Any:
  """An OlmoHybridConfig of one linear-attention layer with the sizes of `layer_params`.

  Two layers are declared, because the config insists on a full-attention one; only layer 0 is built.
  """
  from transformers import OlmoHybridConfig

  width, heads, key_width = np.shape(layer_params["k"])
  return OlmoHybridConfig(
    vocab_size=8,
    hidden_size=width,
    intermediate_size=width,
    num_hidden_layers=2,
    num_attention_heads=1,
    layer_types=["linear_attention", "full_attention"],
    linear_num_key_heads=heads,
    linear_num_value_heads=heads,
    linear_key_head_dim=key_width,
    linear_value_head_dim=np.shape(layer_params["v"])[2],
    linear_conv_kernel_dim=np.shape(layer_params["k_conv"])[0] if "k_conv" in layer_params else 4,
    linear_allow_neg_eigval=False,
    pad_token_id=None,
    eos_token_id=None,
  )


def to_olmo_hybrid(layer_params: Layer, module: Any) -> Any:
  """Copies a "gdn" mixer's parameters into an OlmoHybridGatedDeltaNet, in place, and returns it.

  Without q_conv, k_conv and v_conv the convolution becomes the identity (last tap one).

  Raises:
    ValueError: if a tensor of the module would be left as it was, or if shapes disagree.
  """
  import torch

  p = {name: np.asarray(value, np.float32) for name, value in layer_params.items()}
  width = p["q"].shape[0]
  kernel = module.conv_kernel_size

  def taps(name: str) -> np.ndarray:
    channels = p[name].shape[1] * p[name].shape[2]
    if f"{name}_conv" in p:
      return p[f"{name}_conv"].reshape(kernel, channels).T
    return np.eye(kernel, dtype=np.float32)[np.full(channels, kernel - 1)]

  new = {f"{name}_proj.weight": p[name].reshape(width, -1).T for name in ("q", "k", "v", "a", "b")}
  new |= {
    "g_proj.weight": p["gate"].reshape(width, -1).T,
    "o_proj.weight": p["o"].reshape(-1, width).T,
    "o_norm.weight": p["out_norm"],
    "A_log": p["A_log"],
    "dt_bias": p["dt_bias"],
    "conv1d.weight": np.concatenate([taps(name) for name in ("q", "k", "v")])[:, None, :],
  }
  tensors = dict(module.named_parameters())
  shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
  if shapes != {name: value.shape for name, value in new.items()}:
    raise ValueError(f"the module has {shapes}, the layer { ({n: v.shape for n, v in new.items()}) }")
  with torch.no_grad():
    for name, tensor in tensors.items():
      tensor.copy_(torch.from_numpy(np.ascontiguousarray(new[name])))
  return module


def olmo_hybrid_layer(layer_params: Layer) -> Any:
  """A new OlmoHybridGatedDeltaNet (eval mode, float32) with the sizes and values of `layer_params`."""
  from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet

  return to_olmo_hybrid(layer_params, OlmoHybridGatedDeltaNet(olmo_hybrid_config(layer_params), 0)).eval()


def run_olmo_hybrid(layer_params: Layer, *windows: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
  """Runs the layer over consecutive windows [B, L_i, D] (at least two tokens each) of one sequence.

  Its cache carries the state and the convolution's context from window to window, from zero.

  Returns:
    The outputs [B, L_i, D], and S [B, H, K, V] after the last window, all float32.
  """
  import torch
  from transformers import DynamicCache

  layer = olmo_hybrid_layer(layer_params)
  cache = DynamicCache(config=olmo_hybrid_config(layer_params))
  with torch.no_grad():
    outputs = [layer(torch.from_numpy(np.asarray(x, np.float32)), cache_params=cache) for x in windows]
  return [o.numpy() for o in outputs], cache.get_recurrent_state(0, state_idx=0).numpy()


def kimi_linear_layer(layer_params: Layer) -> tuple[Any, dict[str, str]]:
  """A KimiLinearDeltaAttention (eval mode, float32) with the values of a "kda" mixer, K = V.

  Returns:
    The module, and the name of its tensor for each of ours except the convolutions, which are its
    `conv1d.weight` side by side.
  """
  import torch
  from transformers import KimiLinearConfig
  from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

  p = {name: np.asarray(value, np.float32) for name, value in layer_params.items()}
  width, heads, head_dim = p["k"].shape
  config = KimiLinearConfig(
    vocab_size=8,
    hidden_size=width,
    intermediate_size=width,
    num_hidden_layers=2,
    num_attention_heads=1,
    linear_head_dim=head_dim,
    linear_num_heads=heads,
    linear_conv_kernel_dim=p["k_conv"].shape[0],
    rms_norm_eps=1e-5,
    pad_token_id=None,
    eos_token_id=None,
  )
  module = KimiLinearDeltaAttention(config, 0).eval()
  names = {name: f"{name}_proj.weight" for name in ("q", "k", "v", "b", "o")}
  names |= {f"f_{x}": f"forget_gate.f_{x}_proj.weight" for x in "ab"}
  names |= {f"gate_{x}": f"g_{x}_proj.weight" for x in "ab"}
  names |= {name: f"forget_gate.{name}" for name in ("A_log", "dt_bias")} | {"out_norm": "o_norm.weight"}
  num_in = {name: p[name].shape[0] for name in names} | {"o": heads * head_dim}
  new = {
    their: p[ours].reshape(num_in[ours], -1).T if their.endswith("proj.weight") else p[ours]
    for ours, their in names.items()
  }
  taps = [p[f"{name}_conv"].reshape(p["k_conv"].shape[0], -1).T for name in ("q", "k", "v")]
  new["conv1d.weight"] = np.concatenate(taps)[:, None, :]
  tensors = dict(module.named_parameters())
  if set(tensors) != set(new):
    raise ValueError(f"the module has {sorted(tensors)}, the layer {sorted(new)}")
  with torch.no_grad():
    for name, tensor in tensors.items():
      tensor.copy_(torch.from_numpy(np.array(new[name])).reshape(tensor.shape))
  return module, names
