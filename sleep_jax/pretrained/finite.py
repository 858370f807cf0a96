"""Whether the weights of a checkpoint are numbers."""

import jax
import jax.numpy as jnp

from sleep_jax import model, params
from sleep_jax.pretrained.loading import Source


def first_not_finite(source: Source, weights: model.Params) -> str | None:
  """The name in `source` of the first tensor that holds NaN or infinity; None if none does."""
  flat = {params.name_of(p): x for p, x in jax.tree_util.tree_flatten_with_path(weights)[0]}
  entries = source.entries()
  good = jax.device_get([_finite(flat[entry.path]) for entry in entries])
  return next((entry.name for entry, fine in zip(entries, good, strict=True) if not fine), None)


@jax.jit
def _finite(x):
  return jnp.all(jnp.isfinite(x))
