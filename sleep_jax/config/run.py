"""A run's config: how it sleeps, learns, trains and is spread over devices. A part of `config`."""

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from sleep_jax.config.checks import above, check
from sleep_jax.config.fields import Bounds, Count, Natural, NotNegative, Positive, Seed, check_fields
from sleep_jax.config.model import ModelConfig

Share = Annotated[float, Bounds(least=0, below=1)]
MOST_PASSES_UNROLLED = 256  # each of them is written out in the compiled program


@dataclasses.dataclass(frozen=True)
class SleepConfig:
  """How a full window is consolidated.

  Attributes:
    when: which windows of a training sequence are slept on: `unread`, those without a loss (Algorithm 1 as
      printed), or `always`, every one but the last. A window with a loss is then read awake and slept on
      before it is evicted; the reading is the first of the N passes. Generation always does so.
    num_passes: N, passes over the window; 1 is the plain hybrid.
    backprop_passes: k, gradients flow through the last k passes only. None: through all of them.
    first_block: number of the first block that is repeated; those before it run once (prelude) and write too.
    last_block: number of the first block behind those that are repeated; it and the rest run once (coda) and
      write too. None: there is none, all from `first_block` on are repeated.
    state: what a pass starts from: `carry`, the S that the pass before left, or `reset`, the S that the
      window began with, so that only the last pass's write survives (LT2, arXiv 2605.20670).
    kept: whose keys and values stay under sliding eviction: those of the `last` pass, which all passes
      over the next window see, or of `each`, where pass n sees those of pass n (N caches a looped block).
    spread: K, in generation: the passes of a sleep are made while the next K tokens are read, pass n with
      token ceil(n K / N), so that no token waits for more than one; until then they read the window as if it
      had not ended (`sleep_jax/spread.py`). N <= K < L. None or 0: all passes before the next token.
      Training, where no token waits, does not look at it.
    remat: what is recomputed on the way back; each level includes the ones before it: `none`, `block`
      (keep the input of each block), `pass` (and of each pass), `window` (and S at each window). Or
      `offload`: what each pass began with is kept in the host's memory, so that what the device keeps grows
      neither with the windows nor with N (`sleep_jax/flat.py`, whatever `loops` says); on a CPU, which is its
      own host, all stays where it is.
    loops: `scan` compiles passes and windows once, `unroll` writes them out: same numbers, slower to
      compile, faster to run on a CPU. `flat`: one loop over all passes over all windows, a shorter last one
      filled up with pads, so that each block is compiled once (`sleep_jax/flat.py`).
  """

  PATH: ClassVar[str] = "sleep"

  when: Literal["unread", "always"] = "unread"
  num_passes: Count = 1
  backprop_passes: int | None = None
  first_block: Natural = 0
  last_block: int | None = None
  state: Literal["carry", "reset"] = "carry"
  kept: Literal["last", "each"] = "last"
  spread: Natural | None = None
  remat: Literal["none", "block", "pass", "window", "offload"] = "none"
  loops: Literal["scan", "unroll", "flat"] = "scan"

  def __post_init__(self):
    check_fields(self)
    n, k = self.num_passes, self.backprop_passes
    check(
      k is None or 1 <= k <= n,
      "sleep.backprop_passes",
      f"must lie in 1..{n} (sleep.num_passes), got {k}",
    )
    if self.last_block is not None:
      above(self.last_block, self.first_block, "sleep.last_block")
    if self.spread == 0:
      object.__setattr__(self, "spread", None)
    check(
      self.spread is None or self.spread >= n,
      "sleep.spread",
      f"must be at least sleep.num_passes = {n}, for one pass a token, or 0, got {self.spread}",
    )
    check(
      self.loops != "unroll" or n <= MOST_PASSES_UNROLLED,
      "sleep.num_passes",
      f"must be at most {MOST_PASSES_UNROLLED} where sleep.loops = unroll writes each pass out, got {n}",
    )

    check(
      self.remat != "window" or self.loops != "flat",
      "sleep.remat",
      "must be none, block, pass or offload where sleep.loops = flat, got 'window'",
    )
    if self.flat:
      one_loop = f"all passes are under one loop ({'sleep.loops' if self.loops == 'flat' else 'sleep.remat'})"
      check(self.loops != "unroll", "sleep.loops", f"must be scan or flat, as {one_loop}, got 'unroll'")
      check(k is None or k == n, "sleep.backprop_passes", f"must be None, as {one_loop}, got {k}")

  @property
  def flat(self) -> bool:
    """Whether all passes over all windows are under one loop."""
    return self.loops == "flat" or self.remat == "offload"

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
    muon_lr: Muon's peak learning rate.
    adam_lr: AdamW's peak learning rate.
    muon_momentum: how much of Muon's exponential average a step keeps; Nesterov.
    newton_schulz_steps: orthogonalisation steps.
    newton_schulz_dtype: `bfloat16` as the recipe has it, or `float32`.
    adam_b1: how much of AdamW's average of gradients a step keeps.
    adam_b2: how much of AdamW's average of squared gradients a step keeps.
    adam_eps: AdamW's epsilon.
    weight_decay: for both groups; a weight declared without decay is left alone.
    clip_norm: the most that the global norm of all gradients may be.
    warmup_steps: the learning rates rise from 0 over so many steps.
    warmup_share: the same as a share of `train.steps`; one of the two is 0.
    decay_steps: cosine down to `final_scale` over the last so many steps; 0 for a constant rate.
    decay_share: the same as a share of `train.steps`; one of the two is 0.
    final_scale: what the learning rates are multiplied by at the end.
    average: how much of an exponential moving average of the weights a step keeps; the first steps, t from 1,
      keep at most (1 + t) / (10 + t), so that the start is soon forgotten. Training goes on with the weights
      themselves; evaluations, and whatever reads the run later, take the average. 0: there is none.
    trained: patterns of the names of weights that are trained, as in a shell (`blocks/2/*`). All others are
      frozen: they have no gradient, no optimizer state and no decay.
  """

  PATH: ClassVar[str] = "optim"

  muon_lr: Positive = 2e-3
  adam_lr: Positive = 5e-5
  muon_momentum: Share = 0.95
  newton_schulz_steps: Annotated[int, Bounds(least=1), Bounds(most=100)] = 5
  newton_schulz_dtype: Literal["bfloat16", "float32"] = "bfloat16"
  adam_b1: Share = 0.9
  adam_b2: Share = 0.95
  adam_eps: Positive = 1e-10
  weight_decay: NotNegative = 1e-4
  clip_norm: Positive = 1.0
  warmup_steps: Natural = 0
  warmup_share: Share = 0.0
  decay_steps: Natural = 0
  decay_share: Share = 0.0
  final_scale: NotNegative = 1e-3
  average: Share = 0.0
  trained: tuple[str, ...] = ("*",)

  def __post_init__(self):
    check_fields(self)
    check(bool(self.trained), "optim.trained", "must have at least 1 pattern, got none")
    for what in ("warmup", "decay"):
      steps, share = (getattr(self, f"{what}_{unit}") for unit in ("steps", "share"))
      check(
        not (steps and share),
        f"optim.{what}_share",
        f"must be 0 where optim.{what}_steps = {steps} says the same thing, got {share}",
      )

  @property
  def bound_to_length(self) -> bool:
    """Whether the learning rate of a step depends on `train.steps`: such a run cannot be made longer."""
    return bool(self.warmup_share or self.decay_share or self.decay_steps)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The loop.

  Attributes:
    steps: optimizer steps in all.
    batch_size: sequences a step, over all devices.
    microbatches: parts that a batch is cut into. Their gradients are added up, so that the activations of one
      part alone are held; the same step but for rounding.
    steps_per_dispatch: steps that the device runs before the host looks again; data is made inside.
    log_every: steps from one row of the log to the next.
    eval_every: steps from one evaluation to the next.
    save_every: steps from one checkpoint to the next.
    eval_sequences: held-out sequences; a fixed set, from a seed of its own.
    eval_batch_size: sequences a device call of the evaluation.
    keep_checkpoints: newest ones that stay.
    init_from: whose weights a new run starts with: a checkpoint's folder or a run's workdir. None: drawn.
    init_ignore: dotted names of unknown fields of that checkpoint's `config.json` that change nothing.
    init_digest: which checkpoint that is, wherever it lies (`pretrained.start_digest`). None: computed when
      the run starts. Where it is given, another checkpoint is refused.
  """

  PATH: ClassVar[str] = "train"

  steps: Count = 100
  batch_size: Count = 128
  microbatches: Count = 1
  steps_per_dispatch: Count = 10
  log_every: Count = 10
  eval_every: Count = 50
  save_every: Count = 100
  eval_sequences: Count = 4096
  eval_batch_size: Count = 1024
  keep_checkpoints: Count = 3
  init_from: str | None = None
  init_ignore: tuple[str, ...] = ()
  init_digest: str | None = None

  def __post_init__(self):
    check_fields(self)
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
  """Devices, as a mesh of `data` x `model`.

  Attributes:
    data: devices that split the batch and (FSDP) the weights; -1: all that `model` leaves.
    model: devices that split heads, MLP and vocabulary.
  """

  PATH: ClassVar[str] = "mesh"

  data: int = -1
  model: Count = 1

  def __post_init__(self):
    check_fields(self)
    check(self.data == -1 or self.data >= 1, "mesh.data", f"must be -1 or at least 1, got {self.data}")


@dataclasses.dataclass(frozen=True)
class Config:
  """One run.

  Attributes:
    data: the task's own config.
    model: the model.
    sleep: how it sleeps.
    optim: how it learns.
    train: the loop.
    mesh: the devices.
    seed: of the weights and of the training data. Runs that are compared share it.
  """

  data: Any
  model: ModelConfig
  sleep: SleepConfig = SleepConfig()
  optim: OptimConfig = OptimConfig()
  train: TrainConfig = TrainConfig()
  mesh: MeshConfig = MeshConfig()
  seed: Seed = 0

  def __post_init__(self):
    check_fields(self)
    check_sleep(self.sleep, self.model)


def check_sleep(sleep: SleepConfig, model: ModelConfig) -> None:
  """Raises `ConfigError` where the model lacks the blocks, or reads awake in another way than it sleeps."""
  first, last, count = sleep.first_block, sleep.last_block, len(model.blocks)
  known = f"{count} (the number of model.blocks)"
  check(last is None or last <= count, "sleep.last_block", f"must be at most {known}, got {last}")
  check(first < count, "sleep.first_block", f"must be below {known}, got {first}")
  check(
    sleep.when == "unread" or model.predict_passes == 1,
    "sleep.when",
    f"must be `unread` where model.predict_passes is above 1 (the first pass of a sleep is to be the reading"
    f" awake), got {sleep.when!r} and {model.predict_passes}",
  )
  check(
    not sleep.flat or model.predict_passes == 1,
    "sleep.loops" if sleep.loops == "flat" else "sleep.remat",
    f"one loop over all windows reads awake in one pass, and model.predict_passes is {model.predict_passes}",
  )
  check_spread(sleep, model)


def check_spread(sleep: SleepConfig, model: ModelConfig) -> None:
  """Raises `ConfigError` where a sleep that is spread would not end before the next window is full."""
  check(
    sleep.spread is None or sleep.spread < model.window,
    "sleep.spread",
    f"must be below model.window = {model.window}, or a sleep would not end before the next one begins, got"
    f" {sleep.spread}",
  )
