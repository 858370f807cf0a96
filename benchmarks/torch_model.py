"""The same model and recipe in plain PyTorch: what `benchmarks.training` times ours against.

Written for this comparison, and to be quick: products are joined where ours are, attention is
`scaled_dot_product_attention`, the recurrence is the chunked form of transformers, the optimizer works
on stacks of equal matrices, and of the last pass over a window nothing is computed that is dropped.
Weights have the layout of `sleep_jax` (`x @ W`), so that they can be copied and gradients compared.
Whatever a preset of Rule 110 does not use (pads, prelude and coda, truncation, remat) is refused.
"""

import collections
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from sleep_jax import model, optim, params, windows
from sleep_jax.config import Config, ModelConfig, check
from sleep_jax.data import rule110

Weights = dict[str, torch.Tensor]  # "blocks/0/mixer/q" -> tensor
State = dict[int, tuple[torch.Tensor, torch.Tensor]]  # fast-weight block -> S and the convolution's inputs


def set_up(threads: int) -> None:
  """Threads, and zero for subnormal numbers, which would slow the triangular solves down several times.

  Call it before torch does any work: its worker threads inherit the mode when they start.
  """
  torch.set_flush_denormal(True)
  torch.set_num_threads(threads)


def check_config(cfg: Config) -> None:
  """Raises `ConfigError` for what this model does not do."""
  plain = (cfg.sleep.backprop_passes, cfg.sleep.first_block, cfg.sleep.last_block) == (None, 0, None)
  check(plain, "sleep", "the PyTorch model repeats all blocks and differentiates through all passes")
  check(cfg.model.dtype == "float32", "model.dtype", "the PyTorch model is float32")
  check(set(cfg.model.blocks) <= {"attn", "gdn"}, "model.blocks", "the PyTorch model has attn and gdn")
  check(cfg.model.blocks[-1] == "gdn", "model.blocks", "the PyTorch model ends with gdn")
  fast = cfg.model.fast
  check(
    fast.conv_size > 0 and fast.conv_context == "carry",
    "model.fast",
    "the PyTorch model carries its convolution",
  )
  check(cfg.model.num_kv_heads == cfg.model.attention.num_heads, "model.attention", "no grouped queries")


def from_jax(values: Mapping[str, Any], prefix: str = "") -> Weights:
  """Copies of the weights of `sleep_jax.model.init`, by path, as leaves that want gradients."""
  found: Weights = {}
  for name, value in values.items():
    if isinstance(value, Mapping):
      found |= from_jax(value, f"{prefix}{name}/")
    else:
      found[prefix + name] = torch.from_numpy(np.array(value)).requires_grad_()
  return found


class Model:
  """Algorithm 1 of arXiv 2605.26099 for one config.

  Attributes:
    chunk: tokens a chunk of the recurrence; None: as many as are read at a time.
  """

  def __init__(self, cfg: Config, layout: np.ndarray, chunk: int | None):
    check_config(cfg)
    self.cfg, self.num_passes, self.chunk = cfg.model, cfg.sleep.num_passes, chunk
    self.segments = windows.plan(layout, cfg.model.window)
    self.answers = torch.from_numpy(windows.answer_positions(self.segments))
    self.cos, self.sin = _angles(cfg.model)

  def loss(self, weights: Weights, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy in nats a target.

    Args:
      batch: inputs and targets [B, T] int64, loss_mask [B, T] float32.
    """
    logits = self.logits(weights, batch["inputs"]).flatten(0, 1)
    targets, mask = (batch[name][:, self.answers].flatten() for name in ("targets", "loss_mask"))
    nats = F.cross_entropy(logits, targets, reduction="none")
    return (nats * mask).sum() / mask.sum()

  def logits(self, weights: Weights, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, M, vocab] at the answers of sequences [B, T]."""
    layers = _prepare(weights, self.cfg)
    state, found = self._empty(tokens.shape[0]), []
    for s in self.segments:
      for window in tokens[:, s.start : s.start + s.length * s.count].split(s.length, dim=1):
        h = F.embedding(window, weights["embed"])
        if not s.reads:
          state = self._sleep(layers, h, state)
          continue
        h, state = self._blocks(layers, h, state)
        h = F.rms_norm(h[:, list(s.reads)], h.shape[-1:], weights["final_norm"], self.cfg.norm_eps)
        found.append(h @ weights["head"])
    return torch.cat(found, dim=1)

  def _empty(self, batch: int) -> State:
    fast = self.cfg.fast
    S = torch.zeros(batch, fast.num_heads, fast.key_dim, fast.value_dim)
    width = fast.num_heads * (2 * fast.key_dim + fast.value_dim)
    context = torch.zeros(batch, fast.conv_size - 1, width)
    return {i: (S, context) for i, kind in enumerate(self.cfg.blocks) if kind == "gdn"}

  def _sleep(self, layers: list[Weights], h: torch.Tensor, state: State) -> State:
    """N passes over one window; each reads the inputs of the convolution that the window began with."""
    start, after = state, state
    for n in range(self.num_passes):
      opened = {i: (after[i][0], start[i][1]) for i in state}
      h, after = self._blocks(layers, h, opened, only_state=n == self.num_passes - 1)
    return after

  def _blocks(self, layers, h, state, only_state=False):
    """One pass; with `only_state` the last block stops where its state is written, and h is not valid."""
    state = dict(state)
    for i, (kind, w) in enumerate(zip(self.cfg.blocks, layers, strict=True)):
      x = F.rms_norm(h, h.shape[-1:], w["norm"], self.cfg.norm_eps)
      if kind == "attn":
        h = h + self._attention(w, x)
      else:
        o, state[i] = self._gdn(w, x, *state[i])
        if only_state and i == len(layers) - 1:
          break
        h = h + self._read(w, x, o)
      x = F.rms_norm(h, h.shape[-1:], w["mlp_norm"], self.cfg.norm_eps)
      gate, up = (x @ w["mlp_in"]).chunk(2, dim=-1)
      h = h + (F.silu(gate) * up) @ w["mlp/down"]
    return h, state

  def _attention(self, w: Weights, x: torch.Tensor) -> torch.Tensor:
    """Causal inside the window; positions count from its beginning."""
    B, T, _ = x.shape
    q, k, v = (x @ w["qkv"]).view(B, T, 3, -1, self.cfg.head_dim).permute(2, 0, 3, 1, 4)
    if self.cfg.attention.qk_norm:
      q = F.rms_norm(q, q.shape[-1:], w["mixer/q_norm"], self.cfg.norm_eps)
      k = F.rms_norm(k, k.shape[-1:], w["mixer/k_norm"], self.cfg.norm_eps)
    o = F.scaled_dot_product_attention(self._rope(q), self._rope(k), v, is_causal=True)
    return o.transpose(1, 2).flatten(2) @ w["o"]

  def _rope(self, x: torch.Tensor) -> torch.Tensor:
    cos, sin = self.cos[: x.shape[2]], self.sin[: x.shape[2]]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

  def _gdn(self, w: Weights, x: torch.Tensor, S: torch.Tensor, context: torch.Tensor):
    """What S answers [B, T, H, V], and the state after the window."""
    fast = self.cfg.fast
    B, T, _ = x.shape
    padded = torch.cat([context, x @ w["qkv"]], dim=1)
    # Four shifted products: on a CPU several times faster than conv1d with groups.
    mixed = sum(w["conv"][i] * padded[:, i : i + T] for i in range(fast.conv_size))
    parts = F.silu(mixed).split(
      [fast.num_heads * d for d in (fast.key_dim, fast.key_dim, fast.value_dim)], dim=-1
    )
    q, k, v = (part.view(B, T, fast.num_heads, -1) for part in parts)
    step, b = (x @ w["gates"]).chunk(2, dim=-1)
    g = -w["mixer/A_log"].exp() * F.softplus(step + w["mixer/dt_bias"])
    o, S = torch_chunk_gated_delta_rule(
      q,
      k,
      v,
      g,
      b.sigmoid(),
      chunk_size=self.chunk or T,
      initial_state=S,
      output_final_state=True,
      use_qk_l2norm_in_kernel=True,
    )
    return o, (S, padded[:, T:])

  def _read(self, w: Weights, x: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    """What a block adds to the residual stream of what S answered."""
    o = F.rms_norm(o, o.shape[-1:], w["mixer/out_norm"], self.cfg.fast.out_norm_eps).flatten(2)
    return (o * F.silu(x @ w["gate"])) @ w["o"]


def _prepare(weights: Weights, cfg: ModelConfig) -> list[Weights]:
  """The weights of each block by name, and once a step what several windows and passes share."""
  layers = []
  for i, kind in enumerate(cfg.blocks):
    prefix = f"blocks/{i}/"
    w = {n.removeprefix(prefix): weights[n] for n in filter(lambda n: n.startswith(prefix), weights)}
    w["qkv"] = torch.cat([w[f"mixer/{name}"].flatten(1) for name in "qkv"], dim=1)
    w["o"] = w["mixer/o"].flatten(0, 1)
    w["mlp_in"] = torch.cat([w["mlp/gate"], w["mlp/up"]], dim=1)
    if kind == "gdn":
      w["gate"] = w["mixer/gate"].flatten(1)
      w["gates"] = torch.cat([w["mixer/a"], w["mixer/b"]], dim=1)
      w["conv"] = torch.cat([w[f"mixer/{name}_conv"].flatten(1) for name in "qkv"], dim=1)
    layers.append(w)
  return layers


def _angles(cfg: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
  """cos and sin [L, head_dim / 2] of the rotary angles."""
  half = cfg.head_dim // 2
  frequencies = cfg.attention.rope_theta ** (-torch.arange(half) / half)
  angles = torch.arange(cfg.window)[:, None] * frequencies
  return angles.cos(), angles.sin()


class Optimizer:
  """Muon and AdamW as `sleep_jax.optim` has them; works on the weights in place."""

  def __init__(self, cfg: Config, weights: Weights):
    scheduled = cfg.optim.warmup_steps or cfg.optim.bound_to_length
    check(not scheduled, "optim", "the PyTorch recipe has no schedule")
    self.cfg, self.weights = cfg.optim, list(weights.values())
    paths, _ = jax.tree_util.tree_flatten_with_path(model.declare(cfg.model), is_leaf=params.is_weight)
    declared = {params.name_of(path): weight for path, weight in paths}
    self.muon = {n: weights[n] for n, w in declared.items() if w.group == "muon"}
    self.num_in = {n: declared[n].num_in for n in self.muon}
    self.momentum = [torch.zeros_like(w) for w in self.muon.values()]
    self.muon_decay = [cfg.optim.weight_decay if declared[n].decay else 0.0 for n in self.muon]
    groups = collections.defaultdict(list)
    for name, w in declared.items():
      if name not in self.muon:
        groups[cfg.optim.weight_decay if w.decay else 0.0].append(weights[name])
    self.adam = torch.optim.AdamW(
      [{"params": members, "weight_decay": decay} for decay, members in groups.items()],
      lr=cfg.optim.adam_lr,
      betas=(cfg.optim.adam_b1, cfg.optim.adam_b2),
      eps=cfg.optim.adam_eps,
      fused=True,
    )

  def forget_gradients(self) -> None:
    """Before the next backward pass, which would add to them."""
    for w in self.weights:
      w.grad = None

  @torch.no_grad()
  def step(self) -> None:
    """Clips the gradients of the weights, and moves the weights."""
    torch.nn.utils.clip_grad_norm_(self.weights, self.cfg.clip_norm, foreach=True)
    self.adam.step()
    grads, weights = [w.grad for w in self.muon.values()], list(self.muon.values())
    torch._foreach_lerp_(self.momentum, grads, 1 - self.cfg.muon_momentum)
    nesterov = torch._foreach_lerp(self.momentum, grads, 1 - self.cfg.muon_momentum)
    stacks = collections.defaultdict(list)
    for i, (name, x) in enumerate(zip(self.muon, nesterov, strict=True)):
      x = x.reshape(math.prod(x.shape[: self.num_in[name]]), -1)
      turned = x.shape[0] > x.shape[1]
      x = x.T if turned else x
      stacks[x.shape].append((i, x, turned))
    for members in stacks.values():
      stack = torch.stack([x for _, x, _ in members]).to(getattr(torch, self.cfg.newton_schulz_dtype))
      stack = newton_schulz(stack, self.cfg.newton_schulz_steps)
      for (i, _, turned), x in zip(members, stack.float(), strict=True):
        x = x.T if turned else x
        scale = self.cfg.muon_lr * math.sqrt(max(1.0, x.shape[1] / x.shape[0]))
        weights[i].mul_(1 - self.cfg.muon_lr * self.muon_decay[i]).sub_(scale * x.reshape(weights[i].shape))


def newton_schulz(x: torch.Tensor, steps: int) -> torch.Tensor:
  """As `sleep_jax.optim.newton_schulz`: x [n, rows, columns], rows <= columns."""
  a, b, c = optim.NEWTON_SCHULZ
  norms = torch.linalg.vector_norm(x.float(), dim=(1, 2), keepdim=True)
  x = x / (norms + optim.FROBENIUS_EPS).to(x.dtype)
  for _ in range(steps):
    gram = x @ x.mT
    x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
  return x


def make_batch(data: rule110.Rule110Config, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
  """A batch of Rule 110 drawn by torch: as `rule110.sequences`, of strings of its own."""
  strings = torch.randint(0, 1 << data.num_cells, (size, data.num_strings), generator=generator)
  return sequences(data, strings)


def sequences(data: rule110.Rule110Config, strings: torch.Tensor) -> dict[str, torch.Tensor]:
  """Token sequences of given strings [B, num_strings] int64, bit i is cell i."""
  check(data.boundary == "periodic", "data.boundary", "the PyTorch task is periodic")
  n, after = data.num_cells, strings
  for _ in range(data.rollout_steps):
    left, right = (after << 1) | (after >> (n - 1)), (after >> 1) | (after << (n - 1))
    after = (after | right) & ~(left & after & right) & ((1 << n) - 1)
  cells = ((strings[:, :, None] >> torch.arange(n)) & 1).flatten(1)
  labels = after & 1
  ask = torch.full_like(labels[:, :1], rule110.ASK)
  mask = torch.from_numpy(rule110.layout(data)).float().expand(len(strings), -1)
  return {
    "inputs": torch.cat([cells, ask, labels[:, :-1]], dim=1),
    "targets": torch.cat([torch.zeros_like(cells), labels], dim=1),
    "loss_mask": mask,
  }
