"""Floating-point operations, counted from the config: what throughput is measured against."""

import dataclasses
import functools
import math
from typing import Any

import jax

from sleep_jax import blocks, params, windows
from sleep_jax.config import ATTENTION, ModelConfig, SleepConfig

CHUNK = 64  # of the fast-weight kernels; shorter windows are one chunk
TRAIN_FACTOR = 3  # a backward pass is two forward passes; recomputation (remat) is not useful work


@dataclasses.dataclass(frozen=True)
class Flops:
  """Forward FLOPs, of one sequence or of several: a multiplication and an addition count as two.

  Attributes:
    awake: windows that answer, logits included.
    asleep: all passes over windows that are slept on; of those that answer too, all but the first.
  """

  awake: float
  asleep: float

  def __mul__(self, count: int) -> "Flops":
    return Flops(self.awake * count, self.asleep * count)

  def __add__(self, other: "Flops") -> "Flops":
    return Flops(self.awake + other.awake, self.asleep + other.asleep)

  @property
  def train(self) -> float:
    """Forward and backward, without recomputation."""
    return TRAIN_FACTOR * (self.awake + self.asleep)

  @property
  def asleep_share(self) -> float:
    """Share of sleep in all of them."""
    return self.asleep / (self.awake + self.asleep)


@functools.cache
def per_sequence(segments: windows.Plan, cfg: ModelConfig, sleep_cfg: SleepConfig) -> Flops:
  """Counts the FLOPs of one sequence; norms, gates and the optimizer are left out (below 1 %)."""
  first, last = sleep_cfg.looped(len(cfg.blocks))
  awake = asleep = 0.0
  for segment in segments:
    kinds = [(kind, i not in cfg.without_mlp) for i, kind in enumerate(cfg.blocks)]
    each = {kind: _block(*kind, segment.length, cfg) * segment.count for kind in set(kinds)}
    by_block = [each[kind] for kind in kinds]
    repeated = (sleep_cfg.num_passes - 1) * sum(by_block[first:last])
    awake += 2 * cfg.embed_dim * cfg.vocab_size * len(segment.reads) * segment.count
    if not segment.asleep:
      awake += cfg.predict_passes * sum(by_block)
    elif segment.reads:  # the first pass is the reading awake; the blocks behind the loop run again
      awake += sum(by_block)
      asleep += repeated + sum(by_block[last:])
    else:
      asleep += sum(by_block) + repeated
  return Flops(awake, asleep)


def _block(kind: str, mlp: bool, length: int, cfg: ModelConfig) -> float:
  """One pass of one block over a window of `length` tokens."""
  declared = jax.tree.leaves(blocks.declare_block(cfg, kind, mlp), is_leaf=params.is_weight)
  dense = sum(2 * math.prod(w.shape) for w in declared if w.group == "muon")
  if kind in ATTENTION:
    own = cfg.attention.swa_window if kind == "swa" else None
    reach = length if own is None else min(length, own)
    seen = reach - reach**2 / (2 * length)  # keys a query, on average over the window
    if cfg.eviction == "sliding":  # what was kept fills every query's reach
      seen = cfg.window if own is None else min(cfg.window, own)
    mixing = 4 * cfg.attention.num_heads * cfg.head_dim * seen  # scores and values
  else:
    chunk, fast = min(length, CHUNK), cfg.fast
    mixing = (
      2
      * fast.num_heads
      * (2 * chunk * fast.key_dim + 3 * fast.key_dim * fast.value_dim + 2 * chunk * fast.value_dim)
    )
  return length * (dense + mixing)


# Dense bf16 FLOP/s of one device, from the vendors' datasheets (NVIDIA's halved where they count sparsity;
# Google Cloud's TPU system architecture pages). The first entry whose words are all in the name counts.
_PEAK_FLOPS = (
  (("h100", "pcie"), 756e12),
  (("h100", "nvl"), 835e12),
  (("h100",), 989e12),
  (("h200",), 989e12),
  (("a100",), 312e12),
  (("tpu v4",), 275e12),
  (("tpu v5 lite",), 197e12),
  (("tpu v5e",), 197e12),
  (("tpu v5",), 459e12),  # v5p calls itself "TPU v5"
  (("tpu v6",), 918e12),
)


def peak_flops(device: Any) -> float | None:
  """Peak dense bf16 FLOP/s of a device, or of a `device_kind`; None if it is not in the table (any CPU)."""
  kind = (device if isinstance(device, str) else device.device_kind).lower()
  if "tpu v4 lite" in kind or " mig " in kind:  # another chip, v4i; a slice of a chip
    return None
  return next((peak for words, peak in _PEAK_FLOPS if all(word in kind for word in words)), None)
