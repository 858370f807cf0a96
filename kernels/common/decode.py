"""One token of a delta rule, for awake decoding: S is updated where it lies."""

import jax
import jax.numpy as jnp
from jax.lax import Precision


def delta_rule(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  S: jax.Array,
  *,
  log_decay: jax.Array | None,
  erase: jax.Array,
  write: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """S <- Diag(exp(log_decay)) S;  S <- S + k (write v - S^T (erase k))^T;  o = S^T q.

  S is read once, for both answers, and written into its own memory.

  Args:
    q, k: [B, H, K]. v: [B, H, V]. S: [B, H, K, V].
    log_decay: [B, H, K or 1]. None: nothing is forgotten.
    erase: [B, H, K or 1]. write: [B, H, V or 1].

  Returns:
    o [B, H, V] in v's dtype, and S.
  """
  dtype = v.dtype
  q, k, v, erase, write = (x.astype(S.dtype) for x in (q, k, v, erase, write))
  reads = jnp.stack([q, erase * k], -2)
  decay = None if log_decay is None else jnp.exp(log_decay.astype(S.dtype))
  if decay is not None:
    reads = reads * decay[..., None, :]
  answers = jnp.einsum("bhrk,bhkv->bhrv", reads, S, precision=Precision.HIGHEST)
  u = write * v - answers[..., 1, :]
  o = answers[..., 0, :] + jnp.sum(q * k, -1, keepdims=True) * u
  if decay is not None:
    S = decay[..., None] * S
  return o.astype(dtype), S + k[..., :, None] * u[..., None, :]
