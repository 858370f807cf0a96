"""One pass over the blocks: (h, state) -> (h, state).

A block is a mixer and an MLP, each behind an RMSNorm and added to the residual stream; with sandwich norms
through a second RMSNorm, and in attention blocks of some models through that one alone. The mixer is
attention (`attn`; `swa` to the last few tokens only, `nope` without rotary angles) or a fast-weight layer,
named by its rule. Blocks listed in `without_mlp` have a norm and a mixer but no MLP.

Equal blocks can run under one `lax.scan` over their weights, stacked: see `arrange`.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from sleep_jax import attention, carry, fast_weights, layers, params
from sleep_jax.config import ATTENTION, ModelConfig
from sleep_jax.rules import RULES

Weights = dict[str, Any]
# Of the attention blocks of one pass awake, by number.
Caches = dict[str, attention.KVCache]
# Two equal stretches under a loop compile hardly sooner than written out, and the paper-size model of Rule
# 110 then trains 1.2 to 1.4 times more slowly on a CPU (`depth` in benchmarks/README.md).
LEAST = 3


def declare(cfg: ModelConfig) -> dict[str, Weights]:
  """The weights of all blocks, by number."""
  return {str(i): declare_block(cfg, kind, _has_mlp(cfg, i)) for i, kind in enumerate(cfg.blocks)}


def declare_block(cfg: ModelConfig, kind: str, mlp: bool) -> Weights:
  """The weights of one block, as a nested dict of `params.Weight`."""
  d, hidden = cfg.embed_dim, cfg.mlp_dim or 2 * cfg.embed_dim
  mixer = attention.declare(cfg) if kind in ATTENTION else fast_weights.declare(cfg, kind)
  norm = params.scale(d, zero=cfg.norm_zero_centered)
  if not mlp:
    return {"norm": norm, "mixer": mixer}
  declared: Weights = {
    "mixer": mixer,
    "mlp": {
      "gate": params.matrix(d, hidden, axes=("w_embed", "mlp")),
      "up": params.matrix(d, hidden, axes=("w_embed", "mlp")),
      "down": params.matrix(hidden, d, axes=("mlp", "w_embed")),
    },
  }
  in_front, behind = _norms(cfg, kind, mlp)
  if in_front:
    declared |= {"norm": norm, "mlp_norm": norm}
  if behind:
    declared |= {"post_norm": norm, "mlp_post_norm": norm}
  if cfg.mlp_bias:
    for name, width, axis in (("gate", hidden, "mlp"), ("up", hidden, "mlp"), ("down", d, None)):
      declared["mlp"][f"{name}_bias"] = params.bias(width, axes=(axis,))
  return declared


def _norms(cfg: ModelConfig, kind: str, mlp: bool) -> tuple[bool, bool]:
  """Whether a block has norms on what its mixer and its MLP read, and on what they add."""
  alone = cfg.norm_placement == "after_attention" and kind in ATTENTION
  return not (mlp and alone), mlp and (alone or cfg.norm_placement == "sandwich")


def _has_mlp(cfg: ModelConfig, index: int) -> bool:
  return index not in cfg.without_mlp


def block(
  weights: Weights,
  h: jax.Array,
  memory: Any,
  *,
  kind: str,
  mlp: bool,
  cfg: ModelConfig,
  valid: jax.Array | None = None,
  decoding: bool = False,
) -> tuple[jax.Array, Any]:
  """One block.

  Args:
    weights: as `declare_block` declares them.
    h: hidden states [B, T, D].
    memory: of this block. A fast-weight block's is `FastWeights`. Attention's is its `KVCache` when decoding,
      else `Kept` under sliding eviction and None under hard eviction.
    kind: name of the mixer.
    mlp: whether there is one.
    valid: [B, T] bool, False for pads. None: all valid.
    decoding: h are the next tokens of a window that is open, not a whole window.

  Returns:
    h and the memory behind the block.
  """

  in_front, behind = _norms(cfg, kind, mlp)

  def normed(x: jax.Array, name: str, there: bool) -> jax.Array:
    return layers.norm(x, weights[name], cfg) if there else x

  with jax.named_scope(kind):
    x = normed(h, "norm", in_front)
    mixed, memory = _mix(weights["mixer"], x, memory, kind=kind, cfg=cfg, valid=valid, decoding=decoding)
    h = h + _scaled(normed(mixed, "post_norm", behind), cfg)
  if mlp:
    with jax.named_scope("mlp"):
      x, rounded = normed(h, "mlp_norm", in_front), None if decoding else cfg.rounded
      out = layers.swiglu(weights["mlp"], x, apart=decoding, rounded=rounded)
      h = h + _scaled(normed(out, "mlp_post_norm", behind), cfg)
  return h, memory


def _scaled(added: jax.Array, cfg: ModelConfig) -> jax.Array:
  return added if cfg.residual_scale == 1 else cfg.residual_scale * added


def _mix(
  weights: Weights,
  x: jax.Array,
  memory: Any,
  *,
  kind: str,
  cfg: ModelConfig,
  valid: jax.Array | None,
  decoding: bool,
) -> tuple[jax.Array, Any]:
  """The mixer of `block`: [B, T, D] -> [B, T, D], and its memory."""
  if kind not in ATTENTION:
    return fast_weights.fast_weights(weights, x, memory, cfg, RULES[kind], valid=valid, apart=decoding)
  reach = cfg.attention.swa_window if kind == "swa" else None
  sees = {"valid": valid, "reach": reach, "rotated": kind != "nope"}
  if decoding:
    return attention.decode(weights, x, memory, cfg, **sees)
  if cfg.eviction == "sliding":
    return attention.read_behind(weights, x, memory, cfg, **sees)
  return attention.read_window(weights, x, cfg, **sees), None


@flax.struct.dataclass
class Group:
  """`count` repetitions of a stretch of neighbouring blocks, which run under one loop.

  Attributes:
    weights: of each block of the stretch, arrays [count, ...]; with count = 1 as declared.
    start: number of the first block.
    count: repetitions.
  """

  weights: tuple[Weights, ...]
  start: int = flax.struct.field(pytree_node=False)
  count: int = flax.struct.field(pytree_node=False)

  def names(self, place: int) -> list[str]:
    """The blocks at one place of the stretch, one a repetition."""
    return _names(self.start, len(self.weights), self.count, place)


def _names(start: int, period: int, count: int, place: int) -> list[str]:
  return [str(start + r * period + place) for r in range(count)]


def arrange(
  weights: dict[str, Weights],
  cfg: ModelConfig,
  first: int = 0,
  last: int | None = None,
  *,
  scan: bool = False,
) -> tuple[Group, ...]:
  """Blocks `first` .. `last` - 1, as `run` takes them.

  Args:
    weights: as declared.
    scan: stack the weights of equal blocks and of repeating patterns that come at least `LEAST` times, so
      that each pattern is compiled once. The numbers are the same but for rounding. Stacking copies the
      weights: do it once a step, outside of loops.
  """
  last = len(cfg.blocks) if last is None else last
  kinds = tuple((cfg.blocks[i], _has_mlp(cfg, i)) for i in range(first, last))
  stretches = repeats(kinds) if scan else tuple((i, 1, 1) for i in range(len(kinds)))
  groups = []
  for at, period, count in stretches:
    start = first + at
    members = [[weights[name] for name in _names(start, period, count, place)] for place in range(period)]
    stacked = [jax.tree.map(lambda *x: jnp.stack(x), *m) if count > 1 else m[0] for m in members]
    groups.append(Group(tuple(stacked), start, count))
  return tuple(groups)


@functools.cache
def repeats(kinds: tuple[Any, ...]) -> tuple[tuple[int, int, int], ...]:
  """Cuts a sequence into repeated stretches so that as few entries as possible are written out.

  What comes fewer than `LEAST` times is written out.

  >>> repeats(("a", "b", "a", "b", "a", "b", "c", "c"))
  ((0, 2, 3), (6, 1, 1), (7, 1, 1))

  Returns:
    (start, period, count) of each stretch; of equally short ways the one with the fewest stretches.
  """
  size = len(kinds)
  best: list[tuple[int, int, tuple[tuple[int, int, int], ...]]] = [(0, 0, ())] * (size + 1)
  for start in reversed(range(size)):
    options = []
    for period in range(1, size - start + 1):
      stretch, count = kinds[start : start + period], 1
      while True:
        if count >= LEAST or period == count == 1:
          written, stretches, rest = best[start + period * count]
          options.append((written + period, stretches + 1, ((start, period, count), *rest)))
        if kinds[start + count * period : start + (count + 1) * period] != stretch:
          break
        count += 1
    best[start] = min(options, key=lambda option: option[:2])
  return best[0][2]


def run(
  groups: tuple[Group, ...],
  h: jax.Array,
  state: carry.State,
  cfg: ModelConfig,
  *,
  valid: jax.Array | None = None,
  caches: Caches | None = None,
  remat: bool = False,
) -> tuple[jax.Array, carry.State, Caches]:
  """One pass over the blocks of `groups`.

  Args:
    groups: from `arrange`.
    h: hidden states [B, T, D], in the activation dtype.
    state: inside a pass; blocks that do not run keep theirs.
    valid: [B, T] bool, False for pads. None: all valid.
    caches: earlier tokens of the same window, for decoding. None: h is the whole window.
    remat: keep only each block's input for the way back.

  Returns:
    h, state and caches ({} if none came in) after the pass.
  """
  decoding = caches is not None
  fast, kept, caches = dict(state.fast), dict(state.kept), dict(caches or {})
  for group in groups:
    kinds = cfg.blocks[group.start : group.start + len(group.weights)]
    memories = [fast if kind not in ATTENTION else caches if decoding else kept for kind in kinds]
    bodies = []
    for place, kind in enumerate(kinds):
      mlp = _has_mlp(cfg, group.start + place)
      run_one = _traced_once if decoding else block
      body = functools.partial(run_one, kind=kind, mlp=mlp, cfg=cfg, valid=valid, decoding=decoding)
      bodies.append(jax.checkpoint(body, prevent_cse=group.count == 1) if remat else body)

    if group.count == 1:
      for place, (weights, body, memory) in enumerate(zip(group.weights, bodies, memories, strict=True)):
        (name,) = group.names(place)
        with jax.named_scope(f"block_{name}"):
          h, after = body(weights, h, memory.get(name))
        if after is not None:
          memory[name] = after
      continue

    def stretch(h, xs, bodies=bodies):
      after = []
      for body, weights, memory in zip(bodies, *xs, strict=True):
        h, memory = body(weights, h, memory)
        after.append(memory)
      return h, tuple(after)

    names = [group.names(place) for place in range(len(kinds))]
    before = tuple(_stacked([m.get(n) for n in ns]) for m, ns in zip(memories, names, strict=True))
    with jax.named_scope(f"blocks_{names[0][0]}_to_{names[-1][-1]}"):
      h, after = jax.lax.scan(stretch, h, (group.weights, before))
    for memory, ns, stacked in zip(memories, names, after, strict=True):
      if stacked is not None:
        memory |= {n: jax.tree.map(lambda x, r=r: x[r], stacked) for r, n in enumerate(ns)}
  return h, carry.State(fast, kept), caches


# Of the many equal blocks of a large model that decodes, written out, one is traced and lowered for all; the
# compiler puts it in their places. In training the way back would keep more than it needs.
_traced_once = jax.jit(block, static_argnames=("kind", "mlp", "cfg", "decoding"))


def _stacked(memories: list[Any]) -> Any:
  """Memories of equal blocks, each array [count, ...]; None if they have none."""
  return None if memories[0] is None else jax.tree.map(lambda *x: jnp.stack(x), *memories)
