"""A checkpoint in published format, read, checked and written again.

    python -m experiments.convert --config=experiments/configs/convert.py \
      --config.source=checkpoints/Jet-Nemotron-2B                        # reads and checks, writes nothing
    python -m experiments.convert --config=experiments/configs/convert.py:memory \
      --config.source=checkpoints/Ouro-1.4B --config.target=checkpoints/Ouro-1.4B-memory

`memory` inserts six Jet layers without MLP (16 heads of 128 x 128): 9.9 % more parameters for Ouro-1.4B, the
same logits until they are trained. Needs host memory for the weights in float32: 4 bytes a parameter.
"""

from ml_collections import config_dict


def get_config(preset: str = "plain") -> config_dict.ConfigDict:
  if preset not in ("plain", "memory"):
    raise ValueError(f"unknown preset {preset!r}; known: plain, memory")
  c = config_dict.ConfigDict()
  c.source, c.target = config_dict.placeholder(str), config_dict.placeholder(str)
  c.memory_layers = 6 if preset == "memory" else 0
  c.fast = config_dict.create(num_heads=16, key_dim=128, value_dim=128)
  c.seed = 0
  c.ignore = ()
  return c
