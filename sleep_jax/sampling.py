"""How the next token is drawn from the logits.

A draw depends on the logits, the key and the position alone, so a sequence that is cut and resumed goes on as
it would have.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import config

TEMPERATURES = (1e-6, 1e6)  # the lowest one above 0, and the highest


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How the next token is drawn, and whether an end token ends the text.

  Attributes:
    temperature: logits are divided by it; 0: the likeliest token always.
    top_k: only the k likeliest tokens are drawn. None: all.
    top_p: only the likeliest tokens that together reach this probability, of what `top_k` left. None: all.
    stop_at_end: end at the end tokens that the caller names. False: go on behind them.
  """

  PATH: ClassVar[str] = "sampling"

  temperature: config.NotNegative = 0.0
  top_k: config.Count | None = None
  top_p: Annotated[float, config.Bounds(above=0, most=1)] | None = None
  stop_at_end: bool = True

  def __post_init__(self):
    config.check_fields(self)
    low, high = TEMPERATURES
    config.check(
      self.temperature == 0 or low <= self.temperature <= high,
      "sampling.temperature",
      f"must be 0 or lie in [{low}, {high:.0f}], got {self.temperature}",
    )


def draw(
  logits: jax.Array,
  position: int,
  key: jax.Array,
  sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
) -> np.ndarray:
  """Draws the next token of every row.

  Args:
    logits: [B, vocab] float32.
    position: tokens before this one.
    key: of the whole sequence; or [B] keys, one for each row, which then does not depend on the others.
    sampling: one way for all rows or B ways. None: the likeliest token.

  Returns:
    [B] int32, on the host.

  Raises:
    ValueError: if there are several keys or ways, but not B.
  """
  rows = logits.shape[0]
  each = of_rows(sampling, rows)
  if key.ndim == 0 and len(set(each)) == 1:
    return np.asarray(_sample(logits, jax.random.fold_in(key, position), each[0]))
  keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows)) if key.ndim == 0 else key
  if keys.shape != (rows,):
    raise ValueError(f"there must be one key or {rows}, got {keys.shape}")
  drawn = np.zeros(rows, np.int32)
  for one in set(each):
    alike = np.array([way == one for way in each])
    drawn[alike] = np.asarray(_sample_rows(logits, keys, position, one))[alike]
  return drawn


def of_rows(sampling: SamplingConfig | Sequence[SamplingConfig] | None, rows: int) -> list[SamplingConfig]:
  """One way to draw for each row.

  Raises:
    ValueError: if there are several ways, but not as many as rows.
  """
  if sampling is None or isinstance(sampling, SamplingConfig):
    return [sampling or SamplingConfig()] * rows
  if len(sampling) != rows:
    raise ValueError(f"there must be one way to draw or {rows}, got {len(sampling)}")
  return list(sampling)


def sample(logits: jax.Array, key: jax.Array, sampling: SamplingConfig) -> jax.Array:
  """Draws one token for each row; among equally likely ones, those with lower numbers come first.

  Args:
    logits: [B, vocab] float32.
    key: for this token.

  Returns:
    [B] int32.
  """
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  order = jnp.argsort(-logits, axis=-1, stable=True)
  ranked = jnp.take_along_axis(logits, order, axis=-1) / sampling.temperature
  if sampling.top_k is not None and sampling.top_k < ranked.shape[-1]:
    ranked = jnp.where(jnp.arange(ranked.shape[-1]) < sampling.top_k, ranked, -jnp.inf)
  if sampling.top_p is not None:
    shares = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    ranked = jnp.where(before < sampling.top_p, ranked, -jnp.inf)
  rank = jax.random.categorical(key, ranked, axis=-1)
  return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)


_sample = jax.jit(sample, static_argnames="sampling")


@functools.partial(jax.jit, static_argnames="sampling")
def _sample_rows(logits, keys, position, sampling):
  """Draws each row with a key of its own."""

  def one(row, key):
    return sample(row[None], jax.random.fold_in(key, position), sampling)[0]

  return jax.vmap(one)(logits, keys)
