"""One token of each local rule for the oracle, as its paper prints it (there with S transposed).

    gated_delta     S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T             arXiv:2412.06464
    gated_hebbian   S_t = a_t S_{t-1} + b_t k_t v_t^T                                 arXiv:2605.26099
    delta           S_t = (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T                 arXiv:2406.06484
    kda             S_t = (I - b_t k_t k_t^T) Diag(a_t) S_{t-1} + b_t k_t v_t^T       arXiv:2510.26692
    gdn2            S_t = (I - k_t (e_t * k_t)^T) Diag(a_t) S_{t-1} + k_t (w_t * v_t)^T   arXiv:2605.22791

and o_t = S_t^T q_t. q, k [B, K]; v [B, V]; S [B, K, V]. Each returns the read [B, V] and the new S.
"""

import numpy as np

Array = np.ndarray


def gated_delta_step(q: Array, k: Array, v: Array, g: Array, b: Array, S: Array) -> tuple[Array, Array]:
  """One token of the gated delta rule: S decays, its error in v is read, and the error is written. [gdn]

  q, k [B, K]; v [B, V]; g (log decay), b [B]; S [B, K, V]. Returns the read S^T q [B, V] and the new S.
  """
  S = np.exp(g)[:, None, None] * S
  error = v - np.einsum("bkv,bk->bv", S, k)
  S = S + np.einsum("b,bk,bv->bkv", b, k, error)
  return np.einsum("bkv,bk->bv", S, q), S


def gated_hebbian_step(q: Array, k: Array, v: Array, g: Array, b: Array, S: Array) -> tuple[Array, Array]:
  """One token of the gated Hebbian rule: S decays and v is added under k. Shapes as above. [sleep]"""
  S = np.exp(g)[:, None, None] * S + np.einsum("b,bk,bv->bkv", b, k, v)
  return np.einsum("bkv,bk->bv", S, q), S


def delta_step(q: Array, k: Array, v: Array, b: Array, S: Array) -> tuple[Array, Array]:
  """One token of the delta rule; write strength b [B]."""
  forget = np.eye(k.shape[1]) - np.einsum("b,bi,bj->bij", b, k, k)
  S = forget @ S + np.einsum("b,bk,bv->bkv", b, k, v)
  return np.einsum("bkv,bk->bv", S, q), S


def kda_step(q: Array, k: Array, v: Array, g: Array, b: Array, S: Array) -> tuple[Array, Array]:
  """One token of Kimi Delta Attention: every key channel decays by its own g [B, K]; b [B]."""
  return delta_step(q, k, v, b, np.einsum("bk,bkv->bkv", np.exp(g), S))


def gdn2_step(q: Array, k: Array, v: Array, g: Array, e: Array, w: Array, S: Array) -> tuple[Array, Array]:
  """One token of Gated DeltaNet-2: what is erased is read with e * k, what is written is w * v; w [B, V]."""
  forget = np.eye(k.shape[1]) - np.einsum("bi,bj->bij", k, e * k)
  S = forget @ np.einsum("bk,bkv->bkv", np.exp(g), S) + np.einsum("bk,bv->bkv", k, w * v)
  return np.einsum("bkv,bk->bv", S, q), S


RULES = {
  "gdn": gated_delta_step,
  "hebbian": gated_hebbian_step,
  "delta": delta_step,
  "kda": kda_step,
  "gdn2": gdn2_step,
}
