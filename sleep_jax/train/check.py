"""Whether a run fits together, asked before its folder is made."""

import jax

from sleep_jax import attention, fast_weights, model, optim, pretrained, sharding
from sleep_jax.config import Config, check
from sleep_jax.train.task import Task


def check_fits(cfg: Config, task: Task | None = None) -> jax.sharding.Mesh:
  """The mesh of a run. To be called before its workdir is made: a mistake then leaves nothing behind.

  Args:
    cfg: of the run.
    task: what is learnt, which has checks of its own. None: not made yet.

  Raises:
    ConfigError: where fields do not fit each other or the devices.
  """
  if task is not None:
    task.check(cfg)
  count = cfg.train.steps_per_dispatch
  for name in ("steps", "eval_every", "save_every"):
    value = getattr(cfg.train, name)
    check(
      value % count == 0,
      f"train.{name}",
      f"must be a multiple of train.steps_per_dispatch = {count}, got {value}",
    )
  fast_weights.check_kernel(cfg.model.fast)
  attention.check_form(cfg.model.attention)
  optim.freeze(cfg.optim, model.declare(cfg.model))
  if cfg.train.init_from is not None:
    pretrained.check_start(cfg.model, cfg.train.init_from, ignore=cfg.train.init_ignore)
  mesh = sharding.make_mesh(cfg.mesh)
  size, hosts = mesh.shape["data"], jax.process_count()
  check(
    hosts == 1 or (mesh.size == jax.device_count() and size % hosts == 0),
    "mesh",
    f"of {hosts} processes must take all {jax.device_count()} devices, and mesh.data be a multiple of"
    f" {hosts}, got {size} x {mesh.shape['model']}",
  )
  for name in ("batch_size", "eval_batch_size"):
    value = getattr(cfg.train, name)
    check(value % size == 0, f"train.{name}", f"must be a multiple of mesh.data = {size}, got {value}")
  part = cfg.train.batch_size // cfg.train.microbatches
  check(
    part % size == 0,
    "train.microbatches",
    f"must leave a part a multiple of mesh.data = {size} sequences, got parts of {part}",
  )
  return mesh
