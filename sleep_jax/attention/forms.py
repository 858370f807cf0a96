"""The one function by which queries attend to keys, and the choice among its four forms.

    dense     every score at once, [B, H, T, S]: for short windows
    blocked   online softmax over blocks, memory O(T), pure JAX: everywhere
    cudnn     cuDNN's fused attention, bfloat16 and float16: on CUDA
    splash    the Pallas kernel that comes with JAX: on TPUs

A form that is named is taken, or an error says why it cannot be. Otherwise the form is chosen for the devices
that the program is for (the mesh's, or its abstract device's), not for the machine that traces it.
"""

import functools
import importlib
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sleep_jax import config, layers
from sleep_jax.attention.blocked import MASKED, blocked
from sleep_jax.config import AttentionConfig
from sleep_jax.kernels.common import target

# Forms that can be named, by platform.
FORMS = {
  "cpu": ("dense", "blocked"),
  "gpu": ("dense", "blocked", "cudnn"),
  "tpu": ("dense", "blocked", "splash"),
}
KERNELS = ("cudnn", "splash")  # kernels of others; they take a whole window only
# What is tried, in turn, for a long window: the platform's fused form, or ours where that one cannot run.
LONG = {"cpu": ("blocked",), "gpu": ("cudnn", "blocked"), "tpu": ("splash", "blocked")}
# A window is short up to so many scores a head. Not measured: `benchmarks/attention.py` is to say where
# `dense` stops to be the fastest. All windows of this project's experiments but GSM-Infinite's are short.
SHORT = 512**2


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  offset: jax.Array | None = None,
  reach: int | None = None,
  valid: jax.Array | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Causal softmax attention with grouped queries: o_t = sum_s softmax(q_t . k_s / sqrt(d))_s v_s, s <= t.

  Scores and softmax are float32. Query head h reads key head h // (num_heads / num_kv_heads).

  >>> x = jnp.ones((1, 3, 2, 4))
  >>> attend(x, x[:, :, :1], x[:, :, :1], reach=2).shape
  (1, 3, 2, 4)

  Args:
    q: [B, T, num_heads, d].
    k, v: [B, S, num_kv_heads, d].
    offset: int32 scalar, place of the first query among the keys, 0 .. S - T: for the next tokens of an open
      window, whose cache has room left. None: the queries are at the last T keys. With an offset `dense` or
      `blocked` is taken, whatever is named: the fused forms cannot.
    reach: keys that a query sees, its own included. None: all up to its own.
    valid: [B, S] bool, False for pads, wherever they are; nobody attends to them. None: no pads.
    implementation: "dense", "blocked", "cudnn" or "splash". None: chosen for the size and the platform.

  Returns:
    [B, T, num_heads, d] in q's dtype. Where a query sees nothing, all forms but `dense` give 0 and no
    gradient, `dense` the mean of the values. Other queries at pads get something finite, which depends on
    the form.

  Raises:
    ValueError: no form has the name.
    NotImplementedError: the named form does not run on the platform, or does not take these arrays.
  """
  T, S = q.shape[1], k.shape[1]
  here = target.platform(q)
  *first, last = _candidates(T, S, implementation, here, whole=offset is None)
  _check_known(last, here)
  run = functools.partial(_run, q=q, k=k, v=v, offset=offset, reach=reach, valid=valid)
  for name in first:
    try:
      return run(name)
    except (NotImplementedError, ImportError) as reason:
      _warn_once(name, str(reason))
  return run(last)


def scores_at_once(T: int, S: int, implementation: str | None = None) -> bool:
  """Whether `attend` reads T queries of a whole window by `dense`, which holds all scores at once."""
  return T * S <= SHORT if implementation is None else implementation == "dense"


def check_form(attention: AttentionConfig) -> None:
  """Raises `ConfigError` if `attention.implementation` names a form that the platform does not have.

  The platform is that of the mesh that is set, else of this machine.
  """
  name, here = attention.implementation, target.platform()
  if name is not None:
    known = FORMS.get(here, FORMS["cpu"])
    config.check(name in known, "model.attention.implementation", _elsewhere(name, here))


def _candidates(T: int, S: int, named: str | None, platform: str, *, whole: bool) -> tuple[str, ...]:
  """The forms to try in turn."""
  short = ("dense",) if T * S <= SHORT else ()
  wanted = short or LONG.get(platform, LONG["cpu"]) if named is None else (named,)
  if whole:
    return wanted
  return tuple(name for name in wanted if name not in KERNELS) or short or ("blocked",)


def _check_known(name: str, platform: str) -> None:
  """Raises what `attend` does unless the platform has the form."""
  known = FORMS.get(platform, FORMS["cpu"])
  if name not in config.ATTENTION_FORMS:
    raise ValueError(f"attention: no implementation {name!r}; {config.nearest(str(name), known)}")
  if name not in known:
    raise NotImplementedError(f"attention: {_elsewhere(name, platform)}")


def _elsewhere(name: str, platform: str) -> str:
  """`'cudnn' runs on gpu, not on cpu; known here: dense, blocked`."""
  where, known = (p for p, names in FORMS.items() if name in names), FORMS.get(platform, FORMS["cpu"])
  return f"{name!r} runs on {', '.join(where)}, not on {platform}; known here: {', '.join(known)}"


@functools.cache
def _warn_once(name: str, reason: str) -> None:
  logging.warning("attention: skipped %s: %s", name, reason)


def _run(
  name: str,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  offset: jax.Array | None,
  reach: int | None,
  valid: jax.Array | None,
) -> jax.Array:
  """One form; all but `dense` on each device's own rows and heads."""
  T, S = q.shape[1], k.shape[1]
  if name == "dense":
    queries_at = jnp.arange(T) + (S - T if offset is None else offset)
    return dense(q, k, v, allowed(queries_at, jnp.arange(S), reach, valid))
  if reach is not None and reach >= S:
    reach = None
  if name == "blocked":
    optional = {"valid": valid, "offset": offset}
    run = functools.partial(blocked, reach=reach, **({"offset": S - T} if offset is None else {}))
  else:
    optional = {"valid": valid}
    fused = getattr(importlib.import_module(f"sleep_jax.attention.{name}"), name)
    run = functools.partial(fused, reach=reach)
  return _on_mesh(run, q, k, v, {key: x for key, x in optional.items() if x is not None})


def _on_mesh(
  run: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, optional: dict[str, jax.Array]
) -> jax.Array:
  """Runs on each device's own rows and heads if an explicit mesh says who holds which.

  Nothing is communicated. Heads of keys that the devices cannot share out are repeated first, as often as
  needed and no more.

  Args:
    run: (q, k, v, **optional) -> like q.
    optional: `valid` [B, S], `offset` scalar, or neither.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    mesh = jax.typeof(q).sharding.mesh
  if not any(kind == AxisType.Explicit for kind in mesh.axis_types):
    return run(q, k, v, **optional)
  rows, _, heads, _ = jax.typeof(q).sharding.spec
  axes = heads if isinstance(heads, tuple) else filter(None, [heads])
  ways = math.prod(mesh.shape[axis] for axis in axes)
  if (times := ways // math.gcd(k.shape[2], ways)) > 1:
    k, v = (layers.repeated(x, times) for x in (k, v))
  wide = P(rows, None, heads, None)
  places = {"valid": P(rows, None), "offset": P()}
  names = tuple(optional)
  specs = (wide, wide, wide, *(places[name] for name in names))
  arrays = [
    jax.reshard(x, jax.NamedSharding(mesh, spec))
    for x, spec in zip((q, k, v, *optional.values()), specs, strict=True)
  ]

  def local(q: jax.Array, k: jax.Array, v: jax.Array, *others: jax.Array) -> jax.Array:
    return run(q, k, v, **dict(zip(names, others, strict=True)))

  return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=wide, check_vma=False)(*arrays)


def allowed(
  queries_at: jax.Array, keys_at: jax.Array, reach: int | None, valid: jax.Array | None
) -> jax.Array:
  """Which keys a query sees: those up to its own place, the newest `reach` of them, no pads.

  Args:
    queries_at, keys_at: places [T] and [keys].
    valid: [B, keys] bool.

  Returns:
    [B or 1, 1, T, keys] bool.
  """
  distance = queries_at[:, None] - keys_at[None, :]
  seen = distance >= 0
  if reach is not None:
    seen &= distance < reach
  seen = seen[None, None]
  return seen if valid is None else seen & valid[:, None, None, :]


def dense(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
  """Softmax attention with grouped queries, all scores at once; scores and softmax in float32.

  Args:
    q: [B, T, num_heads, head_dim].
    k, v: [B, keys, num_kv_heads, head_dim].
    seen: [B or 1, 1, T, keys] bool. A query that sees nothing gets the mean of all values.

  Returns:
    [B, T, num_heads, head_dim] in q's dtype.
  """
  groups = q.shape[2] // k.shape[2]
  if groups > 1:
    k, v = (layers.repeated(x, groups) for x in (k, v))
  scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) * q.shape[3] ** -0.5
  shares = jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1).astype(q.dtype)
  return jnp.einsum("bhts,bshd->bthd", shares, v)
