"""A run's config: how it sleeps, learns, trains and is spread over devices. A part of `config`."""

import dataclasses
from typing import Any

from sleep_jax.config.model import ModelConfig
from sleep_jax.config.schema import above, at_least, check, one_of


@dataclasses.dataclass(frozen=True)
class SleepConfig:
  """How a full window is consolidated.

  Attributes:
    num_passes: N, passes over the window; 1 is the plain hybrid.
    backprop_passes: k, gradients flow through the last k passes only. None: through all of them.
    first_block, last_block: blocks first_block .. last_block - 1 are repeated; those before run once
      (prelude), those after run once (coda); all of them write. None: up to the last block.
    state: what a pass starts from: `carry`, the S that the pass before left, or `reset`, the S that the
      window began with, so that only the last pass's write survives (LT2, arXiv 2605.20670).
    kept: whose keys and values stay under sliding eviction: those of the `last` pass, which all passes
      over the next window see, or of `each`, where pass n sees those of pass n (N caches a looped block).
    remat: what is recomputed on the way back; each level includes the ones before it: `none`, `block`
      (keep the input of each block), `pass` (and of each pass), `window` (and S at each window).
    loops: `scan` compiles passes and windows once, `unroll` writes them out: same numbers, slower to
      compile, faster to run on a CPU.
  """

  num_passes: int = 1
  backprop_passes: int | None = None
  first_block: int = 0
  last_block: int | None = None
  state: str = "carry"
  kept: str = "last"
  remat: str = "none"
  loops: str = "scan"

  def __post_init__(self):
    at_least(self.num_passes, 1, "sleep.num_passes")
    if self.backprop_passes is not None:
      k = self.backprop_passes
      check(
        1 <= k <= self.num_passes,
        "sleep.backprop_passes",
        f"must lie in 1..{self.num_passes} (sleep.num_passes), got {k}",
      )
    at_least(self.first_block, 0, "sleep.first_block")
    if self.last_block is not None:
      above(self.last_block, self.first_block, "sleep.last_block")
    one_of(self.state, ("carry", "reset"), "sleep.state")
    one_of(self.kept, ("last", "each"), "sleep.kept")
    one_of(self.remat, ("none", "block", "pass", "window"), "sleep.remat")
    one_of(self.loops, ("scan", "unroll"), "sleep.loops")

  def looped(self, num_blocks: int) -> tuple[int, int]:
    """First block that is repeated, and the one behind the last, of a model of `num_blocks` blocks."""
    return self.first_block, num_blocks if self.last_block is None else self.last_block

  @property
  def forward_only(self) -> "SleepConfig":
    """The same sleep where no gradient is taken: nothing to recompute, nothing to truncate."""
    return dataclasses.replace(self, remat="none", backprop_passes=None)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """Muon for the body's matrices, AdamW for everything else.

  The recipe is that of arXiv 2511.07384, which the sleep paper follows: one schedule multiplies both
  learning rates, the global norm is clipped before both, and weight decay is decoupled.

  Attributes:
    muon_lr, adam_lr: peak learning rates.
    muon_momentum: of the exponential average; Nesterov.
    newton_schulz_steps: orthogonalisation steps.
    newton_schulz_dtype: `bfloat16` as the recipe has it, or `float32` (faster on a CPU).
    adam_b1, adam_b2, adam_eps: AdamW's.
    weight_decay: for both groups; a weight declared without decay is left alone.
    clip_norm: global norm of all gradients.
    warmup_steps: linear from 0.
    decay_steps: cosine down to `final_scale` over the last so many steps; 0 for a constant rate.
    final_scale: last multiplier.
    trained: patterns of the names of weights that are trained, as in a shell (`blocks/2/*`). All others are
      frozen: they have no gradient, no optimizer state and no decay.
  """

  muon_lr: float = 2e-3
  adam_lr: float = 5e-5
  muon_momentum: float = 0.95
  newton_schulz_steps: int = 5
  newton_schulz_dtype: str = "bfloat16"
  adam_b1: float = 0.9
  adam_b2: float = 0.95
  adam_eps: float = 1e-10
  weight_decay: float = 1e-4
  clip_norm: float = 1.0
  warmup_steps: int = 0
  decay_steps: int = 0
  final_scale: float = 1e-3
  trained: tuple[str, ...] = ("*",)

  def __post_init__(self):
    for name in ("muon_lr", "adam_lr", "adam_eps", "clip_norm"):
      above(getattr(self, name), 0, f"optim.{name}")
    for name in ("muon_momentum", "adam_b1", "adam_b2"):
      value = getattr(self, name)
      check(0 <= value < 1, f"optim.{name}", f"must lie in [0, 1), got {value}")
    at_least(self.newton_schulz_steps, 1, "optim.newton_schulz_steps")
    one_of(self.newton_schulz_dtype, ("bfloat16", "float32"), "optim.newton_schulz_dtype")
    for name in ("weight_decay", "warmup_steps", "decay_steps", "final_scale"):
      at_least(getattr(self, name), 0, f"optim.{name}")
    check(bool(self.trained), "optim.trained", "must have at least 1 pattern, got none")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The loop.

  Attributes:
    steps: optimizer steps in all.
    batch_size: sequences a step, over all devices.
    microbatches: parts that a batch is cut into. Their gradients are added up, so that the activations of one
      part alone are held; the same step but for rounding.
    steps_per_dispatch: steps that the device runs before the host looks again; data is made inside.
    log_every, eval_every, save_every: in steps.
    eval_sequences: held-out sequences; a fixed set, from a seed of its own.
    eval_batch_size: sequences a device call of the evaluation.
    keep_checkpoints: newest ones that stay.
    init_from: whose weights a new run starts with: a checkpoint's folder or a run's workdir. None: drawn.
    init_ignore: fields of that checkpoint's `config.json` that are known to change nothing.
  """

  steps: int = 100
  batch_size: int = 128
  microbatches: int = 1
  steps_per_dispatch: int = 10
  log_every: int = 10
  eval_every: int = 50
  save_every: int = 100
  eval_sequences: int = 4096
  eval_batch_size: int = 1024
  keep_checkpoints: int = 3
  init_from: str | None = None
  init_ignore: tuple[str, ...] = ()

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if not field.name.startswith("init_"):
        at_least(getattr(self, field.name), 1, f"train.{field.name}")
    check(
      self.batch_size % self.microbatches == 0,
      "train.microbatches",
      f"must divide train.batch_size = {self.batch_size}, got {self.microbatches}",
    )
    check(
      self.eval_sequences % self.eval_batch_size == 0,
      "train.eval_batch_size",
      f"must divide train.eval_sequences = {self.eval_sequences}, got {self.eval_batch_size}",
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices: `data` splits the batch and (FSDP) the weights, `model` splits heads, MLP and vocabulary.

  `data` = -1 takes all devices that `model` leaves.
  """

  data: int = -1
  model: int = 1

  def __post_init__(self):
    check(self.data == -1 or self.data >= 1, "mesh.data", f"must be -1 or at least 1, got {self.data}")
    at_least(self.model, 1, "mesh.model")


@dataclasses.dataclass(frozen=True)
class Config:
  """One run. `data` is the task's own config."""

  data: Any
  model: ModelConfig
  sleep: SleepConfig = SleepConfig()
  optim: OptimConfig = OptimConfig()
  train: TrainConfig = TrainConfig()
  mesh: MeshConfig = MeshConfig()
  seed: int = 0

  def __post_init__(self):
    at_least(self.seed, 0, "seed")
    check_sleep(self.sleep, self.model)


def check_sleep(sleep: SleepConfig, model: ModelConfig) -> None:
  """Raises `ConfigError` if blocks are to be repeated that the model does not have."""
  first, last, count = sleep.first_block, sleep.last_block, len(model.blocks)
  known = f"{count} (the number of model.blocks)"
  check(last is None or last <= count, "sleep.last_block", f"must be at most {known}, got {last}")
  check(first < count, "sleep.first_block", f"must be below {known}, got {first}")
