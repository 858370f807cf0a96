"""Compiles a rule for a TPU that need not be there."""

import functools
import os
from collections.abc import Callable, Sequence

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def compiled(device: str, shape: Sequence[int], mode: str, rule: Callable, dtype: str = "bfloat16"):
  """Compiles `rule` ("forward") or its forward and backward pass ("grad") for an absent TPU."""
  import jax
  import jax.numpy as jnp
  from jax.experimental import topologies
  from jax.sharding import SingleDeviceSharding

  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  chip = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[device]).devices[0]
  struct = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(chip))
  B, T, H, K, V = shape
  tokens = [struct((B, T, H, width), jnp.dtype(dtype)) for width in (K, K, V)]
  inputs = [*tokens, *[struct((B, T, H), jnp.float32)] * 2, struct((B, H, K, V), jnp.float32)]

  def grad(*x):
    outputs, pull = jax.vjp(rule, *x[:6])
    return outputs, pull(x[6:])

  if mode == "grad":
    inputs += [tokens[2], inputs[5]]
  program = jax.jit(rule if mode == "forward" else grad)
  return program.trace(*inputs).lower(lowering_platforms=("tpu",)).compile()
