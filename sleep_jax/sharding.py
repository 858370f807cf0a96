"""The mesh, and the one table that says which logical axis lies on which mesh axis.

Without a mesh everything here is the identity, so that pure code runs anywhere. With one
(`jax.set_mesh(make_mesh(...))`, explicit axes) shardings are part of every array's type, and the
places where JAX cannot infer one, projections and look-ups, name it through `spec`.
"""

from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sleep_jax.config import ConfigError, MeshConfig

RULES = {  # logical axis -> mesh axis
  "batch": "data",
  "seq": None,
  "embed": None,  # D of an activation
  "w_embed": "data",  # D of a weight: FSDP
  "heads": "model",
  "head_dim": None,
  "mlp": "model",
  "vocab": "model",
}


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> jax.sharding.Mesh:
  """A mesh with the explicit axes `data` and `model`.

  Args:
    config: sizes; `data` = -1 takes what `model` leaves.
    devices: default: all of them.

  Raises:
    ConfigError: if the devices do not divide so.
  """
  devices = list(jax.devices() if devices is None else devices)
  data = len(devices) // config.model if config.data == -1 else config.data
  if data * config.model > len(devices) or data == 0 or (config.data == -1 and len(devices) % config.model):
    raise ConfigError(
      f"mesh: data = {config.data} x model = {config.model} does not fit {len(devices)} device(s)"
    )
  return jax.make_mesh(
    (data, config.model),
    ("data", "model"),
    axis_types=(AxisType.Explicit,) * 2,
    devices=devices[: data * config.model],
  )


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...]) -> P | None:
  """The PartitionSpec of some logical axes, or None where no mesh is set.

  Args:
    axes: logical names, one a dimension; a name that RULES lacks is an error, not a replicated array.
    shape: sizes; a dimension that its mesh axis does not divide (three tokens over two devices) stays whole.

  Raises:
    KeyError: for a name that RULES lacks.
    ValueError: if two dimensions would lie on one mesh axis.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return None
  physical = [None if a is None else RULES[a] for a in axes]
  physical = [p if p and size % mesh.shape[p] == 0 else None for p, size in zip(physical, shape, strict=True)]
  used = [p for p in physical if p is not None]
  if len(set(used)) < len(used):
    raise ValueError(f"{axes} puts one mesh axis on two dimensions: {physical}")
  return P(*physical)


def of(x: jax.Array) -> P | None:
  """How `x` is laid out: its PartitionSpec, or None where no mesh is set."""
  return None if jax.sharding.get_abstract_mesh().empty else jax.typeof(x).sharding.spec


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """`x` laid out as its logical axes say; `x` itself without a mesh."""
  wanted = spec(axes, x.shape)
  return x if wanted is None else jax.reshard(x, wanted)


def put(batch: Any, mesh: jax.sharding.Mesh) -> Any:
  """NumPy arrays [rows of this host, ...] on the devices, their rows split over the mesh axis of `batch`.

  Args:
    mesh: of one device: arrays go to the default one, and no mesh is part of their type.
  """
  if mesh.size == 1:
    return jax.device_put(batch)
  layout = jax.sharding.NamedSharding(mesh, P(RULES["batch"]))
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(layout, x), batch)
