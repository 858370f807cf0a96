"""The fast-weight layer: projections, gates and one call to the rule that writes S.

A *rule* is how S is written (`rules.Rule`). The layer around it is that of Gated DeltaNet (arXiv
2412.06464), so that a comparison of rules compares rules; `jet` alone convolves otherwise, as Jet-Nemotron's
blocks do. Rules with other gates have those of their papers: `delta` (arXiv 2406.06484) no g; `kda` (arXiv
2510.26692) a g per key channel `[B, T, H, K]`, made through a narrow layer, as is the gate on what is read;
`gdn2` (arXiv 2605.22791) that and, in place of b, gates on erasing e `[B, T, H, K]` and on writing w `[B, T,
H, V]`.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp

from sleep_jax import config, layers, params, products, sharding
from sleep_jax.config import FastConfig, ModelConfig
from sleep_jax.kernels.common import dispatch, pads
from sleep_jax.rules import RULES, Rule


@flax.struct.dataclass
class FastWeights:
  """What a fast-weight layer keeps when its window is evicted.

  Attributes:
    S: fast weights [B, H, K, V], float32.
    context: the last c - 1 inputs of the short convolutions on q, k and v, [B, c-1, H, K + K + V], or of
      the dynamic one on v, [B, c-1, H, V], in the activation dtype; None without a convolution.
  """

  S: jax.Array
  context: jax.Array | None = None


def declare(cfg: ModelConfig, kind: str = "gdn") -> dict[str, params.Weight]:
  """The weights of one fast-weight mixer.

  A dynamic convolution (`Rule.conv`) leaves q and k alone and gives v taps of each token's own,
  silu(x W_1) W_2 + b_2. At the start W_2 is small and b_2 passes the current token on: with both
  matrices zero, as they are published, neither would ever get a gradient.
  """
  d, fast, rule = cfg.embed_dim, cfg.fast, RULES[kind]
  heads, key, value, taps = fast.num_heads, fast.key_dim, fast.value_dim, fast.conv_size
  few = fast.num_key_heads or heads
  into = ("w_embed", "heads", "head_dim")
  weights = {
    "q": params.matrix(d, few, key, axes=into),
    "k": params.matrix(d, few, key, axes=into),
    "v": params.matrix(d, heads, value, axes=into),
    "o": params.matrix(heads, value, d, axes=("heads", "head_dim", "w_embed"), num_in=2),
    "out_norm": params.scale(value),
  } | _declare_gates(cfg, rule)
  if rule.conv == "dynamic":
    hidden = heads * value // fast.generator_reduction
    to_taps = (None, "heads", "head_dim", None)
    weights |= {
      "conv_w1": params.matrix(d, hidden, axes=("w_embed", None)),
      "conv_w2": params.Weight((hidden, heads, value, taps), to_taps, params.normal(0.02), group="muon"),
      "conv_b2": params.Weight((heads, value, taps), to_taps[1:], _last_tap, decay=False),
    }
  elif taps:
    conv = (None, "heads", "head_dim")
    for name, count, width in (("q", few, key), ("k", few, key), ("v", heads, value)):
      weights[f"{name}_conv"] = params.Weight((taps, count, width), conv, params.normal(taps**-0.5))
  return weights


def _declare_gates(cfg: ModelConfig, rule: Rule) -> dict[str, params.Weight]:
  """The weights of decay, writing and of the gate on the read; narrow layers are as wide as a value."""
  d, fast = cfg.embed_dim, cfg.fast
  heads, key, value = fast.num_heads, fast.key_dim, fast.value_dim
  into, per_head = ("w_embed", "heads", "head_dim"), ("w_embed", "heads")
  narrow, widen = ("w_embed", None), (None, "heads", "head_dim")
  scalar = params.Weight((d, heads), per_head, params.normal(d**-0.5))
  A_log = params.Weight((heads,), ("heads",), _log_uniform(fast.decay_init), decay=False)
  weights: dict[str, params.Weight] = {}
  if rule.decay == "channel":
    weights |= {
      "f_a": params.matrix(d, value, axes=narrow),
      "f_b": params.matrix(value, heads, key, axes=widen),
      "A_log": A_log,
      "dt_bias": params.Weight((heads, key), widen[1:], _softplus_inverse_of_step, decay=False),
    }
  elif rule.decay == "head":
    dt_bias = params.Weight((heads,), ("heads",), _softplus_inverse_of_step, decay=False)
    weights |= {"a": scalar, "A_log": A_log, "dt_bias": dt_bias}
  if rule.write == "channel":
    weights |= {
      "e": params.matrix(d, heads, key, axes=into),
      "w": params.matrix(d, heads, value, axes=into),
    }
  else:
    weights["b"] = scalar
  if rule.narrow_gate:
    weights |= {
      "gate_a": params.matrix(d, value, axes=narrow),
      "gate_b": params.matrix(value, heads, value, axes=widen),
    }
  else:
    weights["gate"] = params.matrix(d, heads, value, axes=into)
  if rule.gate_bias:
    weights["gate_bias"] = params.bias(heads, value, axes=widen[1:])
  return weights


def init_state(cfg: ModelConfig, batch: int, kind: str = "gdn") -> FastWeights:
  """The state at the start of a sequence: all zero."""
  fast, per_head = cfg.fast, ("heads", "head_dim")
  S = jnp.zeros((batch, fast.num_heads, fast.key_dim, fast.value_dim), jnp.float32)
  S = sharding.constrain(S, ("batch", *per_head, "head_dim"))
  if not fast.conv_size:
    return FastWeights(S)
  width = fast.value_dim if RULES[kind].conv == "dynamic" else 2 * fast.key_dim + fast.value_dim
  context = jnp.zeros((batch, fast.conv_size - 1, fast.num_heads, width), cfg.dtype)
  return FastWeights(S, sharding.constrain(context, ("batch", "seq", *per_head)))


def open_window(state: FastWeights, cfg: ModelConfig) -> FastWeights:
  """The state with which a new window begins; `fast.conv_context` says what is left of the convolution."""
  if cfg.fast.conv_context == "carry" or not cfg.fast.conv_size:
    return state
  return rewind(state, jax.tree.map(jnp.zeros_like, state))


def rewind(state: FastWeights, start: FastWeights) -> FastWeights:
  """Back to the start of the window, with the S written so far.

  Every pass over a window reads the same tokens after the same tokens: a pass does not see
  the end of the window as what came before its beginning.
  """
  return dataclasses.replace(start, S=state.S)


def check_kernel(fast: FastConfig) -> None:
  """Raises `ConfigError` if `fast.kernel` names an implementation that the platform does not have.

  The platform is that of the mesh that is set, else of this machine.
  """
  if fast.kernel is not None:
    config.one_of(fast.kernel, dispatch.known(), "model.fast.kernel")


def fast_weights(
  weights: dict[str, jax.Array],
  x: jax.Array,
  state: FastWeights,
  cfg: ModelConfig,
  rule: Rule,
  *,
  valid: jax.Array | None = None,
  apart: bool = False,
) -> tuple[jax.Array, FastWeights]:
  """Reads and writes the fast weights. Equivalent to one token at a time; computed in chunks.

  Args:
    weights: as declared for `rule`.
    x: [B, T, D].
    state: on entry.
    rule: how S is written, a value of `rules.RULES`.
    valid: [B, T] bool, False for pads, which write nothing. None: all valid.
    apart: as for `products.dense_each`.

  Returns:
    [B, T, D] in x's dtype, and the state after the last token.
  """
  x = layers.without_pads(x, valid)
  fast = cfg.fast
  others = {} if rule.narrow_gate else {"gate": fast.value_dim}
  if rule.write == "channel":
    others |= {"e": fast.key_dim, "w": fast.value_dim}
  rounded = None if apart else cfg.rounded
  q, k, v, *parts = _projected(weights, x, ("q", "k", "v", *others), fast, apart, rounded)
  projected = dict(zip(others, parts, strict=True))
  fused = rule.fused.get(fast.kernel) if fast.kernel and fast.conv_size > 1 else None
  if fused is not None:
    qkv, taps = jnp.concatenate([q, k, v], axis=-1), jnp.concatenate(_taps(weights, fast), axis=-1)
    steps = _scalars(weights, x, rule)
    gates = steps["a"], steps["b"], weights["A_log"], weights["dt_bias"]
    o, S, context = fused(qkv, taps, state.context, *gates, state.S, mask=valid, implementation=fast.kernel)
  else:
    q, k, v, context = _convolved(weights, x, q, k, v, state, cfg, rule, valid)
    gates = _gates(weights, x, projected, fast, rule)
    o, S = rule.update(q, k, v, *gates, state.S, mask=valid, implementation=fast.kernel)
  o = layers.rms_norm(o.astype(jnp.float32), weights["out_norm"], fast.out_norm_eps)
  gate = _through(weights, "gate", x) if rule.narrow_gate else projected["gate"]
  if rule.gate_bias:
    gate = gate + weights["gate_bias"].astype(x.dtype)
  o = (o * rule.read_gate(gate.astype(jnp.float32))).astype(x.dtype)
  out = products.dense(o, weights["o"], ("batch", "seq", "embed"), num_in=2, rounded=rounded)
  return out, FastWeights(S, context)


def _projected(
  weights: dict[str, jax.Array],
  x: jax.Array,
  names: tuple[str, ...],
  fast: FastConfig,
  apart: bool,
  rounded: str | None,
) -> list[jax.Array]:
  """q, k, v and the others of `names`, each [B, T, H, K or V].

  With fewer heads of queries and keys each of them is there several times, for the heads that it serves.
  """
  groups = _groups(fast)
  several = functools.partial(
    products.dense_each, x, axes=("batch", "seq", "heads", "head_dim"), apart=apart, rounded=rounded
  )
  if groups == 1:
    return several([weights[name] for name in names])
  few, rest = (several([weights[name] for name in some]) for some in (names[:2], names[2:]))
  return [*(layers.repeated(part, groups) for part in few), *rest]


def _taps(weights: dict[str, jax.Array], fast: FastConfig) -> list[jax.Array]:
  """The taps of the short convolutions on q, k and v: [c, H, K or V] each."""
  groups, axes = _groups(fast), (None, "heads", "head_dim")
  q, k = (
    weights[name] if groups == 1 else layers.repeated(weights[name], groups, axes)
    for name in ("q_conv", "k_conv")
  )
  return [q, k, weights["v_conv"]]


def _groups(fast: FastConfig) -> int:
  """Heads of values that a head of queries and keys serves."""
  return fast.num_heads // (fast.num_key_heads or fast.num_heads)


def _convolved(
  weights: dict[str, jax.Array],
  x: jax.Array,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  state: FastWeights,
  cfg: ModelConfig,
  rule: Rule,
  valid: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
  """q, k, v [B, T, H, K or V] as the rule takes them, and the context of the next convolution.

  Pads in front of the tokens are not there for the convolution: the first token's has the context before it.
  """
  fast = cfg.fast
  context = state.context
  if context is None:  # no convolution
    pass
  elif rule.conv == "dynamic":
    context, v = _next_to(context, v, valid)
    v, context = layers.dynamic_conv(v, _generated_taps(weights, x), context)
  else:
    split = jnp.split(context, [fast.key_dim, 2 * fast.key_dim], axis=-1)
    before, (q, k, v) = zip(
      *(_next_to(*pair, valid) for pair in zip(split, (q, k, v), strict=True)), strict=True
    )
    (q, k, v), contexts = zip(*map(layers.short_conv, (q, k, v), _taps(weights, fast), before), strict=True)
    context = jnp.concatenate(contexts, axis=-1)
  q, k, v = (layers.silu(y) for y in (q, k, v))
  return layers.l2_normalize(q) * fast.key_dim**-0.5, layers.l2_normalize(k), v, context


def _next_to(context: jax.Array, x: jax.Array, valid: jax.Array | None) -> tuple[jax.Array, jax.Array]:
  """`pads.next_to`, where there may be pads."""
  return (context, x) if valid is None else pads.next_to(context, x, valid)


def _gates(
  weights: dict[str, jax.Array],
  x: jax.Array,
  projected: dict[str, jax.Array],
  fast: FastConfig,
  rule: Rule,
) -> tuple[jax.Array, ...]:
  """The rule's gates, in its order, float32: the log decay g, if it decays; then b, or e and w.

  Args:
    projected: e and w [B, T, H, K or V] before their sigmoid, if the rule has these.
  """
  steps = _scalars(weights, x, rule)
  if rule.write == "channel":
    writes = tuple(jax.nn.sigmoid(projected[name].astype(jnp.float32)) for name in ("e", "w"))
  else:
    b = jax.nn.sigmoid(steps["b"])
    writes = (b if fast.write_most == 1 else fast.write_most * b,)
  if rule.decay == "none":
    return writes
  A = jnp.exp(weights["A_log"])
  if rule.decay == "channel":
    A, step = A[:, None], _through(weights, "f", x.astype(jnp.float32))
  else:
    step = steps["a"]
  return -A * jax.nn.softplus(step + weights["dt_bias"]), *writes


def _scalars(weights: dict[str, jax.Array], x: jax.Array, rule: Rule) -> dict[str, jax.Array]:
  """Per-head gate projections `a` and `b`, if the rule has them: [B, T, H] float32."""
  names = [name for name, needed in (("a", rule.decay == "head"), ("b", rule.write == "scalar")) if needed]
  if not names:
    return {}
  stacked = jnp.stack([weights[name] for name in names], axis=1)  # [D, 1 or 2, H]
  both = products.dense(x.astype(jnp.float32), stacked, ("batch", "seq", None, "heads"))
  return dict(zip(names, jnp.moveaxis(both, 2, 0), strict=True))


def _through(weights: dict[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
  """x through a narrow layer, no wider than a head: [B, T, H, K or V] in x's dtype."""
  hidden = products.dense(x, weights[f"{name}_a"], ("batch", "seq", None))
  return products.dense(hidden, weights[f"{name}_b"], ("batch", "seq", "heads", "head_dim"))


def _generated_taps(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
  """Taps of the dynamic convolution, one set a token: [B, T, H, V, c] in x's dtype."""
  hidden = layers.silu(products.dense(x, weights["conv_w1"], ("batch", "seq", None)))
  taps = products.dense(hidden, weights["conv_w2"], ("batch", "seq", "heads", "head_dim", None))
  return taps + weights["conv_b2"].astype(x.dtype)


@functools.cache
def _log_uniform(bounds: tuple[float, float]) -> params.Init:
  """log A with A even on (low, high)."""

  def draw(key, shape, dtype):
    return jnp.log(jax.random.uniform(key, shape, dtype, minval=bounds[0], maxval=bounds[1]))

  return draw


def _softplus_inverse_of_step(key, shape, dtype):
  """x with softplus(x) log-uniform on (1e-3, 1e-1): the usual start of `dt_bias`."""
  step = jnp.exp(jax.random.uniform(key, shape, dtype, minval=jnp.log(1e-3), maxval=jnp.log(1e-1)))
  return step + jnp.log(-jnp.expm1(-step))


def _last_tap(key, shape, dtype):
  """A convolution that passes the current token on."""
  del key
  return jnp.zeros(shape, dtype).at[..., -1].set(1)
