"""Muon for the body's matrices, AdamW for the rest, by each weight's declared group.

The recipe is that of arXiv 2511.07384 (momentum as an exponential average, Nesterov, five
Newton-Schulz steps, AdamW with b2 = 0.95 and eps = 1e-10, decoupled weight decay, one schedule for
both, clipping before both). Muon sees one matrix per declared weight: queries, keys and values are
orthogonalised apart, and the heads of one projection together.
"""

import collections
import dataclasses
import fnmatch
import functools
import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sleep_jax import params
from sleep_jax.config import OptimConfig, check

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
FROBENIUS_EPS = 1e-7


def make(cfg: OptimConfig, declared: Any, steps: int) -> optax.GradientTransformation:
  """The optimizer of one run. Weights of the group `frozen` have no state and stay what they are.

  Args:
    cfg: settings.
    declared: nested dict of `params.Weight`, from `freeze`; the parameters must have the same structure.
    steps: of the whole run, where the schedule ends.

  Returns:
    A transformation whose updates are added to the parameters.
  """
  weights = _by_name(declared)
  multiplier = schedule(cfg, steps)
  decay = functools.partial(
    optax.add_decayed_weights, cfg.weight_decay, mask=functools.partial(_decays, weights)
  )
  groups: dict[Hashable, optax.GradientTransformation] = {
    "muon": optax.chain(
      scale_by_muon(cfg, weights),
      decay(),
      optax.scale_by_learning_rate(lambda step: cfg.muon_lr * multiplier(step)),
    ),
    "adam": optax.chain(
      optax.scale_by_adam(cfg.adam_b1, cfg.adam_b2, cfg.adam_eps),
      decay(),
      optax.scale_by_learning_rate(lambda step: cfg.adam_lr * multiplier(step)),
    ),
  }
  labels = jax.tree.map(lambda w: w.group, declared, is_leaf=params.is_weight)
  clip = optax.clip_by_global_norm(cfg.clip_norm)
  frozen = jax.tree.map(lambda label: label == "frozen", labels)
  if any(jax.tree.leaves(frozen)):
    groups["frozen"] = optax.set_to_zero()
    clip = optax.chain(optax.masked(optax.set_to_zero(), frozen), clip)  # the norm of what is trained
  return optax.chain(clip, optax.partition(groups, labels))


def freeze(cfg: OptimConfig, declared: Any) -> Any:
  """The declarations with all weights in group `frozen` that no pattern of `cfg.trained` names.

  Raises:
    ConfigError: if a pattern names no weight.
  """
  names = _by_name(declared)
  for i, pattern in enumerate(cfg.trained):
    found = fnmatch.filter(names, pattern)
    check(
      bool(found), f"optim.trained[{i}]", f"names no weight: {pattern!r}; a name is {next(iter(names))!r}"
    )

  def one(path, weight):
    name = params.name_of(path)
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in cfg.trained):
      return weight
    return dataclasses.replace(weight, group="frozen")

  return jax.tree_util.tree_map_with_path(one, declared, is_leaf=params.is_weight)


def hold(declared: Any, weights: Any) -> Any:
  """The weights, with frozen ones as constants: nothing is saved or computed for their gradients."""

  def one(weight, value):
    return jax.lax.stop_gradient(value) if weight.group == "frozen" else value

  return jax.tree.map(one, declared, weights, is_leaf=params.is_weight)


def schedule(cfg: OptimConfig, steps: int) -> optax.Schedule:
  """Multiplier of both learning rates: linear warm-up, 1, then cosine to `final_scale` at `steps`."""
  warmup = cfg.warmup_steps or round(cfg.warmup_share * steps)
  decay = cfg.decay_steps or round(cfg.decay_share * steps)

  def multiplier(step):
    step = jnp.asarray(step, jnp.float32)
    up = jnp.minimum(1.0, (step + 1) / warmup) if warmup else 1.0
    if not decay:
      return up * jnp.ones(())
    done = jnp.clip((step - (steps - decay)) / decay, 0.0, 1.0)
    return up * (cfg.final_scale + (1 - cfg.final_scale) * 0.5 * (1 + jnp.cos(jnp.pi * done)))

  return multiplier


class MuonState(NamedTuple):
  """Momentum, of the parameters' structure, float32."""

  momentum: Any


def scale_by_muon(cfg: OptimConfig, weights: dict[str, params.Weight]) -> optax.GradientTransformation:
  """Replaces each gradient by the nearest semi-orthogonal matrix of its Nesterov momentum.

  The result is scaled by sqrt(max(1, fan_out / fan_in)). Matrices of one shape, transposed ones too,
  go through Newton-Schulz in one batched call.
  """

  name_of = params.name_of

  def init(params):
    return MuonState(jax.tree.map(jnp.zeros_like, params))

  def update(updates, state, params=None):
    del params
    keep = cfg.muon_momentum
    momentum = jax.tree.map(lambda m, g: keep * m + (1 - keep) * g, state.momentum, updates)
    nesterov = jax.tree.map(lambda m, g: keep * m + (1 - keep) * g, momentum, updates)
    paths, treedef = jax.tree_util.tree_flatten_with_path(nesterov)
    names = [name_of(path) for path, _ in paths]
    arrays = [x for _, x in paths]
    run: Any = functools.partial(_orthogonalize_all, [weights[n].num_in for n in names], cfg)
    if not jax.sharding.get_abstract_mesh().empty:  # whole matrices are multiplied: XLA places them
      run = jax.sharding.auto_axes(run, out_sharding=[jax.typeof(x).sharding.spec for x in arrays])
    return jax.tree.unflatten(treedef, run(arrays)), MuonState(momentum)

  return optax.GradientTransformation(init, update)


def newton_schulz(x: jax.Array, steps: int) -> jax.Array:
  """Brings the singular values of each matrix near 1.

  On a CPU one matrix follows the other and stays in the caches. XLA's products of bfloat16 are fast there in
  two dimensions and with results of float32, and no faster than those of float32 otherwise.

  Args:
    x: [n, rows, columns] with rows <= columns; its dtype is that of the products' operands.
    steps: iterations of X <- a X + (b A + c A^2) X, A = X X^T.

  Returns:
    The same shape and dtype; singular values between about 0.7 and 1.2 where they were not tiny.
  """
  norms = jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(1, 2), keepdims=True))
  x = x / (norms + FROBENIUS_EPS).astype(x.dtype)

  def together(x):
    for _ in range(steps):
      x = _newton_schulz_step(x, x.dtype)
    return x

  def one(x):
    return jax.lax.fori_loop(0, steps, lambda _, x: _newton_schulz_step(x, jnp.float32), x)

  if not jax.sharding.get_abstract_mesh().empty:
    return together(x)
  return jax.lax.platform_dependent(x, cpu=functools.partial(jax.lax.map, one), default=together)


def _newton_schulz_step(x: jax.Array, dtype: Any) -> jax.Array:
  """One iteration on [..., rows, columns]; products are given, and added up, in `dtype`."""
  a, b, c = NEWTON_SCHULZ
  product = functools.partial(jnp.matmul, preferred_element_type=dtype)
  gram = product(x, x.mT)
  rounded = gram.astype(x.dtype)
  polynomial = b * gram + c * product(rounded, rounded)
  return (a * x + product(polynomial.astype(x.dtype), x)).astype(x.dtype)


def moved(average: Any, weights: Any, keep: float, step: jax.Array) -> Any:
  """The exponential moving average of the weights (Polyak and Juditsky, 1992, average evenly) a step later.

  Args:
    average, weights: of one structure; the weights are those behind the step.
    keep: how much of the average stays, once there were enough steps.
    step: its number, from 1; at most (1 + step) / (10 + step) stays.
  """
  step = step.astype(jnp.float32)
  new = 1 - jnp.minimum(keep, (1 + step) / (10 + step))
  return jax.tree.map(lambda a, w: a + new * (w - a), average, weights)


def partition_table(declared: Any, *, every: bool = True) -> str:
  """Which weight goes to which group, as text: one line a kind of weight if `every`, then the totals."""
  kinds: dict[tuple, list[str]] = collections.defaultdict(list)
  totals = collections.Counter()
  for name, w in _by_name(declared).items():
    kinds[(w.group, w.shape, w.decay)].append(name)
    totals[w.group] += math.prod(w.shape)
  lines = [
    f"  {group:6} {'x'.join(map(str, shape)):>12} {'' if decay else 'no decay':9} {', '.join(names)}"
    for (group, shape, decay), names in sorted(kinds.items(), key=lambda item: item[0][0], reverse=True)
  ]
  total = ", ".join(f"{group}: {totals[group]:,} parameters" for group in _groups_of(totals))
  return "\n".join([*(lines if every else ()), f"  {total}"])


def check_partition(opt_state: Any, declared: Any) -> None:
  """Asserts that Muon's momentum exists for exactly the weights that are declared `muon`, and AdamW's moments
  for those declared `adam`.

  Raises:
    AssertionError: naming the weights that differ.
  """
  kinds = {"muon": (MuonState, "momentum"), "adam": (optax.ScaleByAdamState, "mu")}
  states = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, tuple(k for k, _ in kinds.values())))
  for group, (kind, field) in kinds.items():
    found = set()
    for state in states:
      if isinstance(state, kind):
        held = jax.tree_util.tree_leaves_with_path(getattr(state, field))
        found |= {params.name_of(path) for path, _ in held}
    wanted = {name for name, w in _by_name(declared).items() if w.group == group}
    if found != wanted:
      raise AssertionError(
        f"{group} holds {sorted(found - wanted)} beside what was declared and lacks {sorted(wanted - found)}"
      )


def _orthogonalize_all(num_in: list[int], cfg: OptimConfig, arrays: list[jax.Array]) -> list[jax.Array]:
  """Orthogonalised and scaled arrays; one Newton-Schulz call for each shape."""
  flat, groups = [], collections.defaultdict(list)
  for i, (x, n) in enumerate(zip(arrays, num_in, strict=True)):
    matrix = x.reshape(math.prod(x.shape[:n]), -1)
    flat.append(matrix.T if matrix.shape[0] > matrix.shape[1] else matrix)
    groups[flat[-1].shape].append(i)
  out: list[Any] = [None] * len(arrays)
  for members in groups.values():
    stacked = jnp.stack([flat[i] for i in members]).astype(cfg.newton_schulz_dtype)
    for i, matrix in zip(members, newton_schulz(stacked, cfg.newton_schulz_steps), strict=True):
      x = arrays[i]
      fan_in = math.prod(x.shape[: num_in[i]])
      fan_out = x.size // fan_in
      matrix = matrix.T if fan_in > fan_out else matrix
      out[i] = (math.sqrt(max(1.0, fan_out / fan_in)) * matrix.astype(x.dtype)).reshape(x.shape)
  return out


def _groups_of(totals: collections.Counter) -> list[str]:
  """Groups to be told of; frozen weights only where there are any."""
  return [group for group in params.GROUPS if group != "frozen" or totals[group]]


def _by_name(declared: Any) -> dict[str, params.Weight]:
  """Declarations by path."""
  paths, _ = jax.tree_util.tree_flatten_with_path(declared, is_leaf=params.is_weight)
  return {params.name_of(path): weight for path, weight in paths}


def _decays(weights: dict[str, params.Weight], values: Any) -> Any:
  """Which of `values` decay: a tree of bools."""
  return jax.tree_util.tree_map_with_path(lambda path, _: weights[params.name_of(path)].decay, values)
