"""Causal attention inside a window, with grouped queries, and what eviction drops or keeps of it.

`layer` has the mixer: projections, rotary angles, the cache. All of it attends through one function, `attend`
in `forms`, behind which are four forms: `dense`, `blocked`, `cudnn` and `splash`.
"""

from sleep_jax.attention.forms import allowed, attend, check_form, dense, scores_at_once
from sleep_jax.attention.layer import (
  Kept,
  KVCache,
  attend_one,
  declare,
  decode,
  init_cache,
  init_kept,
  read_behind,
  read_window,
)

__all__ = [
  "KVCache", "Kept", "allowed", "attend", "attend_one", "check_form", "declare", "decode", "dense",
  "init_cache", "init_kept", "read_behind", "read_window", "scores_at_once"
]  # fmt: skip
