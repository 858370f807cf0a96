"""Trains and evaluates one model on GSM-Infinite: one run is one (N, seed).

    python -m experiments.gsm_infinite --config=experiments/configs/gsm_infinite.py:tiny --workdir=work/gsm/n2
    python -m experiments.gsm_infinite --config=experiments/configs/gsm_infinite.py:jet_2b \\
      --config.pretrained.folder=checkpoints/Jet-Nemotron-2B --workdir=work/jet/n4

Problems are made as they are needed, and every answer is one forward pass: no loop, no worked
solution. Reports exact match by number of operations with a 95 % interval, on a balanced held-out set and on
one drawn as in training, beside what needs no reading: the commonest answer of each number of operations,
and the number that a text gives most often. Rerunning the same command resumes; a finished run is left alone.
"""

import functools
from typing import Any

from sleep_jax import config, pretrained
from sleep_jax.data.gsm_infinite import task as gsm
from sleep_jax.data.gsm_infinite import tokenizer as tokens
from sleep_jax.experiments import cli, fine_tuning
from sleep_jax.train import host_steps

CONFIG = cli.define_config_flag()
FIELDS = {"": config.Config, "data": gsm.TaskConfig, "pretrained": pretrained.StartConfig}
cli.define_workdir_flag()
cli.define_process_flags()


def build(values: dict[str, Any]) -> config.Config:
  """The checked config of a nested mapping; nothing is made yet.

  Args:
    values: with a group `pretrained`, a model, its weights and its tokenizer come from a checkpoint.

  Raises:
    ConfigError: for anything that is unknown, of the wrong type or does not fit.
  """
  if "pretrained" in values:
    values = fine_tuning.filled_in(values)
  cfg = config.run_from_dict(gsm.TaskConfig, values)
  data = cfg.data
  host_steps.check_fits(cfg, data.cut)
  config.check(
    cfg.seed not in (data.held_out_seed, gsm.TOKENIZER_SEED),
    "seed",
    f"must differ from data.held_out_seed = {data.held_out_seed} and {gsm.TOKENIZER_SEED}, got {cfg.seed}",
  )
  levels = len(gsm.groups(data))
  config.check(
    "balanced" not in data.held_out or cfg.train.eval_sequences % levels == 0,
    "train.eval_sequences",
    f"must be a multiple of the {levels} numbers of operations, got {cfg.train.eval_sequences}",
  )
  gsm.check_possible(data)
  needed = data.vocab_size
  if data.tokenizer:
    known = tokens.load(data.tokenizer)
    needed, size = known.vocab_size, len(known.answer_prompt)
    config.check(
      size <= gsm.MARGIN,
      "data.tokenizer",
      f"must ask for the answer in at most {gsm.MARGIN} tokens, but takes {size}",
    )
    gsm.check_answers(data)
  config.check(
    cfg.model.vocab_size >= needed,
    "model.vocab_size",
    f"must be at least {needed}, the tokens of the tokenizer, got {cfg.model.vocab_size}",
  )
  return cfg


def make_task(cfg: config.Config, folder: str) -> host_steps.HostTask:
  """The task; its tokenizer, if the config names none, is written to `folder`."""
  data = gsm.with_tokenizer(cfg.data, folder)
  blocks = -(-cfg.train.steps // data.cut.bucket_batches)
  return host_steps.HostTask(
    source=gsm.training(data, cfg.seed, blocks * data.cut.bucket_batches * cfg.train.batch_size),
    cut=data.cut,
    held_out=gsm.held_out(data, cfg.train.eval_sequences),
    groups=gsm.groups(data),
    threads=data.threads,
    workers=data.workers,
    describe=functools.partial(describe, gsm.groups(data)),
  )


def describe(groups: list[str], row: dict[str, Any]) -> str:
  """The accuracy on the first held-out set by number of operations, on one line."""
  by_operations = ", ".join(
    f"{name.removeprefix('op')} operations {100 * row[f'{name}_exact']:.1f} %"
    f" (commonest number {100 * row[f'{name}_shortcut']:.1f} %)"
    for name in groups
  )
  return f"right at {by_operations}"


SETS = {"balanced": "each number of operations as often", "faithful": "drawn as in training"}


def table(row: dict[str, Any], groups: list[str], kind: str, prefix: str = "") -> str:
  """What a row says of one held-out set by number of operations, as text.

  Args:
    kind: of the set.
    prefix: of its keys.
  """
  lines = [
    f"held out, {kind} ({SETS[kind]}):",
    f"{'operations':>10} {'problems':>8} {'right':>7} {'95 %':>15} {'commonest answer':>17}"
    f" {'commonest number':>17}",
  ]
  for name in groups:
    exact, low, high, *others = (
      row[f"{prefix}{name}_{x}"] for x in ("exact", "low", "high", "majority", "shortcut")
    )
    lines.append(
      f"{name.removeprefix('op'):>10} {row[f'{prefix}{name}_asked']:>8} {exact:>7.1%}"
      f" {f'{low:.1%} - {high:.1%}':>15}{''.join(f' {x:>17.1%}' for x in others)}"
    )
  return "\n".join(lines)


def tables(row: dict[str, Any], data: gsm.TaskConfig) -> str:
  """The table of every held-out set."""
  groups = gsm.groups(data)
  return "\n".join(table(row, groups, kind, f"{kind}_" if i else "") for i, kind in enumerate(data.held_out))


def open_task(values: dict[str, Any], folder: str) -> tuple[config.Config, host_steps.HostTask]:
  """See `tasks.open_task`; the folder has, or gets, the tokenizer."""
  cfg = build(values)
  return cfg, make_task(cfg, folder)


def main() -> int:
  cfg = build(cli.required("config", CONFIG.value).to_dict())
  check = functools.partial(host_steps.check_size, cut=cfg.data.cut)
  row = cli.train_in_workdir(cfg, lambda run: make_task(cfg, str(run.path)), check)
  if row is None:
    return cli.DONE
  print(tables(row, cfg.data))
  return cli.DONE


if __name__ == "__main__":
  cli.run(main)
