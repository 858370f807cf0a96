"""What a memory is worth on text: one model in several forms, side by side on the same tokens.

    python -m experiments.perplexity --checkpoint=work/text/n2 --files='books/last*.txt' --out=work/perplexity
    python -m experiments.perplexity --checkpoint=checkpoints/SmolLM2-135M --files=last.txt --length=2048 \\
      --window=512

The forms are full attention (one window of T tokens, in one pass), window only (L tokens, and nothing that
was read before them: no memory), and every window slept on with each N; N = 1 is the plain hybrid.

Takes the workdir of a run, whose newest checkpoint counts, or a checkpoint in published format or this
package's own. A model without fast weights has the first two forms alone under hard eviction. Prints a table;
with --out also writes perplexity.json, perplexity.md and the figure of the loss by position.
"""

import dataclasses
import json
import pathlib
import tempfile
from typing import Any

from absl import flags

from sleep_jax import config, model, pretrained, sharding
from sleep_jax.config import ModelConfig, SleepConfig
from sleep_jax.data.text import corpus, files, rows
from sleep_jax.experiments import cli
from sleep_jax.report import context, context_curves
from sleep_jax.scoring import by_context

CHECKPOINT = cli.define_checkpoint_flag()
FILES = flags.DEFINE_string("files", None, "texts, with commas between them or as a pattern: 'books/*.txt'")
FIELD = flags.DEFINE_string("field", "text", "of the objects in a .jsonl")
LENGTH = flags.DEFINE_integer(
  "length", None, "T, tokens of a sequence. Default: the run's, or 4 L", lower_bound=2
)
WINDOW = flags.DEFINE_integer(
  "window", None, "L. Default: the run's; needed for a checkpoint, which has none", lower_bound=1
)
PASSES = flags.DEFINE_list("passes", ["1", "2", "4"], "values of N")
SEQUENCES = flags.DEFINE_integer("sequences", 32, "that are read, spread over all texts", lower_bound=1)
BATCH = flags.DEFINE_integer("batch_size", 1, "sequences at a time", lower_bound=1)
EVICTION = flags.DEFINE_enum("eviction", None, ["hard", "sliding"], "Default: the run's, or hard")
MATMUL = flags.DEFINE_enum(
  "matmul_dtype",
  None,
  ["same", "bfloat16"],
  "bfloat16: faster on some CPUs, digits differ. Default: the run's",
)
OUT = flags.DEFINE_string("out", None, "folder for the results. Default: they are printed only")


def opened(folder: str) -> tuple[ModelConfig, SleepConfig, model.Params, int | None]:
  """Model, sleep, weights and, of a run on text, T.

  Raises:
    ConfigError: if it is neither a run nor a checkpoint, or no window is said for one.
  """
  changes: dict[str, Any] = {"window": WINDOW.value, "eviction": EVICTION.value, "matmul_dtype": MATMUL.value}
  changes = {name: value for name, value in changes.items() if value is not None}
  if pretrained.is_run(folder):
    run = pretrained.load_run(folder)
    cfg = dataclasses.replace(run.config.model, **changes)
    data = run.config.data if isinstance(run.config.data, dict) else {}
    return cfg, run.config.sleep, run.weights, data.get("length")
  config.check("window" in changes, "--window", "is required: a checkpoint does not say L")
  cfg, weights, _ = pretrained.load(folder, **changes)
  return cfg, SleepConfig(), weights, None


def main() -> int:
  folder, texts = cli.required("checkpoint", CHECKPOINT.value), cli.required("files", FILES.value)
  passes = cli.whole_numbers("passes", PASSES.value)
  paths = files.expand(texts, "--files")
  for path in paths:
    for _ in files.documents(path, FIELD.value):
      pass
  if OUT.value is not None:
    out = cli.folder_to_write("out", OUT.value)
    config.check(
      not pretrained.is_run(out), "--out", f"{out} is the workdir of a run, nothing is written there"
    )
  tokenizer = pretrained.tokenizer_file(folder)
  cfg, sleep_cfg, weights, trained_length = opened(folder)
  length = LENGTH.value or trained_length or 4 * cfg.window
  data = rows.TextConfig(files=texts, field=FIELD.value, length=length, documents="alone")
  rows.check_window(length, cfg.window)
  mesh = sharding.make_mesh(config.MeshConfig(data=1))
  results: dict[str, dict[str, Any]] = {}
  with tempfile.TemporaryDirectory() as cache:
    read = corpus.open_corpus(
      paths, data.field, tokenizer, pathlib.Path(cache), vocab_size=cfg.vocab_size, report=print
    )
    held = rows.make_rows(read, data, cfg.window, None, "--files")
    print(f"reading {min(SEQUENCES.value, len(held))} of {len(held)} sequences of at most {length} tokens")
    for name, how, sleeps, forget in by_context.forms(cfg, sleep_cfg, passes, length):
      evaluate = by_context.make_evaluate(
        held, SEQUENCES.value, BATCH.value, how, sleeps, mesh, forget=forget
      )
      results[name] = evaluate(weights)
      print(f"{name}: {context.line(results[name])}", flush=True)
  text = context.table(results)
  print(f"\n{text}")
  if OUT.value is not None:
    values = {
      "checkpoint": folder,
      "files": [str(path) for path in paths],
      "corpus": corpus.digest(paths, data.field),
      "length": length,
      "window": cfg.window,
      "eviction": cfg.eviction,
      "matmul_dtype": cfg.matmul_dtype,
      "forms": results,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "perplexity.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    (out / "perplexity.md").write_text(text + "\n", encoding="utf-8")
    for path in [
      out / "perplexity.json",
      out / "perplexity.md",
      *context_curves.figure(results, cfg.window).save(out),
    ]:
      print(f"wrote {path}")
  return cli.DONE


if __name__ == "__main__":
  cli.run(main)
