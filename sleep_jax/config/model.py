"""What the model is: blocks, their sizes, and what is kept of a window. Frozen configs that check themselves.

A part of `config`, which names all of this again.
"""

import dataclasses
from typing import Annotated, ClassVar, Literal

from sleep_jax.config.checks import ConfigError, above, at_least, check, nearest, one_of, shown
from sleep_jax.config.fields import Bounds, Count, Natural, Positive, check_fields

ATTENTION = (
  "attn",
  "swa",
  "nope",
)  # blocks whose memory is a cache of the window; all others have fast weights
_FAST = {"gdn": None, "hebbian": None, "jet": None, "delta": None, "kda": None, "gdn2": None}  # in order
ATTENTION_FORMS = ("dense", "blocked", "cudnn", "splash")
MOST_BLOCKS = 4096  # each of them is declared and traced by itself
MOST_PASSES_AWAKE = 64  # each of them is written out in the compiled program


def block_names() -> tuple[str, ...]:
  """Every block that `model.blocks` can name."""
  return (*ATTENTION, *_FAST)


def register_block(name: str) -> None:
  """Makes `name` known as a fast-weight block; `rules.register` calls this for a rule of the user's."""
  _FAST[name] = None


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary angles are stretched for contexts longer than those trained on first.

  Attributes:
    kind: `none`; `linear`: all angles are divided by `factor`; `llama3`: those of pairs that turn less than
      `low` times in `original` tokens are divided by `factor`, those of pairs that turn more than `high`
      times stay, and between the two the share of either goes linearly with the number of turns.
    factor: by which angles are divided.
    low: turns in `original` tokens below which an angle is divided by all of `factor`.
    high: turns in `original` tokens above which an angle stays.
    original: tokens of a sequence in the first training.
  """

  PATH: ClassVar[str] = "model.attention.rope_scaling"

  kind: Literal["none", "linear", "llama3"] = "none"
  factor: Annotated[float, Bounds(least=1.0)] = 1.0
  low: Positive = 1.0
  high: float = 4.0
  original: Count = 8192

  def __post_init__(self):
    check_fields(self)
    above(self.high, self.low, f"{self.PATH}.high")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Causal attention inside the window.

  Attributes:
    num_heads: query heads H.
    num_kv_heads: key and value heads; query heads share them in groups. None: as many as `num_heads`.
    head_dim: width of a head. None: `embed_dim / num_heads`, which must divide.
    rope_theta: base of the rotary angles.
    rope_scaling: how the rotary angles are stretched.
    rotary_dim: channels of a head that rotary angles turn, from the first on. None: all.
    qk_norm: RMSNorm on queries and keys.
    qk_norm_over: what this norm takes the mean of: the channels of each `head` alone, or of `all` heads.
    gate: each channel that a head gives is multiplied by the sigmoid of a gate, which the projection of
      queries makes beside them.
    bias: added to queries, keys and values.
    out_bias: added to what the output projection gives.
    latent_dim: keys and values are made from a normed vector of so many channels, one a token (multi-head
      latent attention, arXiv 2405.04434), and each head has its own. Blocks of attention must then be `nope`.
      None: they are made from the input.
    shared_dim: with a latent, the last channels of every key: all heads have the same, made from the input.
    value_dim: with a latent, width of a value; at most `head_dim`. None: `head_dim`.
    latent_norm_eps: epsilon of the latent's RMSNorm.
    swa_window: keys that a query of an `swa` block sees, its own included. Needed where there is one.
    implementation: the form in which scores and values are computed: `dense`, all scores of a window at once;
      `blocked`, a block at a time; `cudnn` on CUDA, `splash` on TPUs. None: chosen for window and platform.
      Pieces of an open window, awake, are read by one of the first two in any case.
  """

  PATH: ClassVar[str] = "model.attention"

  num_heads: Count = 4
  num_kv_heads: Count | None = None
  head_dim: Annotated[int, Bounds(least=2)] | None = None
  rope_theta: Positive = 10_000.0
  rope_scaling: RopeScaling = RopeScaling()
  rotary_dim: Annotated[int, Bounds(least=2)] | None = None
  qk_norm: bool = True
  qk_norm_over: Literal["head", "all"] = "head"
  gate: bool = False
  bias: bool = False
  out_bias: bool = False
  latent_dim: Count | None = None
  shared_dim: Natural = 0
  value_dim: Count | None = None
  latent_norm_eps: Positive = 1e-6
  swa_window: Count | None = None
  implementation: str | None = None

  def __post_init__(self):
    check_fields(self)
    if self.implementation is not None:
      one_of(self.implementation, ATTENTION_FORMS, f"{self.PATH}.implementation")
    kv_heads, width = self.num_kv_heads, self.head_dim
    check(
      kv_heads is None or self.num_heads % kv_heads == 0,
      f"{self.PATH}.num_kv_heads",
      f"must divide num_heads = {self.num_heads}, got {kv_heads}",
    )
    self._check_latent()
    even = width is None or width % 2 == 0 or self.latent_dim is not None  # a latent has no rotary angles
    check(even, f"{self.PATH}.head_dim", f"must be even for RoPE, got {width}")
    turned = self.rotary_dim
    check(turned is None or turned % 2 == 0, f"{self.PATH}.rotary_dim", f"must be even, got {turned}")

  def _check_latent(self) -> None:
    if self.latent_dim is None:
      for name in ("shared_dim", "value_dim"):
        check(not getattr(self, name), f"{self.PATH}.{name}", f"needs {self.PATH}.latent_dim")
      return
    heads = self.num_kv_heads
    check(
      heads in (None, self.num_heads),
      f"{self.PATH}.num_kv_heads",
      f"must be num_heads = {self.num_heads} with a latent, got {heads}",
    )
    for name in ("qk_norm", "gate", "bias"):
      check(not getattr(self, name), f"{self.PATH}.{name}", "must be False with a latent (latent_dim)")


@dataclasses.dataclass(frozen=True)
class FastConfig:
  """The fast-weight layer: everything but the rule, which the block's name gives.

  Attributes:
    num_heads: H.
    num_key_heads: heads of queries and keys; neighbouring heads of values share one. None: H.
    key_dim: K, width of a key and query of one head.
    value_dim: V, width of a value of one head.
    conv_size: taps of the short causal convolution on q, k and v; 0 for none. In a `jet` block, taps of the
      dynamic convolution on v; at least 1.
    generator_reduction: a `jet` block generates its taps through a layer of num_heads * value_dim divided
      by this.
    conv_context: what of the convolution survives eviction. `carry`: its last `conv_size - 1` inputs,
      as part of the recurrent state, so that a window's first tokens see the last ones of the window
      before. `reset`: nothing, so that S alone crosses the border (strict eviction).
    decay_init: range (low, high) from which exp(A_log) is drawn evenly; the decay of a token is
      exp(-exp(A_log) * softplus(.)). The usual (1, 16) forgets a window of a few dozen tokens
      within N passes; (1/16, 1) keeps it.
    write_most: what b, the strength of a write, may be at most: b = write_most * sigmoid(.). With 2, a token
      can turn over what S holds under its key (negative eigenvalues, arXiv 2411.12537).
    out_norm_eps: epsilon of the RMSNorm on what is read from the fast weights.
    kernel: backend of `kernels`, by name. None: the fastest measured one for the platform. With
      `pallas_tpu_fused` the short convolution, SiLU, norms and gates of a `gdn` block run inside the kernel.
  """

  PATH: ClassVar[str] = "model.fast"

  num_heads: Count = 4
  key_dim: Count = 64
  value_dim: Count = 64
  conv_size: Natural = 4
  generator_reduction: Count = 8
  conv_context: Literal["carry", "reset"] = "carry"
  decay_init: tuple[float, float] = (1.0, 16.0)
  out_norm_eps: Positive = 1e-5
  kernel: str | None = None
  num_key_heads: Count | None = None
  write_most: Positive = 1.0

  def __post_init__(self):
    check_fields(self)
    low, high = self.decay_init
    check(0 < low <= high, f"{self.PATH}.decay_init", f"needs 0 < low <= high, got ({low}, {high})")
    few = self.num_key_heads
    check(
      few is None or self.num_heads % few == 0,
      f"{self.PATH}.num_key_heads",
      f"must divide num_heads = {self.num_heads}, got {few}",
    )
    check(
      self.write_most == 1 or self.kernel != "pallas_tpu_fused",
      f"{self.PATH}.write_most",
      f"must be 1 with kernel = pallas_tpu_fused, got {self.write_most}",
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A hybrid of attention and fast-weight blocks.

  Attributes:
    vocab_size: tokens.
    embed_dim: D.
    mlp_dim: hidden width of the SwiGLU MLP. None: 2 D.
    mlp_bias: added to what each of its three projections gives.
    blocks: the mixer of each block, from first to last: `attn`, attention to the last few tokens (`swa`) or
      without rotary angles (`nope`), or
      a rule by which fast weights are written (`gdn`, `hebbian`, `jet`, `delta`, `kda`, `gdn2`, or one that
      was given to `rules.register`).
    without_mlp: numbers of blocks that are a mixer behind its norm and no more: a memory added to a
      pretrained model.
    window: L, tokens that attention holds before they are consolidated and evicted.
    eviction: `hard`: the whole window goes. `sliding`: the newest L - 1 tokens stay in the cache, and every
      token sees the newest L, itself included.
    embed_std: standard deviation of the embedding at the start. Loops train soonest with 1.0.
    embed_norm: an RMSNorm on the embedding, in front of the first block.
    residual_scale: factor of all that mixers and MLPs add to the residual stream.
    norm_eps: epsilon of the RMSNorms on the residual stream.
    norm_placement: `pre`: a norm on what a mixer or MLP reads; `sandwich`: also one on what it adds;
      `after_attention`: in attention blocks one on what they add alone, other blocks as with `pre`.
    norm_cast: when an RMSNorm rounds to the activation dtype: `last`, after the product with its weight, or
      `first`, before it.
    norm_zero_centered: a norm multiplies by 1 + its weight.
    loop_norm: the final norm after every pass; the next pass reads what it gives.
    tied_embeddings: the head is the embedding, transposed.
    predict_passes: passes over the blocks when awake; 1 unless the model was trained as a looped one.
    pass_cache: with several passes awake, `own`: each attends to its own keys; `shared`: one cache, which
      holds what the last pass left, and a token's own pass sees only its own keys beside it.
    exit_gate: a gate that says after each pass awake how likely a token leaves there.
    exit_threshold: a token leaves after the first pass at which the exit probabilities sum up to this.
      None: after the last one.
    dtype: of activations, `float32` or `bfloat16`. S, gates, norms and logits are float32 always.
    matmul_dtype: `bfloat16`: products with the weights of projections, MLPs and the head round their operands
      to it and add up in float32, whatever `dtype` is; a single token's are not rounded. Faster on a CPU that
      has instructions for it (AMX), and what a TPU does by itself. `same`: operands keep their dtype.
    attention: the attention blocks.
    fast: the fast-weight blocks.
  """

  PATH: ClassVar[str] = "model"

  vocab_size: Count
  embed_dim: Count = 256
  mlp_dim: Count | None = None
  mlp_bias: bool = False
  blocks: tuple[str, ...] = ("attn", "gdn", "attn", "gdn")
  without_mlp: tuple[int, ...] = ()
  window: Count = 24
  eviction: Literal["hard", "sliding"] = "hard"
  embed_std: Positive = 1.0
  embed_norm: bool = False
  residual_scale: Positive = 1.0
  norm_eps: Positive = 1e-6
  norm_placement: Literal["pre", "sandwich", "after_attention"] = "pre"
  norm_cast: Literal["last", "first"] = "last"
  norm_zero_centered: bool = False
  loop_norm: bool = False
  tied_embeddings: bool = False
  predict_passes: Annotated[int, Bounds(least=1), Bounds(most=MOST_PASSES_AWAKE)] = 1
  pass_cache: Literal["own", "shared"] = "own"
  exit_gate: bool = False
  exit_threshold: float | None = None
  dtype: Literal["float32", "bfloat16"] = "float32"
  matmul_dtype: Literal["same", "bfloat16"] = "same"
  attention: AttentionConfig = AttentionConfig()
  fast: FastConfig = FastConfig()

  def __post_init__(self):
    check_fields(self)
    self._check_blocks()
    self._check_passes()
    if set(self.blocks) & set(ATTENTION):
      self._check_heads()

  def _check_blocks(self) -> None:
    at_least(len(self.blocks), 1, "model.blocks")
    check(len(self.blocks) <= MOST_BLOCKS, "model.blocks", f"must be at most {MOST_BLOCKS}")
    known = block_names()
    for i, kind in enumerate(self.blocks):
      if kind not in known:
        raise ConfigError(f"model.blocks[{i}]: unknown block {shown(kind)}; {nearest(kind, known)}")
    last = len(self.blocks) - 1
    for i in self.without_mlp:
      check(0 <= i <= last, "model.without_mlp", f"must be numbers of blocks, 0..{last}, got {i}")
    if "swa" in self.blocks:
      reach = self.attention.swa_window
      if reach is None:
        raise ConfigError("model.attention.swa_window: is required where model.blocks has `swa`")
      check(
        self.window >= reach,
        "model.window",
        f"must be at least model.attention.swa_window = {reach}, got {self.window}",
      )
    if "jet" in self.blocks:
      at_least_one = "must be at least 1 where model.blocks has `jet`"
      check(self.fast.conv_size >= 1, "model.fast.conv_size", at_least_one)
      width, divisor = self.fast.num_heads * self.fast.value_dim, self.fast.generator_reduction
      check(
        divisor <= width,
        "model.fast.generator_reduction",
        f"must be at most {width} (num_heads * value_dim), got {divisor}",
      )

  def _check_heads(self) -> None:
    width, heads, turned = self.embed_dim, self.attention.num_heads, self.attention.rotary_dim
    if self.attention.head_dim is None:
      check(
        width % heads == 0,
        "model.embed_dim",
        f"must be a multiple of model.attention.num_heads = {heads} (or set head_dim), got {width}",
      )
      check(
        width // heads % 2 == 0, "model.attention.head_dim", f"must be even for RoPE, got {width} / {heads}"
      )
    check(
      turned is None or turned <= self.head_dim,
      "model.attention.rotary_dim",
      f"must be at most {self.head_dim} (head_dim), got {turned}",
    )
    if self.attention.latent_dim is not None:
      self._check_latent()

  def _check_latent(self) -> None:
    for i, kind in enumerate(self.blocks):
      latent = "with a latent (model.attention.latent_dim)"
      check(
        kind not in ATTENTION or kind == "nope",
        f"model.blocks[{i}]",
        f"must be 'nope' {latent}, got {kind!r}",
      )
    shared, value = self.attention.shared_dim, self.value_dim
    check(
      shared < self.head_dim,
      "model.attention.shared_dim",
      f"must be below {self.head_dim} (head_dim), got {shared}",
    )
    check(
      value <= self.head_dim,
      "model.attention.value_dim",
      f"must be at most {self.head_dim} (head_dim), got {value}",
    )

  def _check_passes(self) -> None:
    passes, threshold = self.predict_passes, self.exit_threshold
    memory = [kind for kind in self.blocks if kind not in ATTENTION]
    check(
      passes == 1 or not memory,
      "model.predict_passes",
      f"must be 1 beside fast weights ({', '.join(dict.fromkeys(memory))}): in a second pass awake a token"
      f" would read what later tokens wrote in the first; got {passes}",
    )
    check(
      passes == 1 or self.eviction == "hard",
      "model.predict_passes",
      f"must be 1 under sliding eviction, which keeps one pass awake; got {passes}",
    )
    check(threshold is None or self.exit_gate, "model.exit_threshold", "needs model.exit_gate")
    check(
      threshold is None or 0 < threshold <= 1,
      "model.exit_threshold",
      f"must lie in (0, 1] or be left out, got {threshold}",
    )

  @property
  def rounded(self) -> str | None:
    """The dtype to which products with weights round their operands (`products.dense`); None: they do not."""
    return None if self.matmul_dtype == "same" else self.matmul_dtype

  @property
  def head_dim(self) -> int:
    """Width of an attention head."""
    return self.attention.head_dim or self.embed_dim // self.attention.num_heads

  @property
  def value_dim(self) -> int:
    """Width of a value of an attention head."""
    return self.attention.value_dim or self.head_dim

  @property
  def num_kv_heads(self) -> int:
    """Key and value heads of attention."""
    return self.attention.num_kv_heads or self.attention.num_heads
