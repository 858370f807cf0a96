"""A test of memory for a checkpoint or a run on text: one model in several forms, on the same prompts.

The part of `experiments.memory` behind --checkpoint. A prompt is right if every token of its answer is the
likeliest one, the true tokens before it given: what greedy decoding would write. Where answers have several
words, the share of words that are right is reported too (the set `words`).
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from sleep_jax import config, model, pretrained, sharding
from sleep_jax.data import batching, limits
from sleep_jax.data.memory import MemoryConfig, prompts, set_names, wording
from sleep_jax.data.text import files
from sleep_jax.experiments import cli
from sleep_jax.pretrained.tokenizer import Tokenizer
from sleep_jax.report import memory as report
from sleep_jax.scoring import by_context, by_group

PASSES = [1, 2, 4]
Forms = dict[str, dict[str, Any]]


def test(values: dict[str, Any], checkpoint: str, filler: str | None, folder: str) -> int:
  """Tests a checkpoint, prints the table, and writes memory.json, memory.md and the figure.

  Args:
    values: of the config: `data` says which test, `model.window` L, `model.eviction` which eviction,
      `train.eval_sequences` how many prompts a set, `train.eval_batch_size` how many of them at a time.
    checkpoint: its folder, or a run's workdir.
    filler: files whose sentences fill the prompts. None: `wording.NOISE`.
    folder: where the results go.

  Returns:
    The exit code.

  Raises:
    ConfigError: for any mistake; nothing is written then.
  """
  cfg = config.run_from_dict(MemoryConfig, values)
  data = cfg.data
  prompts.check_text(data)
  sentences = wording.NOISE if filler is None else sentences_of(filler)
  out = cli.folder_to_write("workdir", folder)
  config.check(not pretrained.is_run(out), "--workdir", f"{out} is the workdir of a run; name another")
  tokenizer_file = pretrained.tokenizer_file(checkpoint)
  how, sleep_cfg, weights = opened(checkpoint, cfg.model.window, cfg.model.eviction)
  held = make_sets(data, cfg.train.eval_sequences, Tokenizer(tokenizer_file.parent, how), sentences)
  results = tested(how, sleep_cfg, weights, held, set_names(data), cfg.train.eval_batch_size)
  sets = [
    report.Set(name, depth, length, prompts.chance(data, depth))
    for name, (depth, length) in zip(set_names(data), data.sets, strict=True)
  ]
  text = report.table(results, sets, data.test.depth)
  print(f"\n{text}")
  said = {
    "checkpoint": checkpoint,
    "task": data.task,
    "data": config.to_dict(data),
    "filler": filler,
    "window": how.window,
    "eviction": how.eviction,
    "chance": {of.name: of.chance for of in sets},
    "forms": results,
  }
  out.mkdir(parents=True, exist_ok=True)
  (out / "memory.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
  (out / "memory.md").write_text(text + "\n", encoding="utf-8")
  drawn = report.figure(results, sets, data.task, data.test.depth).save(out)
  for path in [out / "memory.json", out / "memory.md", *drawn]:
    print(f"wrote {path}")
  return cli.DONE


def opened(folder: str, window: int, eviction: str) -> tuple[config.ModelConfig, config.SleepConfig, Any]:
  """Model, sleep and weights of a checkpoint or run, with windows of L tokens."""
  changes: dict[str, Any] = {"window": window, "eviction": eviction}
  if pretrained.is_run(folder):
    run = pretrained.load_run(folder)
    return dataclasses.replace(run.config.model, **changes), run.config.sleep, run.weights
  cfg, weights, _ = pretrained.load(folder, **changes)
  return cfg, config.SleepConfig(), weights


def sentences_of(patterns: str) -> list[str]:
  """The sentences of texts, in order.

  Raises:
    ConfigError: if there are none, or a file cannot be read as text.
  """
  texts = itertools.chain.from_iterable(
    files.documents(path, "text") for path in files.expand(patterns, "--filler")
  )
  found = [s for text in texts for s in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if s]
  config.check(bool(found), "--filler", f"{patterns} has no sentences")
  return found


def make_sets(
  data: MemoryConfig, count: int, tokenizer: Tokenizer, sentences: Sequence[str]
) -> dict[str, batching.HeldOut]:
  """`count` prompts of each depth and length as tokens, from the seed of the held-out sets.

  Returns:
    `prompts`, each with its whole answer; and `words`, if any answer has several: a word each, behind the
    words before it.
  """
  whole, words = [], []
  for of, (depth, length) in enumerate(data.sets):
    for i in range(count):
      asked = prompts.prompt(
        data, data.held_out_seed, i, depth, length, lambda text: len(tokenizer.encode(text)), sentences
      )
      whole.append(_example(tokenizer, asked.text, asked.expected, of))
      for j, word in enumerate(asked.answers):
        before = f" {', '.join(asked.answers[:j])}," if j else ""
        words.append(_example(tokenizer, asked.text + before, f" {word}", of))
  sets = {"prompts": batching.HeldOut(whole)}
  return sets | ({"words": batching.HeldOut(words)} if len(words) > len(whole) else {})


def _example(tokenizer: Tokenizer, before: str, after: str, of: int) -> batching.Example:
  """Tokens of a prompt and of its answer, which begins where the prompt's own tokens end."""
  prompt, whole = tokenizer.encode(before), tokenizer.encode(before + after)
  same = next((k for k, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
  return batching.Example(np.asarray(whole[:same]), np.asarray(whole[same:]), of)


def tested(
  cfg: config.ModelConfig,
  sleep_cfg: config.SleepConfig,
  weights: model.Params,
  held: dict[str, batching.HeldOut],
  names: list[str],
  batch_size: int,
) -> Forms:
  """The scores of every form of a model; a line is printed for each.

  Raises:
    ConfigError: if a text is too long to be read, or an answer longer than a window.
  """
  examples = [example for one in held.values() for example in one.examples]
  answer = max(len(e.answer) for e in examples)
  longest = max(len(e.prompt) for e in examples) + answer
  config.check(longest <= limits.LENGTH, "data.lengths", f"make texts of {longest} tokens, too many")
  fits = f"must hold the {answer} tokens of the longest answer, got {cfg.window}"
  config.check(answer <= cfg.window, "model.window", fits)
  cut = batching.CutConfig(max_tokens=longest, answer_tokens=answer)
  print(f"{len(held['prompts'].examples)} prompts of at most {longest} tokens with their answers")
  mesh, results = sharding.make_mesh(config.MeshConfig(data=1)), {}
  for name, form, sleeps, forget in by_context.forms(cfg, sleep_cfg, PASSES, longest):
    evaluate = by_group.make_host_evaluate(held, names, cut, batch_size, form, sleeps, mesh, forget=forget)
    row = evaluate(weights)
    results[name] = {key: x for key, x in row.items() if isinstance(x, (int, float))}
    print(f"{name}: right {row['exact']:.1%}, {row['answer_loss']:.3f} nats a token of an answer", flush=True)
  return results
