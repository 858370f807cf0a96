"""The sleeping hybrid in plain NumPy, written from the equations: the judge of the package.

Nothing here imports the package. Everything is float64 (or complex128, see below), one token and
one head at a time, and vectorised over the batch only. Slow and obvious on purpose.

Sources. [sleep] arXiv:2605.26099: the blocks (section 2), the local rules, Algorithm 1 (section 3).
[gdn] arXiv:2412.06464: the gated delta rule and the layer around it (short convolution, gates, output
norm). [rope] arXiv:2104.09864. [glu] arXiv:2002.05202.

The model, for hidden states x_t of one window:

  block        x <- x + Mixer(RMSNorm(x)),  x <- x + (silu(x W_g) * (x W_u)) W_d                  [sleep, glu]
  attention    o_t = sum_s softmax_s(q_t . k_s / sqrt(hd)) v_s,  s <= t in the same window         [sleep]
  gates        b_t = sigmoid(x_t W_b),  a_t = exp(-exp(A_log) softplus(x_t W_a + dt_bias))         [gdn]
  "gdn"        S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,  o_t = S_t^T q_t             [gdn]
  "hebbian"    S_t = a_t S_{t-1} + b_t k_t v_t^T,                      o_t = S_t^T q_t             [sleep]
  others       `oracle_rules`; their gates: `rates`

The papers print the transposed state; here S is [K, V], row = key channel, as in the package.

Parameters are the package's nested dict with any array leaves (NumPy, JAX, ...); the tensors' shapes
and presence say everything about sizes, QK norm and convolution. Batch is always the first axis.

Complex-step derivatives: with one parameter moved by i h, h = 1e-30, the imaginary part of the loss
over h is its derivative to machine precision (no difference is taken, so nothing cancels). It needs
a real-analytic program: no abs, max or conjugate of a complex number. Comparisons read real parts.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tests.oracle_params import as_float64, leaf, leaves, random_params, replace_leaf
from tests.oracle_rules import RULES, gated_delta_step, gated_hebbian_step
from tests.oracle_unwindowed import unwindowed_hybrid

__all__ = [
  "Entry", "as_float64", "attention", "complex_step_gradient", "fast_weights", "forward", "gated_delta_step",
  "gated_hebbian_step", "initial_state", "leaf", "leaves", "loss", "mlp", "random_params", "replace_leaf",
  "rms_norm", "rope", "sample_gradients", "short_convolution", "sigmoid", "silu", "softmax", "softplus",
  "unwindowed_hybrid",
]  # fmt: skip

Array = np.ndarray
Tree = dict[str, Any]

NORM_EPS = 1e-6  # RMSNorm of blocks, of the end of the model and of attention's q and k
OUT_NORM_EPS = 1e-5  # RMSNorm of what is read from the fast weights
L2_EPS = 1e-6  # inside the root that normalises the fast layers' q and k
COMPLEX_STEP = 1e-30


# --- Elementary functions, real-analytic -------------------------------------------------------------


def sigmoid(x: Array) -> Array:
  """1 / (1 + e^-x); each half line in the form that cannot overflow."""
  small = np.exp(np.where(np.real(x) < 0, x, -x))
  return np.where(np.real(x) < 0, small / (1 + small), 1 / (1 + small))


def silu(x: Array) -> Array:
  return x * sigmoid(x)


def softplus(x: Array) -> Array:
  """log(1 + e^x), as x + log(1 + e^-x) where x is positive."""
  positive = np.real(x) > 0
  return np.where(positive, x, 0) + np.log1p(np.exp(np.where(positive, -x, x)))


def softmax(x: Array) -> Array:
  """Over the last axis. The shift is a real constant, so it drops out of derivatives too."""
  e = np.exp(x - np.real(x).max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def rms_norm(x: Array, weight: Array, eps: float = NORM_EPS) -> Array:
  """w x / sqrt(mean(x^2) + eps) over the last axis."""
  return weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def rope(x: Array, position: int, theta: float) -> Array:
  """Turns a head [..., hd] at one position: channels (i, i + hd/2) by position * theta^(-2i/hd). [rope]"""
  half = x.shape[-1] // 2
  angle = position * theta ** (-2.0 * np.arange(half) / x.shape[-1])
  x1, x2 = x[..., :half], x[..., half:]
  return np.concatenate(
    [x1 * np.cos(angle) - x2 * np.sin(angle), x2 * np.cos(angle) + x1 * np.sin(angle)], axis=-1
  )


def mlp(p: Tree, x: Array) -> Array:
  """SwiGLU: (silu(x gate) * (x up)) down."""
  return (silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


# --- Mixers ------------------------------------------------------------------------------------------


def attention(p: Tree, x: Array, keep: Array, rope_theta: float = 10_000.0) -> Array:
  """Causal attention inside one window, [B, L, D] -> [B, L, D].

  The position of a token is its index in the window, pads counted. Query head j reads key-value head
  j // (H / Hkv). keep [B, L] is False at pads, which nobody attends to; a pad's own output is zero.
  """
  length, heads, kv_heads = x.shape[1], p["q"].shape[1], p["k"].shape[1]
  head_dim = p["q"].shape[2]
  out = 0
  for j in range(heads):
    i = j // (heads // kv_heads)
    q, k, v = x @ p["q"][:, j], x @ p["k"][:, i], x @ p["v"][:, i]
    if "q_norm" in p:
      q, k = rms_norm(q, p["q_norm"]), rms_norm(k, p["k_norm"])
    keys = np.stack([rope(k[:, t], t, rope_theta) for t in range(length)], axis=1)
    read = []
    for t in range(length):
      scores = np.einsum("bd,bsd->bs", rope(q[:, t], t, rope_theta), keys[:, : t + 1]) / np.sqrt(head_dim)
      scores = np.where(keep[:, : t + 1], scores, -1e300)  # the exponential of this is exactly zero
      read.append(np.where(keep[:, t, None], np.einsum("bs,bsd->bd", softmax(scores), v[:, : t + 1]), 0))
    out = out + np.stack(read, axis=1) @ p["o"][j]
  return out


def short_convolution(x: Array, taps: Array, context: Array) -> tuple[Array, Array]:
  """Causal depthwise convolution: y_t = sum_w taps[w] x_{t-(c-1)+w}; the last tap is the current token. [gdn]

  x [B, L, H, W], taps [c, H, W], context [B, c-1, H, W] = the inputs before x. Returns y and the last
  c-1 inputs, the context of whatever follows.
  """
  size, length = taps.shape[0], x.shape[1]
  seen = np.concatenate([context, x], axis=1)
  y = np.zeros(x.shape, np.result_type(x, taps, context))
  for t in range(length):
    y[:, t] = sum(taps[w] * seen[:, t + w] for w in range(size))
  return y, seen[:, length:]


def fast_weights(
  p: Tree, x: Array, S: Array, context: Tree, keep: Array, kind: str
) -> tuple[Array, Array, Tree]:
  """The fast-weight layer, [B, L, D] -> [B, L, D], with S [B, H, K, V] and the convolutions' contexts. [gdn]

  In this order: project; zero at pads; convolve (context: {"q", "k", "v"}, empty without convolution; pads
  in front of a row's first token are no inputs of it);
  SiLU; l2-normalise q and k, q scaled by K^-1/2; run the rule; RMSNorm, gate, output projection.
  A pad (keep False) leaves S as it was and reads zero.
  """
  left = {}
  streams = {}
  for name in ("q", "k", "v"):
    y = np.einsum("btd,dhw->bthw", x, p[name]) * keep[:, :, None, None]
    if f"{name}_conv" in p:
      rows = []
      for row in range(len(x)):
        pads = int(np.argmax([*keep[row], True]))
        out, after = short_convolution(
          y[row : row + 1, pads:], p[f"{name}_conv"], context[name][row : row + 1]
        )
        rows.append((np.concatenate([np.zeros_like(y[row : row + 1, :pads]), out], axis=1), after))
      y, left[name] = (np.concatenate(part) for part in zip(*rows, strict=True))
    streams[name] = silu(y)
  q, k, v = (streams[name] for name in ("q", "k", "v"))
  q, k = (y / np.sqrt(np.sum(y * y, axis=-1, keepdims=True) + L2_EPS) for y in (q, k))
  q = q / np.sqrt(q.shape[-1])
  gates = rates(p, x, kind)

  out, memories = 0, []
  for j in range(S.shape[1]):
    memory, read = S[:, j], []
    for t in range(x.shape[1]):
      o, written = RULES[kind](*(y[:, t, j] for y in (q, k, v, *gates)), memory)
      memory = np.where(keep[:, t, None, None], written, memory)
      read.append(np.where(keep[:, t, None], o, 0))
    o = rms_norm(np.stack(read, axis=1), p["out_norm"], OUT_NORM_EPS) * output_gate(p, x, kind)[:, :, j]
    out = out + o @ p["o"][j]
    memories.append(memory)
  return out, np.stack(memories, axis=1), left


def rates(p: Tree, x: Array, kind: str) -> tuple[Array, ...]:
  """The rule's gates in its order: log decays g, then write strengths b, or gates on erasing and writing.

  "kda" and "gdn2" decay every key channel by its own rate: g [B, L, H, K] =
  -exp(A_log[h]) softplus((x f_a) f_b[h] + dt_bias[h]).
  """

  def heads(name: str) -> Array:
    return sigmoid(np.einsum("btd,dhw->bthw", x, p[name]))

  if kind == "delta":
    return (sigmoid(x @ p["b"]),)
  if kind in ("kda", "gdn2"):
    step = np.einsum("btr,rhk->bthk", x @ p["f_a"], p["f_b"])
    g = -np.exp(p["A_log"])[:, None] * softplus(step + p["dt_bias"])
    return (g, sigmoid(x @ p["b"])) if kind == "kda" else (g, heads("e"), heads("w"))
  return -np.exp(p["A_log"]) * softplus(x @ p["a"] + p["dt_bias"]), sigmoid(x @ p["b"])


def output_gate(p: Tree, x: Array, kind: str) -> Array:
  """What the normed read is multiplied by [B, L, H, V]: "kda" through a narrow layer and a sigmoid, "gdn2"
  through one with a bias and SiLU."""
  if kind == "kda":
    return sigmoid(np.einsum("btr,rhv->bthv", x @ p["gate_a"], p["gate_b"]))
  if kind == "gdn2":
    return silu(np.einsum("btr,rhv->bthv", x @ p["gate_a"], p["gate_b"]) + p["gate_bias"])
  return silu(np.einsum("btd,dhv->bthv", x, p["gate"]))


# --- The model ---------------------------------------------------------------------------------------


def initial_state(params: Tree, pattern: Sequence[str], batch: int) -> Tree:
  """The start of a sequence, zeros: {"S": {block: S}, "conv": {block: {"q": ..., "k": ..., "v": ...}}}.

  S is [B, H, K, V]; a convolution's context is the last inputs of its stream, [B, c-1, H, K or V], and
  absent without convolution. Blocks are named as in the parameters ("0", ...), attention blocks absent.
  """
  S, conv = {}, {}
  for name, p in _fast_blocks(params, pattern):
    S[name] = np.zeros((batch, *p["k"].shape[1:], p["v"].shape[2]))
    conv[name] = {
      stream: np.zeros((batch, p[f"{stream}_conv"].shape[0] - 1, *p[stream].shape[1:]))
      for stream in ("q", "k", "v")
      if f"{stream}_conv" in p
    }
  return {"S": S, "conv": conv}


def forward(
  params: Tree,
  inputs: Array,
  loss_mask: Array,
  *,
  pattern: Sequence[str],
  window: int,
  num_passes: int,
  valid: Array | None = None,
  rope_theta: float = 10_000.0,
  qk_norm: bool | None = None,
  conv_context: str = "carry",
  looped: tuple[int, int] | None = None,
  always: bool = False,
  state: Tree | None = None,
  at_window_start: Callable[[int, Tree], Tree] | None = None,
) -> Tree:
  """Algorithm 1 of arXiv:2605.26099 up to the logits, with hard eviction.

  The sequence is cut into chunks of `window` tokens, the last may be shorter. A chunk without a scored
  position in any row is slept on: its blocks run num_passes times, hidden states feeding hidden states,
  and only S (and what the convolutions will need on their left) survives. Any other chunk is one pass
  awake. During a sleep every pass sees the left context that the window began with; the last pass
  leaves the next one.

  Args:
    inputs: tokens [B, T].
    loss_mask: [B, T], nonzero where a position is scored. Only its layout matters here.
    pattern: the mixer of each block, "attn" or a name in `oracle_rules.RULES`.
    valid: [B, T], False at pads (meant for the left of a window's tokens; elsewhere a pad is a zero to the
      convolution).
    qk_norm: None asks the parameters; a bool is checked against them.
    conv_context: "carry" or "reset" (zeros left of every window).
    looped: (first, last): in a sleep blocks [0, first) run once, [first, last) num_passes times and
      [last, ...) once. None loops all.
    always: every chunk is read awake, and all but the last one are slept on too, from the state with which
      they began: nothing that the reading wrote is left.
    state: where to start from, as returned; None is the start of a sequence.
    at_window_start: may replace the state when a window begins, f(window index, state) -> state.

  Returns:
    logits: [B, P, vocab] at the P positions of chunks that are read awake, in order; zero at pads, where
      they mean nothing.
    positions: [P], which those are.
    state: after the last chunk; see initial_state. Under "reset" the contexts are zero.
    trace: one dict a chunk: start, stop, asleep, and S = {block: [S before, S after visit 1, ...]}.
  """
  params, tokens = as_float64(params), np.asarray(inputs)
  scored = np.asarray(loss_mask) != 0
  valid = np.ones(tokens.shape, bool) if valid is None else np.asarray(valid, bool)
  num_blocks = len(params["blocks"])
  _check(params, pattern, num_passes, qk_norm, conv_context, looped, scored & ~valid)
  first, last = looped or (0, num_blocks)
  asleep_order = [*range(first), *(list(range(first, last)) * num_passes), *range(last, num_blocks)]
  zeros = initial_state(params, pattern, tokens.shape[0])
  state = zeros if state is None else {key: as_float64(state[key]) for key in ("S", "conv")}

  logits, positions, trace = [], [], []
  for index, start in enumerate(range(0, tokens.shape[1], window)):
    stop = min(start + window, tokens.shape[1])
    if at_window_start is not None:
      state = at_window_start(index, state)
    keep, context = valid[:, start:stop], state["conv"] if conv_context == "carry" else zeros["conv"]
    awake = always or bool(scored[:, start:stop].any())
    asleep = stop < tokens.shape[1] if always else not awake
    for order in [range(num_blocks)] * awake + [asleep_order] * asleep:  # what the last one writes stays
      S, left = dict(state["S"]), dict(context)
      visits = {name: [S[name]] for name in S}
      h = params["embed"][tokens[:, start:stop]]
      for i in order:
        p, name = params["blocks"][str(i)], str(i)
        x = rms_norm(h, p["norm"])
        if pattern[i] == "attn":
          h = h + attention(p["mixer"], x, keep, rope_theta)
        else:
          o, S[name], left[name] = fast_weights(p["mixer"], x, S[name], context[name], keep, pattern[i])
          h = h + o
          visits[name].append(S[name])
        h = h + mlp(p["mlp"], rms_norm(h, p["mlp_norm"]))
      if order is not asleep_order:
        logits.append(np.where(keep[:, :, None], rms_norm(h, params["final_norm"]) @ params["head"], 0))
        positions.extend(range(start, stop))
    state = {"S": S, "conv": left if conv_context == "carry" else zeros["conv"]}
    trace.append({"start": start, "stop": stop, "asleep": asleep, "S": visits})

  empty = np.zeros((tokens.shape[0], 0, params["head"].shape[1]))
  logits = np.concatenate([empty, *logits], axis=1)
  return {"logits": logits, "positions": np.array(positions, int), "state": state, "trace": trace}


def loss(
  params: Tree,
  inputs: Array,
  targets: Array,
  loss_mask: Array,
  *,
  run: Callable[..., Tree] | None = None,
  **settings: Any,
) -> np.generic:
  """sum(mask * cross entropy) / sum(mask), i predicting targets[i]; settings of `forward` (or `run`)."""
  result = (run or forward)(params, inputs, loss_mask, **settings)
  logits, at = result["logits"], result["positions"]
  mask, targets = np.asarray(loss_mask, np.float64)[:, at], np.asarray(targets)[:, at]
  shift = np.real(logits).max(axis=-1)
  log_sum = shift + np.log(np.exp(logits - shift[..., None]).sum(axis=-1))
  chosen = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return np.sum(mask * (log_sum - chosen)) / np.sum(mask)


def _fast_blocks(params: Tree, pattern: Sequence[str]) -> list[tuple[str, Tree]]:
  return [(str(i), params["blocks"][str(i)]["mixer"]) for i, kind in enumerate(pattern) if kind != "attn"]


def _check(
  params: Tree,
  pattern: Sequence[str],
  num_passes: int,
  qk_norm: bool | None,
  conv_context: str,
  looped: tuple[int, int] | None,
  scored_pads: Array,
) -> None:
  """Raises ValueError for settings that do not fit the parameters or each other."""
  if len(pattern) != len(params["blocks"]) or not set(pattern) <= {"attn", *RULES}:
    raise ValueError(f"pattern {tuple(pattern)} does not name the mixers of {len(params['blocks'])} blocks")
  mixers = [params["blocks"][str(i)]["mixer"] for i, kind in enumerate(pattern) if kind == "attn"]
  if qk_norm is not None and any(("q_norm" in mixer) != qk_norm for mixer in mixers):
    raise ValueError(f"qk_norm={qk_norm}, but the parameters say otherwise")
  if num_passes < 1 or conv_context not in ("carry", "reset"):
    raise ValueError(f"num_passes={num_passes}, conv_context={conv_context!r}")
  if looped is not None and not 0 <= looped[0] < looped[1] <= len(pattern):
    raise ValueError(f"looped={looped} is not a range of {len(pattern)} blocks")
  if scored_pads.any():
    raise ValueError("loss_mask scores a pad")


# --- Derivatives -------------------------------------------------------------------------------------


class Entry(NamedTuple):
  """One parameter entry and the derivative of the loss by it."""

  path: tuple[str, ...]
  index: tuple[int, ...]
  gradient: float


def complex_step_gradient(
  params: Tree,
  path: Sequence[str],
  index: Sequence[int],
  inputs: Array,
  targets: Array,
  loss_mask: Array,
  **settings: Any,
) -> float:
  """d loss / d params[path][index], to machine precision. Arguments after `index` as for `loss`."""
  value = np.array(leaf(params, path), np.complex128)
  value[tuple(index)] += 1j * COMPLEX_STEP
  moved = replace_leaf(params, path, value)
  return float(np.imag(loss(moved, inputs, targets, loss_mask, **settings)) / COMPLEX_STEP)


def sample_gradients(
  params: Tree,
  inputs: Array,
  targets: Array,
  loss_mask: Array,
  *,
  entries: int = 2,
  seed: int = 0,
  **settings: Any,
) -> list[Entry]:
  """Complex-step derivatives at a few random entries of every tensor (all, of tensors with fewer).

  Embedding entries are drawn from the rows of tokens that occur (unpadded), where they are not zero.
  """
  rng, found = np.random.default_rng(seed), []
  tokens, valid = np.asarray(inputs), settings.get("valid")
  used = np.unique(tokens if valid is None else tokens[np.asarray(valid, bool)])
  for path, value in leaves(params):
    for flat in rng.choice(value.size, min(entries, value.size), replace=False):
      index = tuple(int(i) for i in np.unravel_index(flat, value.shape))
      if path == ("embed",):
        index = (int(rng.choice(used)), index[1])
      gradient = complex_step_gradient(params, path, index, inputs, targets, loss_mask, **settings)
      found.append(Entry(path, index, gradient))
  return found
