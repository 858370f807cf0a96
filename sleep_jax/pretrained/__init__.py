"""Published checkpoints: read, checked, run as models of this package, given a memory, and written back.

    cfg, weights, source = load("checkpoints/Ouro-1.4B")
    cfg, weights = add_memory(cfg, weights, jax.random.key(0))
    export("checkpoints/Ouro-1.4B-memory", cfg, weights, source)

A run that began with a checkpoint (`train.init_from`) is read in its place with `load_run`.

Weights are safetensors and configs are data: nothing that was downloaded is executed.
"""

from sleep_jax.pretrained.fine_tuning import (
  StartConfig,
  check_start,
  published_folder,
  start_model,
  start_weights,
  trained_weights,
)
from sleep_jax.pretrained.from_run import is_run, load_run
from sleep_jax.pretrained.loading import PretrainedError, Source, differing, export, load, open_source
from sleep_jax.pretrained.memory import add_memory, memory_weights

__all__ = [
  "PretrainedError",
  "Source",
  "StartConfig",
  "add_memory",
  "check_start",
  "differing",
  "export",
  "is_run",
  "load",
  "load_run",
  "memory_weights",
  "open_source",
  "published_folder",
  "start_model",
  "start_weights",
  "trained_weights",
]
