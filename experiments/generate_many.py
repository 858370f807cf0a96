"""Several prompts, read side by side: a JSON line for each, in their order."""

import dataclasses
import io
import json
import time
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import generate, model
from sleep_jax.config import ConfigError
from sleep_jax.cost import need
from sleep_jax.experiments.generate_io import LENGTH, Output, Prompt, Reporter, Writer, prompt_lines
from sleep_jax.experiments.generate_model import Checkpoint, GenerateConfig
from sleep_jax.runtime.files import RunFailedError


def run(cfg: GenerateConfig, file: str, out: TextIO | None, told: TextIO | None, *, statistics: bool) -> None:
  """Reads the prompts of a file, `cfg.rows` at a time, and writes what they are gone on with.

  Args:
    cfg: as asked for; what a line does not say is as there.
    file: see `prompt_lines`.
    out: for a JSON line a prompt: `prompt` (its number), `text`, `tokens` (how many), `ended` (why).
    told: for what the model does.
    statistics: add what the rows that were read together took.

  Raises:
    ConfigError: for whatever is wrong; of a prompt, before anything is generated.
    RunFailedError: if a weight is not finite, or `out` failed.
    NotFiniteError: if logits are not finite.
  """
  checkpoint, output = Checkpoint(cfg), Output(out)
  shared = {name: getattr(cfg, name) for name in ("stop_strings", "max_new_tokens", "seed")}
  lines = prompt_lines(file, shared | {"sampling": dataclasses.asdict(cfg.sampling)})
  prompts, tokens = [prompt for _, prompt in lines], _encoded(checkpoint, lines)
  need.check_session(checkpoint.model, cfg.sleep, min(cfg.rows, len(prompts)))
  weights = checkpoint.weights()
  for at in range(0, len(prompts), cfg.rows):
    report, part = Reporter(cfg.sleep.num_passes, told), slice(at, at + cfg.rows)
    rows, session = _generate(cfg, checkpoint, weights, prompts[part], tokens[part], report)
    report.note(f"{len(rows)} prompts: {report.line(session)}{report.stall()}, compilation included")
    took = {"statistics": report.statistics(session)} if statistics else {}
    for number, row in enumerate(rows, at):
      output.write(json.dumps({"prompt": number, **row, **took}, ensure_ascii=False) + "\n")
    if output.failure:
      done = min(at + cfg.rows, len(prompts))
      raise RunFailedError(
        f"stdout cannot be written: {output.failure}; {done} of {len(prompts)} prompts were read"
      )


def _encoded(checkpoint: Checkpoint, lines: list[tuple[str, Prompt]]) -> list[list[int]]:
  """The tokens of every prompt."""
  chats = (
    checkpoint.chat([list(p.messages) for _, p in lines if p.messages])
    if any(p.messages for _, p in lines)
    else []
  )
  rendered = iter(chats)
  tokens = []
  for where, prompt in lines:
    text = next(rendered) if prompt.messages else prompt.prompt or ""
    try:
      tokens.append([token for part in checkpoint.tokenizer.encode_parts([text]) for token in part])
    except ConfigError as e:
      raise ConfigError(f"{where}: {e}") from e
  return tokens


def _generate(
  cfg: GenerateConfig,
  checkpoint: Checkpoint,
  weights: model.Params,
  prompts: list[Prompt],
  tokens: list[list[int]],
  report: Reporter,
) -> tuple[list[dict[str, Any]], generate.Session]:
  """Reads B prompts and generates until all of them have ended: `text`, `tokens` and `ended` of each.

  A row that has ended reads pads, which change nothing of it, until the others have.
  """
  texts = [io.StringIO() for _ in prompts]
  writers = [
    Writer(checkpoint.tokenizer, prompt.stop_strings, Output(text))
    for prompt, text in zip(prompts, texts, strict=True)
  ]
  for writer, prompt in zip(writers, tokens, strict=True):
    for _ in writer.known([prompt]):
      pass
  session = generate.start(checkpoint.model, cfg.sleep, len(prompts))
  session = generate.read(weights, tokens, session, checkpoint.model, cfg.sleep, watch=report)
  keys = jnp.stack([jax.random.key(prompt.seed) for prompt in prompts])
  sampling = [prompt.sampling for prompt in prompts]
  counts = [0] * len(prompts)
  ended = ["" if prompt.max_new_tokens else LENGTH for prompt in prompts]
  while "" in ended:
    begun = time.perf_counter()
    going = np.array([not why for why in ended])
    drawn = np.where(going, generate.draw(session, keys, sampling), 0)
    session = generate.read(
      weights,
      drawn[:, None],
      session,
      checkpoint.model,
      cfg.sleep,
      valid=going[:, None],
      watch=report,
      reuse=True,
    )
    report.waited(time.perf_counter() - begun)
    for i in np.flatnonzero(going):
      counts[i] += 1
      ended[i] = writers[i].add(int(drawn[i])) or checkpoint.ending(int(drawn[i]), sampling[i])
      if not ended[i] and counts[i] == prompts[i].max_new_tokens:
        ended[i] = LENGTH
  for writer in writers:
    writer.end()
  rows = zip(texts, counts, ended, strict=True)
  return [{"text": text.getvalue(), "tokens": count, "ended": why} for text, count, why in rows], session
