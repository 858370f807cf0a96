"""The shapes that the kernels are measured at, and inputs for them as a layer makes them."""

from collections.abc import Sequence

import numpy as np

from sleep_jax.kernels.common.op import declared

SHAPES = {  # B, T, H, K, V
  "R": (512, 24, 4, 64, 64),  # Rule 110
  "D": (32, 75, 8, 64, 64),  # Depo
  "J": (1, 2000, 12, 96, 256),  # the JetBlock of Jet-Nemotron 2B, one window of 2000
  "L": (1, 16384, 16, 128, 128),  # one long window of a large model: for accelerators
  "E": (128, 12, 1, 64, 64),  # a small model with one wide head
  "A": (128, 1, 1, 64, 64),  # one token of it
}
# The ops on q, k and v. `conv_gated_delta` makes these itself.
RULES = {name: op for name, op in declared().items() if {"q", "k", "v"} <= op.operands.keys()}


def make_inputs(
  rule: str, shape: Sequence[int], decay: float = 1.0
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
  """Random inputs of a rule, float32: unit keys, gates uniform in 0 to 1, log decays of mean -`decay`.

  Args:
    rule: a name in `RULES`.
    shape: B, T, H, K, V.
    decay: 20 is strong.

  Returns:
    The arguments by name, in the rule's order, S last; and cotangents of o and S.
  """
  op, sizes = RULES[rule], dict(zip("BTHKV", shape, strict=True))
  rng = np.random.default_rng(0)

  def normal(axes: Sequence[str]) -> np.ndarray:
    return rng.normal(size=[sizes[axis] for axis in axes]).astype(np.float32)

  x: dict[str, np.ndarray] = {}
  for name in (*op.operands, "S"):
    axes, size = op.axes(name), op.shape(name, sizes)
    if name == op.log_decay:
      x[name] = (-decay * rng.exponential(size=size)).astype(np.float32)
    elif name in op.float32:
      x[name] = rng.uniform(size=size).astype(np.float32)
    else:
      x[name] = normal(axes)
      if name in ("q", "k"):
        x[name] /= np.linalg.norm(x[name], axis=-1, keepdims=True)
  x["q"] *= np.float32(sizes["K"] ** -0.5)
  return x, [normal("BTHV"), normal("BHKV")]
