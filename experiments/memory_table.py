"""Memory and time on paper: what Jet-Nemotron 2B and Ouro 1.4B with a memory need, from shapes alone.

    python -m experiments.memory_table
    python -m experiments.memory_table --passes=1,2,8 --tokens=24000

Prints Markdown. Nothing of the models is allocated, and no accelerator is touched.
"""

import dataclasses
from collections.abc import Sequence

import jax
from absl import flags

from sleep_jax import config, model, params, pretrained, windows
from sleep_jax.config import ModelConfig, OptimConfig, SleepConfig
from sleep_jax.cost import flops, footprint
from sleep_jax.experiments import cli
from sleep_jax.pretrained import jet_nemotron, memory, ouro

PASSES = flags.DEFINE_list("passes", ["1", "4"], "values of N, separated by commas")
TOKENS = flags.DEFINE_integer("tokens", 12_000, "T of the sequence trained on; its last window answers")

GB, MB = 1e9, 1e6
# Of an H200, from its data sheet: what no program can be faster than.
PEAK_FLOPS, PEAK_BYTES = 989e12, 4.8e12


@dataclasses.dataclass(frozen=True)
class Row:
  """One model.

  Attributes:
    name: as told.
    model, sleep: how it runs.
    stage_1: what is trained before everything is; None: it has no such stage.
  """

  name: str
  model: ModelConfig
  sleep: SleepConfig = SleepConfig()
  stage_1: OptimConfig | None = None


def rows() -> list[Row]:
  """The models of the table; activations in bfloat16, weights in float32."""
  looped = memory.memory_config(ouro.config_1_4b(dtype="bfloat16"))
  return [
    Row("Jet-Nemotron 2B", jet_nemotron.config_2b(dtype="bfloat16"), jet_nemotron.SLEEP_2B),
    Row("Ouro 1.4B + memory", looped, stage_1=OptimConfig(trained=pretrained.memory_weights(looped))),
  ]


def sizes(models: Sequence[Row]) -> str:
  """Weights, optimizer, fast weights and cache."""
  lines = [
    "| | parameters | weights, GB | optimizer, GB | optimizer of stage 1, GB | state a sequence, MB |"
    " KV cache at L, MB | L |",
    "|---|---:|---:|---:|---:|---:|---:|---:|",
  ]
  for row in models:
    cfg = row.model
    early = "" if row.stage_1 is None else f"{footprint.optimizer(cfg, row.stage_1) / GB:.2f}"
    lines.append(
      f"| {row.name} | {params.count(model.declare(cfg)):,}"
      f" | {footprint.size(footprint.weights(cfg)) / GB:.2f}"
      f" | {footprint.optimizer(cfg, OptimConfig()) / GB:.2f} | {early} | {footprint.state(cfg) / MB:.1f}"
      f" | {footprint.cache(cfg) / MB:.1f} | {cfg.window:,} |"
    )
  return "\n".join(lines)


def gradients(models: Sequence[Row], passes: Sequence[int], tokens: int) -> str:
  """What a gradient keeps, by `sleep.remat`."""
  lines = [
    f"| saved for a gradient of {tokens:,} tokens, GB | N | {' | '.join(footprint.REMAT)} |",
    "|---|---:|" + "---:|" * len(footprint.REMAT),
  ]
  for row in models:
    for n in passes:
      kept = [
        footprint.gradient(row.model, dataclasses.replace(row.sleep, num_passes=n, remat=remat), tokens)
        for remat in footprint.REMAT
      ]
      lines.append(f"| {row.name} | {n} | {' | '.join(f'{x / GB:.1f}' for x in kept)} |")
  return "\n".join(lines)


def times(models: Sequence[Row], passes: Sequence[int], tokens: int) -> str:
  """Operations a token, and the least time that an H200 can take for them."""
  lines = [
    "| | N | asleep, GFLOP a token | awake, GFLOP a token | asleep, us a token | decoding awake, us a token |"
    f" training on {tokens:,} tokens, TFLOP |",
    "|---|---:|---:|---:|---:|---:|---:|",
  ]
  for row in models:
    cfg = row.model
    for n in passes:
      sleep_cfg = dataclasses.replace(row.sleep, num_passes=n)
      window = cfg.window
      one = flops.per_sequence(windows.plan([i >= window for i in range(2 * window)], window), cfg, sleep_cfg)
      whole = flops.per_sequence(
        windows.plan([i == tokens - 1 for i in range(tokens)], window), cfg, sleep_cfg
      )
      read = 2 * params.count(model.declare(cfg)) + footprint.cache(cfg) + footprint.state(cfg)
      lines.append(
        f"| {row.name} | {n} | {one.asleep / window / GB:.1f} | {one.awake / window / GB:.1f}"
        f" | {one.asleep / window / PEAK_FLOPS * 1e6:.1f} | {read / PEAK_BYTES * 1e6:.0f}"
        f" | {whole.train / 1e12:,.0f} |"
      )
  return "\n".join(lines)


def main() -> int:
  try:
    passes = [int(n) for n in PASSES.value]
  except ValueError:
    raise config.ConfigError(f"passes: must be whole numbers, got {','.join(PASSES.value)}") from None
  config.check(bool(passes), "passes", "must have at least one N")
  for n in passes:
    config.at_least(n, 1, "passes")
  config.at_least(TOKENS.value, 1, "tokens")
  jax.config.update("jax_platforms", "cpu")
  models = rows()
  for table in (sizes(models), gradients(models, passes, TOKENS.value), times(models, passes, TOKENS.value)):
    print(table, end="\n\n")
  return cli.DONE


if __name__ == "__main__":
  cli.run(main)
