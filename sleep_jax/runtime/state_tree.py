"""A state as a checkpoint sees it: dotted path -> array, so that restoring depends on no class."""

import collections
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from sleep_jax.runtime.manifest import CheckpointError


def flatten(tree: Any, *, abstract: bool = False) -> dict[str, Any]:
  """The leaves of a pytree by dotted path.

  Args:
    tree: of jax.Array; if `abstract`, of anything with a shape and a dtype.

  Raises:
    CheckpointError: if it holds anything else, nothing, or two leaves with one path.
  """
  flat = {}
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    path = jax.tree_util.keystr(key_path, simple=True, separator=".") or "value"
    if path in flat:
      raise CheckpointError(f"two leaves of the state are both called {path}")
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype") if abstract else isinstance(leaf, jax.Array)):
      raise CheckpointError(f"{path} is a {type(leaf).__name__}, a state holds nothing but jax arrays")
    flat[path] = leaf
  if not flat:
    raise CheckpointError("the state holds no arrays")
  return flat


def is_key(leaf: Any) -> bool:
  """Whether a leaf is an array of typed PRNG keys."""
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def key_impl(dtype: Any) -> str:
  """The name of the generator that keys of a dtype belong to.

  Raises:
    CheckpointError: if it is none of JAX's own.
  """
  for impl in ("threefry2x32", "rbg", "unsafe_rbg"):
    if jax.eval_shape(lambda impl=impl: jax.random.key(0, impl=impl)).dtype == dtype:
      return impl
  raise CheckpointError(f"PRNG keys of type {dtype} cannot be restored")


def sharding(path: str, leaf: Any) -> jax.sharding.Sharding:
  """Where a leaf is restored to: its own sharding, or one on the mesh of jax.set_mesh, or one device.

  Raises:
    CheckpointError: naming `path`, if there is no mesh and one device is not enough.
  """
  mesh = jax.sharding.get_mesh()
  own: Any = getattr(leaf, "sharding", None)
  abstract = (
    own if isinstance(own, NamedSharding) and isinstance(own.mesh, jax.sharding.AbstractMesh) else None
  )
  if own is not None and abstract is None:
    return own
  if not mesh.empty:
    return NamedSharding(mesh, PartitionSpec() if abstract is None else abstract.spec)
  if jax.process_count() > 1 or (abstract is not None and not abstract.mesh.empty):
    raise CheckpointError(f"{path} has no devices to be restored to; enter the mesh with jax.set_mesh first")
  return jax.sharding.SingleDeviceSharding(jax.devices()[0])


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
  return jnp.stack([jnp.isfinite(x).all() for x in leaves])


def non_finite(flat: dict[str, jax.Array]) -> list[str]:
  """Paths of the arrays that hold NaN or infinity."""
  groups = collections.defaultdict(list)  # one compiled check takes arrays of one set of devices
  for path, x in flat.items():
    if x.size and jnp.issubdtype(x.dtype, jnp.inexact):
      groups[frozenset(x.sharding.device_set)].append(path)
  bad = []
  for paths in groups.values():
    finite = jax.device_get(_all_finite([flat[path] for path in paths]))
    bad += [path for path, ok in zip(paths, finite, strict=True) if not ok]
  return bad
