"""What the model is: blocks, their sizes, and what is kept of a window. Frozen configs that check themselves.

A part of `config`, which names all of this again.
"""

import dataclasses

from sleep_jax.config.schema import ConfigError, above, at_least, check, nearest, one_of

ATTENTION = ("attn", "swa")  # blocks whose memory is a cache of the window; all others have fast weights
_FAST = {"gdn": None, "hebbian": None, "jet": None, "delta": None, "kda": None, "gdn2": None}  # in order


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
    kind: `none`; `linear`: all are divided by `factor`; `llama3`: those of pairs that turn less than `low`
      times in `original` tokens are divided by `factor`, those that turn more than `high` times are not, and
      between the two the share of either goes linearly with the number of turns.
    factor, low, high: as said.
    original: tokens, of the first training.
  """

  kind: str = "none"
  factor: float = 1.0
  low: float = 1.0
  high: float = 4.0
  original: int = 8192

  def __post_init__(self):
    one_of(self.kind, ("none", "linear", "llama3"), "model.attention.rope_scaling.kind")
    at_least(self.factor, 1.0, "model.attention.rope_scaling.factor")
    above(self.low, 0, "model.attention.rope_scaling.low")
    above(self.high, self.low, "model.attention.rope_scaling.high")
    at_least(self.original, 1, "model.attention.rope_scaling.original")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Causal attention inside the window.

  Attributes:
    num_heads: query heads H.
    num_kv_heads: key and value heads; query heads share them in groups. None: as many as `num_heads`.
    head_dim: width of a head. None: `embed_dim / num_heads`, which must divide.
    rope_theta: base of the rotary angles.
    rope_scaling: of these angles.
    qk_norm: RMSNorm on queries and keys, per head.
    bias: added to queries, keys and values.
    out_bias: added to what the output projection gives.
    swa_window: keys that a query of an `swa` block sees, its own included. Needed where there is one.
  """

  num_heads: int = 4
  num_kv_heads: int | None = None
  head_dim: int | None = None
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling = RopeScaling()
  qk_norm: bool = True
  bias: bool = False
  out_bias: bool = False
  swa_window: int | None = None

  def __post_init__(self):
    at_least(self.num_heads, 1, "model.attention.num_heads")
    if self.num_kv_heads is not None:
      at_least(self.num_kv_heads, 1, "model.attention.num_kv_heads")
      check(
        self.num_heads % self.num_kv_heads == 0,
        "model.attention.num_kv_heads",
        f"must divide num_heads = {self.num_heads}, got {self.num_kv_heads}",
      )
    if self.head_dim is not None:
      at_least(self.head_dim, 2, "model.attention.head_dim")
      check(self.head_dim % 2 == 0, "model.attention.head_dim", f"must be even for RoPE, got {self.head_dim}")
    above(self.rope_theta, 0, "model.attention.rope_theta")
    if self.swa_window is not None:
      at_least(self.swa_window, 1, "model.attention.swa_window")


@dataclasses.dataclass(frozen=True)
class FastConfig:
  """The fast-weight layer: everything but the rule, which the block's name gives.

  Attributes:
    num_heads: H.
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
    out_norm_eps: epsilon of the RMSNorm on what is read from the fast weights.
    kernel: backend of `kernels`, by name. None: the fastest measured one for the platform. With
      `pallas_tpu_fused` the short convolution, SiLU, norms and gates of a `gdn` block run inside the kernel.
  """

  num_heads: int = 4
  key_dim: int = 64
  value_dim: int = 64
  conv_size: int = 4
  generator_reduction: int = 8
  conv_context: str = "carry"
  decay_init: tuple[float, float] = (1.0, 16.0)
  out_norm_eps: float = 1e-5
  kernel: str | None = None

  def __post_init__(self):
    for name in ("num_heads", "key_dim", "value_dim"):
      at_least(getattr(self, name), 1, f"model.fast.{name}")
    at_least(self.conv_size, 0, "model.fast.conv_size")
    at_least(self.generator_reduction, 1, "model.fast.generator_reduction")
    one_of(self.conv_context, ("carry", "reset"), "model.fast.conv_context")
    above(self.out_norm_eps, 0, "model.fast.out_norm_eps")
    low, high = self.decay_init
    check(0 < low <= high, "model.fast.decay_init", f"needs 0 < low <= high, got ({low}, {high})")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A hybrid of attention and fast-weight blocks.

  Attributes:
    vocab_size: tokens.
    embed_dim: D.
    mlp_dim: hidden width of the SwiGLU MLP. None: 2 D.
    mlp_bias: added to what each of its three projections gives.
    blocks: the mixer of each block, from first to last: `attn`, attention to the last few tokens (`swa`), or
      a rule by which fast weights are written (`gdn`, `hebbian`, `jet`, `delta`, `kda`, `gdn2`, or one that
      was given to `rules.register`).
    without_mlp: numbers of blocks that are a mixer behind its norm and no more: a memory added to a
      pretrained model.
    window: L, tokens that attention holds before they are consolidated and evicted.
    eviction: `hard`: the whole window goes. `sliding`: the newest L - 1 tokens stay in the cache, and every
      token sees the newest L, itself included.
    embed_std: standard deviation of the embedding at the start. Loops train soonest with 1.0.
    norm_eps: epsilon of the RMSNorms on the residual stream.
    norm_placement: `pre`: of what a mixer or MLP reads; `sandwich`: of what it adds, too.
    norm_cast: when an RMSNorm rounds to the activation dtype: `last`, after the product with its weight, or
      `first`, before it.
    loop_norm: the final norm after every pass; the next pass reads what it gives.
    tied_embeddings: the head is the embedding, transposed.
    predict_passes: passes over the blocks when awake; 1 unless the model was trained as a looped one.
    pass_cache: with several passes awake, `own`: each attends to its own keys; `shared`: one cache, which
      holds what the last pass left, and a token's own pass sees only its own keys beside it.
    exit_gate: a gate that says after each pass awake how likely a token leaves there.
    exit_threshold: a token leaves after the first pass at which the exit probabilities sum up to this.
      None: after the last one.
    dtype: of activations, `float32` or `bfloat16`. S, gates, norms and logits are float32 always.
  """

  vocab_size: int
  embed_dim: int = 256
  mlp_dim: int | None = None
  mlp_bias: bool = False
  blocks: tuple[str, ...] = ("attn", "gdn", "attn", "gdn")
  without_mlp: tuple[int, ...] = ()
  window: int = 24
  eviction: str = "hard"
  embed_std: float = 1.0
  norm_eps: float = 1e-6
  norm_placement: str = "pre"
  norm_cast: str = "last"
  loop_norm: bool = False
  tied_embeddings: bool = False
  predict_passes: int = 1
  pass_cache: str = "own"
  exit_gate: bool = False
  exit_threshold: float | None = None
  dtype: str = "float32"
  attention: AttentionConfig = AttentionConfig()
  fast: FastConfig = FastConfig()

  def __post_init__(self):
    at_least(self.vocab_size, 1, "model.vocab_size")
    at_least(self.embed_dim, 1, "model.embed_dim")
    if self.mlp_dim is not None:
      at_least(self.mlp_dim, 1, "model.mlp_dim")
    at_least(len(self.blocks), 1, "model.blocks")
    for i, kind in enumerate(self.blocks):
      if kind not in (known := block_names()):
        raise ConfigError(f"model.blocks[{i}]: unknown block {kind!r}; {nearest(kind, known)}")
    at_least(self.window, 1, "model.window")
    one_of(self.eviction, ("hard", "sliding"), "model.eviction")
    above(self.embed_std, 0, "model.embed_std")
    above(self.norm_eps, 0, "model.norm_eps")
    one_of(self.dtype, ("float32", "bfloat16"), "model.dtype")
    one_of(self.norm_placement, ("pre", "sandwich"), "model.norm_placement")
    one_of(self.norm_cast, ("last", "first"), "model.norm_cast")
    for i in self.without_mlp:
      last = len(self.blocks) - 1
      check(0 <= i <= last, "model.without_mlp", f"must be numbers of blocks, 0..{last}, got {i}")
    self._check_passes()
    if "swa" in self.blocks:
      near = self.attention.swa_window
      check(near is not None, "model.attention.swa_window", "is required where model.blocks has `swa`")
      check(
        self.window >= near,
        "model.window",
        f"must be at least model.attention.swa_window = {near}, got {self.window}",
      )
    if "jet" in self.blocks:
      check(
        self.fast.conv_size >= 1, "model.fast.conv_size", "must be at least 1 where model.blocks has `jet`"
      )
      width, divisor = self.fast.num_heads * self.fast.value_dim, self.fast.generator_reduction
      check(
        divisor <= width,
        "model.fast.generator_reduction",
        f"must be at most {width} (num_heads * value_dim), got {divisor}",
      )
    if set(self.blocks) & set(ATTENTION) and self.attention.head_dim is None:
      heads = self.attention.num_heads
      check(
        self.embed_dim % heads == 0,
        "model.embed_dim",
        f"must be a multiple of model.attention.num_heads = {heads} (or set head_dim), got {self.embed_dim}",
      )
      check(
        self.embed_dim // heads % 2 == 0,
        "model.attention.head_dim",
        f"must be even for RoPE, got {self.embed_dim} / {heads}",
      )

  def _check_passes(self) -> None:
    at_least(self.predict_passes, 1, "model.predict_passes")
    one_of(self.pass_cache, ("own", "shared"), "model.pass_cache")
    memory = [kind for kind in self.blocks if kind not in ATTENTION]
    check(
      self.predict_passes == 1 or not memory,
      "model.predict_passes",
      f"must be 1 beside fast weights ({', '.join(dict.fromkeys(memory))}): in a second pass awake a token"
      f" would read what later tokens wrote in the first; got {self.predict_passes}",
    )
    check(
      self.predict_passes == 1 or self.eviction == "hard",
      "model.predict_passes",
      f"must be 1 under sliding eviction, which keeps one pass awake; got {self.predict_passes}",
    )
    if self.exit_threshold is not None:
      check(self.exit_gate, "model.exit_threshold", "needs model.exit_gate")
      check(
        0 < self.exit_threshold <= 1,
        "model.exit_threshold",
        f"must lie in (0, 1] or be left out, got {self.exit_threshold}",
      )

  @property
  def head_dim(self) -> int:
    """Width of an attention head."""
    return self.attention.head_dim or self.embed_dim // self.attention.num_heads

  @property
  def num_kv_heads(self) -> int:
    """Key and value heads of attention."""
    return self.attention.num_kv_heads or self.attention.num_heads
