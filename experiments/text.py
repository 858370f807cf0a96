"""Trains a language model that sleeps, on your own files: one run is one (N, seed).

    python -m experiments.text --config=experiments/configs/text.py:tiny --config.data.files='books/*.txt' \\
      --config.data.held_out=last_book.txt --workdir=work/text/n2
    python -m experiments.text --config=experiments/configs/text.py:checkpoint \\
      --config.pretrained.folder=checkpoints/SmolLM2-135M --config.data.files='books/*.txt' \\
      --config.data.held_out=last_book.txt --workdir=work/text/smollm2

Files are plain UTF-8, or .jsonl with a document a line, or either as .gz. Every window is read awake and then
slept on (`sleep.when` = `always`). Reports loss and perplexity a token, bits a byte, and the loss by how much
of the text was read before and by whether a token was last seen in what is long evicted. Rerunning the same
command resumes; texts that changed since are refused.
"""

import hashlib
import pathlib
import tempfile
from typing import Any

from sleep_jax import config, pretrained
from sleep_jax.data.text import corpus, files, rows, tokens
from sleep_jax.experiments import cli, fine_tuning
from sleep_jax.report import context
from sleep_jax.runtime import processes
from sleep_jax.scoring import by_context
from sleep_jax.train import row_steps

CONFIG = cli.define_config_flag()
FIELDS = {"": config.Config, "data": rows.TextConfig, "pretrained": pretrained.StartConfig}
BYTES_A_TOKEN = 64  # hardly a token has more: a text of fewer bytes a window is counted before a run begins
cli.define_workdir_flag()
cli.define_process_flags()


def build(values: dict[str, Any]) -> config.Config:
  """The checked config of a nested mapping, with the digest of its texts; all of them are read once.

  Args:
    values: with a group `pretrained`, a model, its weights and its tokenizer come from a checkpoint.

  Raises:
    ConfigError: for anything that is unknown, of the wrong type or does not fit, and for texts that cannot be
      read, are shorter than a window, held out and trained on, or others than `data.digest` says.
  """
  if "pretrained" in values:
    values = fine_tuning.filled_in(values)
  cfg = config.run_from_dict(rows.TextConfig, values)
  data = cfg.data
  rows.check_window(data.length, cfg.model.window)
  highest = data.vocab_size - 1
  if data.tokenizer:
    highest = tokens.Tokenizer(pathlib.Path(data.tokenizer)).highest
  config.check(
    highest < cfg.model.vocab_size,
    "model.vocab_size",
    f"must be at least {highest + 1}, the tokens of the tokenizer, got {cfg.model.vocab_size}",
  )
  digest = _check_texts(cfg)
  config.check(
    data.digest in (None, digest),
    "data.digest",
    f"the texts are not those of this run: its digest is {data.digest}, that of the files now {digest}",
  )
  return config.replace(cfg, data={"digest": digest})


def _check_texts(cfg: config.Config) -> str:
  """Reads every document once; which texts they are."""
  data = cfg.data
  paths = {name: files.expand(getattr(data, name), f"data.{name}") for name in ("files", "held_out")}
  contents = {path: files.digest(path) for path in {*paths["files"], *paths["held_out"]}}
  trained = {contents[path]: path for path in paths["files"]}
  for path in paths["held_out"]:
    same = trained.get(contents[path])
    config.check(same is None, "data.held_out", f"{path} is trained on, it is the same text as {same}")
  for name, these in paths.items():
    size, texts = 0, []
    for path in these:
      for text in files.documents(path, data.field):
        size += len(text.encode())
        if size < BYTES_A_TOKEN * cfg.model.window:
          texts.append(text)
    if size < BYTES_A_TOKEN * cfg.model.window:
      _check_long_enough(cfg, name, texts, paths["files"])
  digests = [corpus.digest(these, data.field) for these in paths.values()]
  return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _check_long_enough(
  cfg: config.Config, name: str, texts: list[str], trained_on: list[pathlib.Path]
) -> None:
  """Refuses short texts that are together shorter than a window."""
  with tempfile.TemporaryDirectory() as folder:
    known = tokens.Tokenizer(_tokenizer(cfg.data, trained_on, pathlib.Path(folder)))
  counts = [len(known.encode(text)[0]) for text in texts]
  rows.check_long_enough(rows.pieces(counts, cfg.data.length), cfg.model.window, f"data.{name}")


def _tokenizer(data: rows.TextConfig, paths: list[pathlib.Path], folder: pathlib.Path) -> pathlib.Path:
  """The tokenizer.json of a run: the one that is named, or one that is trained on its files."""
  if data.tokenizer:
    return pathlib.Path(data.tokenizer)
  path = folder / "tokenizer.json"
  texts = (text for p in paths for text in files.documents(p, data.field))
  tokens.train(texts, data.vocab_size, path)
  return path


def make_task(cfg: config.Config, folder: str) -> row_steps.RowTask:
  """The task; its tokens, and its tokenizer if the config names none, are kept in `folder`."""
  data, where = cfg.data, pathlib.Path(folder)
  paths = {name: files.expand(getattr(data, name), f"data.{name}") for name in ("files", "held_out")}

  def open_both(report):
    tokenizer = pathlib.Path(data.tokenizer) if data.tokenizer else where / "tokenizer.json"
    return [
      corpus.open_corpus(
        these, data.field, tokenizer, where / "corpus", vocab_size=cfg.model.vocab_size, report=report
      )
      for these in paths.values()
    ]

  def first() -> None:
    if not data.tokenizer:
      corpus.keep_tokenizer(
        where / "tokenizer.json",
        f"{data.digest} {data.vocab_size}",
        lambda at: _tokenizer(data, paths["files"], at),
      )
    open_both(lambda line: print(line, flush=True))

  processes.agree(first, config.ConfigError)  # the others find the cache
  trained, held = open_both(lambda line: None)
  window = cfg.model.window
  held_rows = rows.make_rows(held, data, window, None, "data.held_out")

  def evaluation(cfg: config.Config, mesh):
    most, size = cfg.train.eval_sequences, cfg.train.eval_batch_size
    return by_context.make_evaluate(held_rows, most, size, cfg.model, cfg.sleep, mesh)

  return row_steps.RowTask(
    rows=rows.make_rows(trained, data, window, cfg.seed, "data.files"),
    held_out=held_rows,
    length=data.length,
    evaluation=evaluation,
    describe=context.line,
  )


def open_task(values: dict[str, Any], folder: str) -> tuple[config.Config, row_steps.RowTask]:
  """See `tasks.open_task`; the folder has, or gets, the tokens and the tokenizer."""
  cfg = build(values)
  return cfg, make_task(cfg, folder)


def main() -> int:
  cfg = build(cli.required("config", CONFIG.value).to_dict())

  def check(cfg: config.Config) -> None:
    row_steps.check_size(cfg, cfg.data.length)

  row = cli.train_in_workdir(cfg, lambda run: make_task(cfg, str(run.path)), check)
  if row is None:
    return cli.DONE
  print(context.table({f"N = {cfg.sleep.num_passes}": row}))
  return cli.DONE


if __name__ == "__main__":
  cli.run(main)
