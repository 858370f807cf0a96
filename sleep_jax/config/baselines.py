"""What the paper compares sleep with, each as a change of a config. Everything else stays as it was.

    cfg = baselines.BASELINES["loop_with_reset_state"](cfg)

| baseline                | what it lacks                      | so that the distance to sleep shows         |
|-------------------------|------------------------------------|---------------------------------------------|
| `plain_transformer`     | fast weights                       | what a memory gives past eviction           |
| `vanilla_hybrid`        | passes but the first               | what further passes give                    |
| `sliding_window_hybrid` | the same; the newest L tokens stay | ... where the newest tokens need no memory  |
| `loop_with_reset_state` | S carried from pass to pass        | what carrying S gives beyond depth          |

The last one is the loop of LT2 (arXiv 2605.20670).
"""

from collections.abc import Callable

from sleep_jax import config
from sleep_jax.config import ATTENTION, Config

ONE_PASS = {"num_passes": 1, "backprop_passes": None, "first_block": 0, "last_block": None}


def plain_transformer(cfg: Config) -> Config:
  """Attention in every block, under the same eviction: what left the cache is forgotten."""
  blocks = tuple(kind if kind in ATTENTION else "attn" for kind in cfg.model.blocks)
  return config.replace(cfg, model={"blocks": blocks}, sleep=ONE_PASS)


def vanilla_hybrid(cfg: Config) -> Config:
  """One pass over every window, which is then evicted whole: N = 1."""
  return config.replace(cfg, model={"eviction": "hard"}, sleep=ONE_PASS)


def sliding_window_hybrid(cfg: Config) -> Config:
  """One pass, and every token sees the newest L: the usual hybrid with a sliding window."""
  return config.replace(cfg, model={"eviction": "sliding"}, sleep=ONE_PASS | {"kept": "last"})


def loop_with_reset_state(cfg: Config) -> Config:
  """N passes, each from the S that the window began with: only the last one's write stays."""
  return config.replace(cfg, sleep={"state": "reset"})


BASELINES: dict[str, Callable[[Config], Config]] = {
  f.__name__: f for f in (plain_transformer, vanilla_hybrid, sliding_window_hybrid, loop_with_reset_state)
}
