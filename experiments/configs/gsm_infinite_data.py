"""GSM-Infinite written to disk: a data set, its hashes, and its statistics beside the original's.

python -m experiments.gsm_infinite_data --config=experiments/configs/gsm_infinite_data.py:tiny --workdir=DIR

tiny       64 short problems to train on, 16 held out: seconds
reference  the mix of the original's sample, to compare statistics with it: 1 to 8 operations, half of them
           reverse, d = 2 and 3 alike (1 operation: 3), templates 3 : 1 : 1. Under a minute
paper      77,000 problems of 2,000-3,300 tokens, 1 to 8 operations, 1,600 held out of each kind: some minutes
"""

from ml_collections import config_dict

from sleep_jax.data.gsm_infinite import GsmInfiniteConfig
from sleep_jax.experiments import cli

PRESETS = ("tiny", "reference", "paper")


def get_config(preset: str = "tiny") -> config_dict.ConfigDict:
  """Fields: data (the task), seed, num (training problems), held_out (of each kind)."""
  c = config_dict.ConfigDict({"seed": 0, "num": 77_000, "held_out": 1600})
  c.data = cli.defaults(GsmInfiniteConfig())
  if preset == "tiny":
    c.update(num=64, held_out=16)
    c.data.update(min_tokens=250, max_tokens=500)
  elif preset == "reference":
    c.update(num=9600, held_out=160)
    c.data.update(subset="both", mode="both", templates=(0.6, 0.2, 0.2), min_tokens=2050, max_tokens=3250)
  elif preset != "paper":
    raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
  return c
