"""Text from a checkpoint in published format, asleep whenever the window is full.

    python -m experiments.generate --config=experiments/configs/generate.py:jet \\
      --config.checkpoint=checkpoints/Jet-Nemotron-2B --prompt_file=book.txt --session=book.session
    python -m experiments.generate --config=experiments/configs/generate.py:ouro \\
      --config.checkpoint=checkpoints/Ouro-1.4B-memory --prompt='Once upon a time' \\
      --config.sampling.temperature=0.8

    plain  reads every window once; for any checkpoint
    jet    loops the middle 14 of 28 blocks four times, as in the paper
    ouro   loops all blocks four times, as in the paper

A checkpoint that was not trained to sleep should not be expected to profit from it. In bfloat16 a 2B model
needs about 4 GB (`param_dtype`).
"""

from ml_collections import config_dict

from sleep_jax.config import SleepConfig
from sleep_jax.experiments import cli
from sleep_jax.generate import SamplingConfig

PRESETS = ("plain", "jet", "ouro")


def get_config(preset: str = "plain") -> config_dict.ConfigDict:
  if preset not in PRESETS:
    raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
  c = config_dict.ConfigDict()
  c.checkpoint = config_dict.placeholder(str)
  c.window, c.predict_passes = config_dict.placeholder(int), config_dict.placeholder(int)
  c.eviction = "hard"
  c.dtype = c.param_dtype = "float32"
  c.sleep, c.sampling = cli.defaults(SleepConfig()), cli.defaults(SamplingConfig())
  c.max_new_tokens, c.stop, c.stop_strings, c.rows, c.seed, c.ignore = 200, (), (), 8, 0, ()
  if preset == "jet":
    c.sleep.update(num_passes=4, first_block=7, last_block=21)
  elif preset == "ouro":
    c.sleep.num_passes = 4
  return c
