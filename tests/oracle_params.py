"""Parameter trees for the oracle: conversions, paths into nested dicts, and random parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray
Tree = dict[str, Any]


def as_float64(tree: Any) -> Any:
  """A nested dict with float64 leaves; complex leaves become complex128."""
  if isinstance(tree, Mapping):
    return {key: as_float64(value) for key, value in tree.items()}
  value = np.asarray(tree)
  return value.astype(np.complex128 if np.iscomplexobj(value) else np.float64)


def leaves(tree: Tree, prefix: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Array]]:
  """(path, array) of every tensor, in the tree's order."""
  if not isinstance(tree, Mapping):
    return [(prefix, np.asarray(tree))]
  return [found for key, value in tree.items() for found in leaves(value, (*prefix, key))]


def leaf(tree: Tree, path: Sequence[str]) -> Any:
  """The tensor (or gradient, or anything) at a path; also for trees that are not ours."""
  for key in path:
    tree = tree[key]
  return tree


def replace_leaf(tree: Tree, path: Sequence[str], value: Any) -> Any:
  """A copy of the tree with one leaf replaced."""
  return value if not path else {**tree, path[0]: replace_leaf(tree[path[0]], path[1:], value)}


def random_params(
  seed: int,
  pattern: Sequence[str],
  *,
  vocab: int = 11,
  width: int = 12,
  mlp_width: int = 16,
  heads: int = 4,
  kv_heads: int = 2,
  head_dim: int = 4,
  fast_heads: int = 2,
  key_width: int = 3,
  value_width: int = 5,
  conv_size: int = 4,
  qk_norm: bool = True,
) -> Tree:
  """Parameters in the package's layout with no entry at a special value: norms near but not at one,
  decays over about 0.2 to 1, no zero anywhere. Sizes differ from each other, so a swapped axis shows."""
  rng = np.random.default_rng(seed)

  def matrix(*shape: int, fan_in: int | None = None) -> Array:
    return rng.normal(size=shape) / np.sqrt(fan_in or shape[0])

  def scale(size: int) -> Array:
    return rng.uniform(0.5, 1.5, size)

  def gates(kind: str) -> Tree:
    by_channel = kind in ("kda", "gdn2")
    made: Tree = {} if by_channel or kind == "delta" else {"a": matrix(width, fast_heads)}
    if kind != "gdn2":
      made["b"] = matrix(width, fast_heads)
    if kind != "delta":
      per_head = (fast_heads, key_width) if by_channel else fast_heads
      made |= {"A_log": rng.normal(size=fast_heads) - 0.5, "dt_bias": rng.normal(size=per_head) - 1.0}
    if not by_channel:
      return made | {"gate": matrix(width, fast_heads, value_width)}
    for name, size in (("f", key_width), ("gate", value_width)):
      made |= {f"{name}_a": matrix(width, value_width), f"{name}_b": matrix(value_width, fast_heads, size)}
    if kind == "gdn2":
      made |= {"e": matrix(width, fast_heads, key_width), "w": matrix(width, fast_heads, value_width)}
      made["gate_bias"] = rng.normal(size=(fast_heads, value_width))
    return made

  blocks = {}
  for i, kind in enumerate(pattern):
    if kind == "attn":
      mixer = {
        "q": matrix(width, heads, head_dim),
        "k": matrix(width, kv_heads, head_dim),
        "v": matrix(width, kv_heads, head_dim),
        "o": matrix(heads, head_dim, width, fan_in=heads * head_dim),
      }
      if qk_norm:
        mixer |= {"q_norm": scale(head_dim), "k_norm": scale(head_dim)}
    else:
      widths = {"q": key_width, "k": key_width, "v": value_width}
      mixer = {name: matrix(width, fast_heads, size) for name, size in widths.items()}
      mixer |= gates(kind)
      mixer |= {
        "out_norm": scale(value_width),
        "o": matrix(fast_heads, value_width, width, fan_in=fast_heads * value_width),
      }
      if conv_size:
        mixer |= {f"{name}_conv": matrix(conv_size, fast_heads, size) for name, size in widths.items()}
    blocks[str(i)] = {
      "norm": scale(width),
      "mlp_norm": scale(width),
      "mlp": {
        "gate": matrix(width, mlp_width),
        "up": matrix(width, mlp_width),
        "down": matrix(mlp_width, width),
      },
      "mixer": mixer,
    }
  return {
    "embed": rng.normal(size=(vocab, width)),
    "final_norm": scale(width),
    "head": matrix(width, vocab),
    "blocks": blocks,
  }
