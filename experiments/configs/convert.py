"""A checkpoint, or what a run has trained, read, checked and written again.

    python -m experiments.convert --config=experiments/configs/convert.py \\
      --config.source=checkpoints/Jet-Nemotron-2B                        # reads and checks, writes nothing
    python -m experiments.convert --config=experiments/configs/convert.py:memory \\
      --config.source=checkpoints/Ouro-1.4B --config.target=checkpoints/Ouro-1.4B-memory
    python -m experiments.convert --config=experiments/configs/convert.py:export \\
      --config.source=work/ouro/n4 --config.target=checkpoints/Ouro-1.4B-tuned
    python -m experiments.convert --config=experiments/configs/convert.py:gguf \\
      --config.source=SmolLM2.gguf --config.target=checkpoints/SmolLM2

    plain   reads and checks a checkpoint; with `target`, writes it again
    memory  inserts six Jet layers without MLP (16 heads of 128 x 128): 9.9 % more parameters for Ouro-1.4B,
            the same logits until they are trained
    export  writes the newest weights of a run (`--config.step=K`: those of a saved step). If the run began
            with a published checkpoint, they get the names and files of that checkpoint, its tokenizer,
            licence and other files beside them. In float32, so that nothing is lost
            (`--config.dtype=published` rounds to the checkpoint's dtypes). Any other run is written in our
            own format, `model_type: sleep_jax`, which every command here reads as it reads a published one
    gguf    makes a checkpoint of the Llama kind from a GGUF file (`pip install 'sleep_jax[gguf]'`), with the
            tokenizer, chat template and end tokens that are in it. Quantised tensors become float32

If the checkpoint of a run was moved, `--config.origin=FOLDER` says where it lies. Needs host memory for the
weights in float32: 4 bytes a parameter.
"""

from ml_collections import config_dict

PRESETS = ("plain", "memory", "export", "gguf")


def get_config(preset: str = "plain") -> config_dict.ConfigDict:
  if preset not in PRESETS:
    raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
  c = config_dict.ConfigDict()
  c.source, c.target = config_dict.placeholder(str), config_dict.placeholder(str)
  c.gguf = preset == "gguf"
  c.step, c.origin = config_dict.placeholder(int), config_dict.placeholder(str)
  c.memory_layers = 6 if preset == "memory" else 0
  c.fast = config_dict.create(num_heads=16, key_dim=128, value_dim=128)
  c.seed = 0
  c.dtype = "float32" if preset == "export" else "published"
  c.ignore = ()
  return c
