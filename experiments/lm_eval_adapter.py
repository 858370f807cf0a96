"""A model of this package as one of lm-evaluation-harness (0.4.13; extra `eval`).

    from lm_eval import simple_evaluate
    from sleep_jax.experiments.lm_eval_adapter import SleepingLM

    lm = SleepingLM("checkpoints/SmolLM2-135M-memory", window=512, passes=4)
    results = simple_evaluate(model=lm, tasks=["lambada_openai"])

Takes a checkpoint with its tokenizer, or the workdir of a run on text. Texts are read from their beginning,
and every window of L tokens is slept on before it is evicted; without `window` there is full attention. Where
this module was imported, the harness also knows it as the model `sleep_jax`. Tasks of the harness's own fetch
their data from a network; those with local files do not.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from sleep_jax import generate, model, pretrained, windows
from sleep_jax.config import ConfigError, SleepConfig, check, check_sleep
from sleep_jax.generate import SamplingConfig
from sleep_jax.pretrained.ends import end_tokens
from sleep_jax.pretrained.tokenizer import Tokenizer

SHORTEST = 16  # tokens of the smallest program; longer ones are twice as long each


@register_model("sleep_jax")
class SleepingLM(LM):
  """Scores and continues texts, asleep on every full window.

  Args:
    checkpoint: a checkpoint's folder, or a run's workdir.
    window: L. None: full attention over the whole text.
    passes: N, passes of a sleep; 1 is the plain hybrid.
    eviction: `hard` or `sliding`.
    max_gen_toks: tokens that are generated where a request does not say how many.
    batch_size, max_batch_size, device: what the harness's command line passes on; texts are read one by one
      on JAX's default device.

  Raises:
    ConfigError: if the checkpoint cannot be read, or does not fit what is asked.
  """

  def __init__(
    self,
    checkpoint: str,
    window: int | None = None,
    passes: int = 1,
    eviction: str = "hard",
    max_gen_toks: int = 256,
    batch_size: int | str | None = None,
    max_batch_size: int | None = None,
    device: str | None = None,
  ):
    super().__init__()
    del batch_size, max_batch_size, device
    check(window is not None or passes == 1, "passes", f"must be 1 without a window, got {passes}")
    self._sleep = SleepConfig(when="always", num_passes=passes)
    self._window, self._max_gen_toks = window, max_gen_toks
    changes = {"eviction": eviction} | ({} if window is None else {"window": window})
    if pretrained.is_run(checkpoint):
      run = pretrained.load_run(checkpoint)
      self._cfg, self._weights = dataclasses.replace(run.config.model, **changes), run.weights
      self._sleep = dataclasses.replace(
        run.config.sleep, when="always", num_passes=passes, backprop_passes=None
      )
    else:
      self._cfg, self._weights, _ = pretrained.load(checkpoint, **changes)
    check_sleep(self._sleep, self._cfg)
    self._shortest = window or max(SHORTEST, self._cfg.attention.swa_window or 0)
    self._tokenizer = Tokenizer(pretrained.tokenizer_file(checkpoint).parent, self._cfg)
    self._ends = end_tokens(checkpoint)
    self._prefix = _first_token(pathlib.Path(checkpoint), self._ends)
    self._scorers: dict[int, Callable[..., tuple[jax.Array, jax.Array]]] = {}

  def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    """Of each (context, continuation): its log probability in nats, and whether greedy decoding would write
    it.

    An empty context stands for the token that begins a text.
    """
    del disable_tqdm
    results = []
    for context, continuation in (request.args for request in requests):
      before, after = self._pair(context, continuation)
      nats, right = self._scored(before + after)
      count = len(after)
      results.append((-float(nats[-count:].sum()), bool(right[-count:].all())))
    return results

  def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
    """The log probability of each whole text in nats, read in one go whatever its length."""
    del disable_tqdm
    texts = [self._encode(text) for (text,) in (request.args for request in requests)]
    return [-float(self._scored([self._first, *tokens])[0].sum()) if tokens else 0.0 for tokens in texts]

  def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
    """What each context is gone on with, up to a stop string, an end token, or so many tokens.

    Of the settings of a request `until`, `max_gen_toks`, `do_sample`, `temperature`, `top_k` and `top_p`
    count.
    """
    del disable_tqdm
    return [self._continued(context, dict(asked)) for context, asked in (r.args for r in requests)]

  @property
  def _first(self) -> int:
    """The token that stands before a text of which nothing is given."""
    if self._prefix is None:
      raise ConfigError("checkpoint: its config.json has neither bos_token_id nor eos_token_id to begin with")
    return self._prefix

  def _encode(self, text: str) -> list[int]:
    return self._tokenizer.encode(text) if text else []

  def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of context and continuation; spaces between the two belong to the latter."""
    if not context:
      return [self._first], self._encode(continuation)
    spaces = len(context) - len(context.rstrip())
    if spaces:
      context, continuation = context[:-spaces], context[-spaces:] + continuation
    before, whole = self._encode(context), self._encode(context + continuation)
    return before or [self._first], whole[len(before) :]

  def _scored(self, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Nats of every token but the first, and whether it is the likeliest one; each [tokens - 1]."""
    count = len(tokens) - 1
    length = self._room(count)
    inputs, targets, valid = np.zeros(length, np.int32), np.zeros(length, np.int32), np.arange(length) < count
    inputs[:count], targets[:count] = tokens[:-1], tokens[1:]
    if length not in self._scorers:
      self._scorers[length] = self._scorer(length)
    nats, right = self._scorers[length](self._weights, inputs, targets, valid)
    return np.asarray(nats, np.float64)[:count], np.asarray(right)[:count]

  def _room(self, count: int) -> int:
    """Tokens of the smallest program that holds so many: whole windows, or one, each twice the one before."""
    length = self._shortest
    while length < count:
      length *= 2
    return length

  def _scorer(self, length: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    cfg = self._cfg if self._window else dataclasses.replace(self._cfg, window=length)
    segments = windows.plan(np.ones(length, bool), cfg.window, self._sleep)

    @jax.jit
    def scores(weights, inputs, targets, valid):
      batch = windows.Batch(inputs[None], targets[None], valid[None].astype(jnp.float32), valid[None])
      logits, _ = model.forward(weights, batch, segments, cfg, self._sleep.forward_only)
      return model.nats(logits, batch.targets)[0], jnp.argmax(logits, axis=-1)[0] == targets

    return scores

  def _continued(self, context: str, asked: dict[str, Any]) -> str:
    until = asked.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    count = asked.get("max_gen_toks", self._max_gen_toks)
    temperature = asked.get("temperature") or 0.0
    sampling = SamplingConfig()
    if asked.get("do_sample", temperature > 0) and temperature > 0:
      sampling = SamplingConfig(temperature, asked.get("top_k"), asked.get("top_p"))
    tokens = self._encode(context) or [self._first]
    cfg = (
      self._cfg if self._window else dataclasses.replace(self._cfg, window=self._room(len(tokens) + count))
    )
    session = generate.read(self._weights, [tokens], generate.start(cfg, self._sleep), cfg, self._sleep)
    written: list[int] = []
    drawn = generate.generate(
      self._weights, session, cfg, self._sleep, count=count, key=jax.random.key(0), sampling=sampling,
      end_tokens=self._ends, reuse=True,
    )  # fmt: skip
    for token, _ in drawn:
      if int(token[0]) in self._ends:
        break
      written.append(int(token[0]))
      text = self._tokenizer.decode(written)
      if any(stop in text for stop in stops):
        return functools.reduce(lambda rest, stop: rest.split(stop)[0], stops, text)
    return self._tokenizer.decode(written) if written else ""


def _first_token(folder: pathlib.Path, ends: Sequence[int]) -> int | None:
  """The token that begins a text: `bos_token_id` of config.json, or else the first that ends one."""
  path = folder / "config.json"
  said = json.loads(path.read_text(encoding="utf-8")).get("bos_token_id") if path.is_file() else None
  return said if type(said) is int else next(iter(ends), None)
