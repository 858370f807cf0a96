"""Published checkpoints: read, checked, run as models of this package, given a memory, and written back.

    cfg, weights, source = load("checkpoints/Ouro-1.4B")
    cfg, weights = add_memory(cfg, weights, jax.random.key(0))
    export("checkpoints/Ouro-1.4B-memory", cfg, weights, source)

`load_run` reads what a run has trained, whether its first weights were drawn or came from a checkpoint.

Weights are safetensors and configs are data: nothing that was downloaded is executed.
"""

from sleep_jax.pretrained.exporting import appear, export, export_own, write_like, write_own
from sleep_jax.pretrained.fields import PretrainedError
from sleep_jax.pretrained.fine_tuning import (
  StartConfig,
  check_start,
  start_digest,
  start_model,
  start_weights,
  tokenizer_file,
  trained_weights,
)
from sleep_jax.pretrained.from_run import Run, is_run, load_run, open_run, run_source, run_weights
from sleep_jax.pretrained.loading import Source, differing, load, open_source
from sleep_jax.pretrained.memory import add_memory, memory_config, memory_weights

__all__ = [
  "PretrainedError",
  "Run",
  "Source",
  "StartConfig",
  "add_memory",
  "appear",
  "check_start",
  "differing",
  "export",
  "export_own",
  "is_run",
  "load",
  "load_run",
  "memory_config",
  "memory_weights",
  "open_run",
  "open_source",
  "run_source",
  "run_weights",
  "start_digest",
  "start_model",
  "start_weights",
  "tokenizer_file",
  "trained_weights",
  "write_like",
  "write_own",
]
