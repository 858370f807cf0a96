"""Sleep under sliding eviction in plain NumPy: the judge of `sleep_jax.eviction` for any N.

Nothing is ever shifted, cut or stacked here: a cache is the history of *all* tokens, a token sees those less
than `window` positions back, and RoPE turns by absolute positions. Pads have no position: the tokens of a row
are counted. Layers are those of `tests.oracle`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests import oracle

Array = np.ndarray
Tree = dict[str, Any]


def forward(
  params: Tree,
  inputs: Array,
  loss_mask: Array,
  *,
  pattern: Sequence[str],
  window: int,
  num_passes: int,
  valid: Array | None = None,
  kept: str = "last",
  reset: bool = False,
  always: bool = False,
  looped: tuple[int, int] | None = None,
  rope_theta: float = 10_000.0,
  **_: Any,
) -> Tree:
  """`oracle.forward` with the newest `window` - 1 tokens left in every attention block's cache.

  Args:
    kept: "last": every pass sees what the last pass over the earlier windows left. "each": pass n sees what
      pass n left, or the last pass over a window that had fewer.
    always: as for `oracle.forward`.
    reset: each looped pass starts from the S that the window began with.

  Returns:
    logits [B, P, vocab] and positions [P] of windows that are read; S {block: [B, H, K, V]}; and history
    {block: [(keys before RoPE, values) [B, T, Hkv, hd], one a cache]}.
  """
  params, tokens = oracle.as_float64(params), np.asarray(inputs)
  valid = np.ones(tokens.shape, bool) if valid is None else np.asarray(valid, bool)
  count = len(pattern)
  first, last = looped or (0, count)
  state = oracle.initial_state(params, pattern, len(tokens))
  S, context = state["S"], state["conv"]
  caches = num_passes if kept == "each" else 1
  history: Tree = {str(i): [None] * caches for i, kind in enumerate(pattern) if kind == "attn"}
  logits, positions = [], []
  for start in range(0, tokens.shape[1], window):
    stop = min(start + window, tokens.shape[1])
    awake = always or bool(np.any(np.asarray(loss_mask)[:, start:stop]))
    asleep = stop < tokens.shape[1] if always else not awake
    middle = [(i, n) for n in range(num_passes) for i in range(first, last)]
    order = [(i, 0) for i in range(first)] + middle + [(i, 0) for i in range(last, count)]
    before, S_before, reading = history, S, [(i, 0) for i in range(count)]
    for visits in [reading] * awake + [order] * asleep:  # what the last one leaves stays
      history, S, left = {i: list(found) for i, found in before.items()}, dict(S_before), dict(context)
      h = params["embed"][tokens[:, start:stop]]
      for i, n in visits:
        p, name = params["blocks"][str(i)], str(i)
        x = oracle.rms_norm(h, p["norm"])
        if pattern[i] == "attn":
          slot = min(n, caches - 1)
          o, seen = _attention(p["mixer"], x, before[name][slot], valid[:, :stop], window, rope_theta)
          history[name][slot:] = [seen] * (caches - slot)
        else:
          entry = S_before[name] if reset else S[name]
          keep = valid[:, start:stop]
          o, S[name], left[name] = oracle.fast_weights(p["mixer"], x, entry, context[name], keep, pattern[i])
        h = h + o
        h = h + oracle.mlp(p["mlp"], oracle.rms_norm(h, p["mlp_norm"]))
      if visits is not order:
        logits.append(oracle.rms_norm(h, params["final_norm"]) @ params["head"])
        positions.extend(range(start, stop))
    context = left
  empty = np.zeros((len(tokens), 0, params["head"].shape[1]))
  logits = np.concatenate([empty, *logits], axis=1)
  return {"logits": logits, "positions": np.array(positions, int), "S": S, "history": history}


def _attention(
  p: Tree, x: Array, past: tuple[Array, Array] | None, keep: Array, window: int, theta: float
) -> tuple[Array, tuple[Array, Array]]:
  """[B, L, D] -> [B, L, D] behind the whole past, and the past with these tokens; keep [B, T] of all."""
  k, v = (np.einsum("btd,dhw->bthw", x, p[name]) for name in ("k", "v"))
  if "k_norm" in p:
    k = oracle.rms_norm(k, p["k_norm"])
  if past is not None:
    k, v = np.concatenate([past[0], k], axis=1), np.concatenate([past[1], v], axis=1)
  heads, groups, offset = p["q"].shape[1], p["q"].shape[1] // p["k"].shape[1], k.shape[1] - x.shape[1]
  out = 0
  for j in range(heads):
    i = j // groups
    q = x @ p["q"][:, j]
    if "q_norm" in p:
      q = oracle.rms_norm(q, p["q_norm"])
    read = np.zeros((*x.shape[:2], v.shape[-1]), np.result_type(q, k, v))
    for row, real in enumerate(keep):
      tokens = np.flatnonzero(real)
      keys = [oracle.rope(k[row, s, i], at, theta) for at, s in enumerate(tokens)]
      for at, t in enumerate(tokens):
        if t >= offset:
          near = slice(max(at - window + 1, 0), at + 1)
          scores = np.stack(keys[near]) @ oracle.rope(q[row, t - offset], at, theta) / np.sqrt(q.shape[-1])
          read[row, t - offset] = oracle.softmax(scores) @ v[row, tokens[near], i]
    out = out + read @ p["o"][j]
  return out, (k, v)
