"""Published checkpoints: read, checked, run as models of this package, given a memory, and written back.

    cfg, weights, source = load("checkpoints/Ouro-1.4B")
    cfg, weights = add_memory(cfg, weights, jax.random.key(0))
    export("checkpoints/Ouro-1.4B-memory", cfg, weights, source)

Weights are safetensors and configs are data: nothing that was downloaded is executed.
"""

from sleep_jax.pretrained.loading import PretrainedError, Source, export, load, open_source
from sleep_jax.pretrained.memory import add_memory, memory_weights
from sleep_jax.pretrained.start import check_start, start_weights

__all__ = [
  "PretrainedError",
  "Source",
  "add_memory",
  "check_start",
  "export",
  "load",
  "memory_weights",
  "open_source",
  "start_weights",
]
