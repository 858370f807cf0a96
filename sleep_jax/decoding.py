"""The compiled steps of a session that reads: a token, a piece of a window, a whole one, a sleep or its
parts.

A token's step reads every weight and the cache once and writes neither. The rows that it adds to the cache
are put there by another step, in place if the caller says so.

In all of them tokens [B, T] are int32, valid [B, T] is bool and False for pads, logits [B, vocab] are float32
and those of the last token, and `cfg` is the model's.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from sleep_jax import consolidation, looped, model, sharding
from sleep_jax.attention import KVCache
from sleep_jax.config import ModelConfig


def _placed(*rows: jax.Array) -> list[jax.Array]:
  """Arrays [B, T] that come from the host, split over the mesh as batches are."""
  return [sharding.constrain(x, ("batch", "seq")) for x in rows]


@functools.partial(jax.jit, static_argnames=("cfg", "scan"))
def piece(weights, tokens, valid, fast, cache, cfg, scan):
  """Logits of the last token; `scan` compiles equal blocks once, and copies their weights to do so."""
  tokens, valid = _placed(tokens, valid)
  logits, fast, cache = model.decode(
    weights, tokens, fast, cache, cfg, reads=(tokens.shape[1] - 1,), valid=valid, scan=scan
  )
  return logits[:, 0], fast, cache


def by_rows(cfg: ModelConfig) -> bool:
  """Whether one token adds one row to each cache, on one device, so that `token` can read it."""
  return jax.sharding.get_mesh().empty and (cfg.pass_cache == "own" or cfg.predict_passes == 1)


@functools.partial(jax.jit, static_argnames="cfg")
def token(weights, tokens, valid, fast, cache, cfg):
  """Reads every weight and the cache once, and writes none: gives the rows that the cache is to have next."""
  logits, fast, after = model.decode(weights, tokens, fast, cache, cfg, valid=valid)

  def row(before, after):
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, before.length, 1, axis=1), _arrays(after))

  rows = tuple({i: row(b[i], a[i]) for i in b} for b, a in zip(cache, after, strict=True))
  return logits[:, 0], fast, rows


def _arrays(cache: KVCache) -> tuple[jax.Array, ...]:
  return cache.k, cache.v, cache.valid


def _with_rows(cache: looped.Cache, rows: tuple[dict[str, Any], ...]) -> looped.Cache:
  """The cache with one more row of each block."""

  def put(before: KVCache, row: tuple[jax.Array, ...]) -> KVCache:
    k, v, valid = (
      jax.lax.dynamic_update_slice_in_dim(old, new, before.length, axis=1)
      for old, new in zip(_arrays(before), row, strict=True)
    )
    return KVCache(k, v, valid, before.length + 1)

  return tuple({i: put(b[i], r[i]) for i in b} for b, r in zip(cache, rows, strict=True))


appended = jax.jit(_with_rows)
appended_in_place = jax.jit(_with_rows, donate_argnames="cache")


@functools.partial(jax.jit, static_argnames="cfg")
def whole_window(weights, tokens, valid, state, cfg):
  """Logits of the last token of a window of T <= L tokens that is read awake from `state`; keeps nothing."""
  tokens, valid = _placed(tokens, valid)
  return model.predict(weights, tokens, state, cfg, reads=(tokens.shape[1] - 1,), valid=valid)[0][:, 0]


@functools.partial(jax.jit, static_argnames=("cfg", "sleep_cfg"))
def asleep(weights, tokens, valid, state, cfg, sleep_cfg):
  """Sleeps on a full window: the state behind it, and the fast weights and empty caches of the next one."""
  tokens, valid = _placed(tokens, valid)
  state = model.consolidate(weights, tokens, state, cfg, sleep_cfg, valid=valid)
  return state, *model.open_window(state, cfg, tokens.shape[0])


@functools.partial(jax.jit, static_argnames=("cfg", "sleep_cfg"))
def falling_asleep(weights, tokens, valid, state, cfg, sleep_cfg):
  """The sleep on a full window, before its first pass."""
  tokens, valid = _placed(tokens, valid)
  with jax.named_scope("asleep"):
    return _parts(weights, valid, state, cfg, sleep_cfg).fall(model.embed(weights, tokens, cfg, valid))


@functools.partial(jax.jit, static_argnames=("cfg", "sleep_cfg"))
def one_pass(weights, valid, state, asleep, number, cfg, sleep_cfg):
  """The sleep behind pass `number`, an int32 scalar from 0; it is the same program for all of them."""
  (valid,) = _placed(valid)
  with jax.named_scope("asleep"):
    return _parts(weights, valid, state, cfg, sleep_cfg).one_pass(asleep, number)


@functools.partial(jax.jit, static_argnames=("cfg", "sleep_cfg"))
def waking(weights, valid, state, asleep, cfg, sleep_cfg):
  """The state behind the last pass."""
  (valid,) = _placed(valid)
  with jax.named_scope("asleep"):
    return _parts(weights, valid, state, cfg, sleep_cfg).wake(asleep)


def _parts(weights, valid, state, cfg, sleep_cfg) -> consolidation.Parts:
  arranged = consolidation.arrange(weights, cfg, sleep_cfg)
  return consolidation.parts(weights, arranged, state, cfg, sleep_cfg, valid)


@functools.partial(jax.jit, static_argnames=("cfg", "batch", "room"))
def opened(state, pads, cfg, batch, room):
  """The fast weights and empty caches of a window; `pads` and `room` as for `attention.init_cache`."""
  return model.open_window(state, cfg, batch, room=room, pads=pads)


@jax.jit
def where(rows, x, other):
  """x [B, ...] in the rows [B, 1] bool, elsewhere `other`."""
  return jnp.where(rows, x, other)


@jax.jit
def finite(tree):
  """Whether every number of every array is finite, a bool scalar."""
  return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))
