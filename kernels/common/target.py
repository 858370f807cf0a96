"""Which platform a program is for. It need not be this machine's: a program for a TPU is planned on a CPU."""

import jax

_NAMES = {"cuda": "gpu", "rocm": "gpu"}


def platform(*arrays: jax.Array) -> str:
  """The platform that the program being traced will run on: "cpu", "gpu" or "tpu".

  That of the mesh's devices, or of its abstract device: the mesh that is set (`jax.set_mesh`,
  `jax.sharding.use_abstract_mesh`), else one in the types of the arrays. Without either, or with an abstract
  mesh that says nothing about its devices, JAX's default backend.
  """
  meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in arrays)]
  for mesh in meshes:
    if mesh.abstract_device is not None:
      name = str(mesh.abstract_device.platform)
      return _NAMES.get(name, name)
  return jax.default_backend()
