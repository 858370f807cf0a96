"""The hybrid without windows and without pads: a second implementation that judges the oracle itself.

It shares no layer code with `tests.oracle`, and takes another road wherever there is one. Equations and
sources as there.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.oracle_params import as_float64

Array = np.ndarray
Tree = dict[str, Any]

NORM_EPS = 1e-6
OUT_NORM_EPS = 1e-5
L2_EPS = 1e-6


def unwindowed_hybrid(
  params: Tree,
  inputs: Array,
  *,
  pattern: Sequence[str],
  window: int,
  valid: Array | None = None,
  rope_theta: float = 10_000.0,
  eviction: str = "hard",
) -> Tree:
  """The ordinary hybrid: what `forward` must be at num_passes = 1 with conv_context = "carry".

  With eviction = "sliding" a token sees the newest `window` tokens, its own included.

  Shares no layer code with `forward`: the whole sequence goes through each block at once, attention
  has one T x T mask (causal and same window), RoPE turns complex numbers by absolute positions, the
  convolution and the recurrence run over the whole sequence, the rules are in the papers' transposed
  form, S [V, K], and a row's pads are taken out of it beforehand.

  Returns logits [B, T, vocab] at all positions (zero at pads) and S, {block: [B, H, K, V]}.
  """
  params, tokens = as_float64(params), np.asarray(inputs)
  valid = np.ones(tokens.shape, bool) if valid is None else np.asarray(valid, bool)
  logits = np.zeros((*tokens.shape, params["head"].shape[1]))
  S = {str(i): [] for i, kind in enumerate(pattern) if kind != "attn"}
  for row, real in enumerate(valid):
    at = np.flatnonzero(real)
    h = params["embed"][tokens[row, at]]
    for i, kind in enumerate(pattern):
      p = params["blocks"][str(i)]
      x = _unit_rms(h, NORM_EPS) * p["norm"]
      if kind == "attn":
        h = h + _whole_attention(p["mixer"], x, at, window, rope_theta, eviction)
      else:
        o, memory = _whole_fast_weights(p["mixer"], x, kind)
        h, _ = h + o, S[str(i)].append(memory)
      x = _unit_rms(h, NORM_EPS) * p["mlp_norm"]
      gate = x @ p["mlp"]["gate"]
      h = h + (gate / (1 + np.exp(-gate)) * (x @ p["mlp"]["up"])) @ p["mlp"]["down"]
    logits[row, at] = (_unit_rms(h, NORM_EPS) * params["final_norm"]) @ params["head"]
  return {"logits": logits, "S": {name: np.stack(rows) for name, rows in S.items()}}


def _unit_rms(x: Array, eps: float) -> Array:
  return x * (np.einsum("...d,...d->...", x, x) / x.shape[-1] + eps)[..., None] ** -0.5


def _whole_attention(p: Tree, x: Array, at: Array, window: int, theta: float, eviction: str) -> Array:
  """[T, D] -> [T, D] for tokens at absolute positions `at`."""
  groups = p["q"].shape[1] // p["k"].shape[1]
  q, k, v = (np.einsum("td,dhw->htw", x, p[name]) for name in ("q", "k", "v"))
  if "q_norm" in p:
    q, k = _unit_rms(q, NORM_EPS) * p["q_norm"], _unit_rms(k, NORM_EPS) * p["k_norm"]
  half = q.shape[-1] // 2
  turn = np.exp(1j * np.outer(at, theta ** -(np.arange(half) / half)))
  q, k = ((y[..., :half] + 1j * y[..., half:]) * turn for y in (q, k))
  k, v = np.repeat(k, groups, axis=0), np.repeat(v, groups, axis=0)
  # The real part of a conjugate product is the dot product of the pairs that the numbers stand for.
  scores = np.real(np.einsum("htw,hsw->hts", q, np.conj(k))) * (2 * half) ** -0.5
  near = at[:, None] - at[None, :] < window
  if eviction == "hard":
    near = at[:, None] // window == at[None, :] // window
  seen = (at[:, None] >= at[None, :]) & near
  scores = np.where(seen, scores, -np.inf)
  weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
  weights = weights / weights.sum(axis=-1, keepdims=True)
  return np.einsum("hts,hsw,hwd->td", weights, v, p["o"], optimize=True)


def _whole_fast_weights(p: Tree, x: Array, kind: str) -> tuple[Array, Array]:
  """[T, D] -> [T, D] and the final state [H, K, V], from S = 0."""
  length = x.shape[0]
  streams = []
  for name in ("q", "k", "v"):
    y = np.tensordot(x, p[name], axes=1)
    if f"{name}_conv" in p:
      taps, y0 = p[f"{name}_conv"], y
      y = taps[-1] * y0
      for back in range(1, min(len(taps), length)):
        y[back:] += taps[-1 - back] * y0[:-back]
    streams.append(y / (1 + np.exp(-y)))
  q, k, v = streams
  q, k = (y / (np.linalg.norm(y, axis=-1, keepdims=True) ** 2 + L2_EPS) ** 0.5 for y in (q, k))
  q = q * k.shape[-1] ** -0.5
  b = 1 / (1 + np.exp(-(x @ p["b"])))
  a = (1 + np.exp(x @ p["a"] + p["dt_bias"])) ** -np.exp(p["A_log"])  # exp(-A log(1 + e^z))
  heads, width, identity = k.shape[1], v.shape[2], np.eye(k.shape[2])
  S, read = np.zeros((heads, width, k.shape[2])), np.zeros((length, heads, width))
  for t in range(length):
    for j in range(heads):
      erase = identity - b[t, j] * np.outer(k[t, j], k[t, j]) if kind == "gdn" else identity
      S[j] = a[t, j] * S[j] @ erase + b[t, j] * np.outer(v[t, j], k[t, j])
      read[t, j] = S[j] @ q[t, j]
  gate = np.tensordot(x, p["gate"], axes=1)
  o = _unit_rms(read, OUT_NORM_EPS) * p["out_norm"] * gate / (1 + np.exp(-gate))
  return np.tensordot(o, p["o"], axes=2), S.transpose(0, 2, 1)
