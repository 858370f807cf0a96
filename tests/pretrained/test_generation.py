"""The command that generates, with every kind of checkpoint that loads; and a Ctrl-C as a user presses it."""

import contextlib
import io
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from sleep_jax import config, model, pretrained
from sleep_jax.config import FastConfig, SleepConfig
from sleep_jax.experiments import convert
from sleep_jax.experiments import generate as command
from sleep_jax.pretrained.tokenizer import Tokenizer
from tests import forked, hybrids
from tests.pretrained import tiny

WINDOW, COUNT = 8, 10
TEXT = "What is the total number of adult animals in Cedar Valley? 4 2"
KINDS = ("ouro", "qwen2", "ouro+memory", "qwen2+memory", "qwen3_5", "olmo_hybrid")
REMEMBER = ("ouro+memory", "qwen2+memory", "qwen3_5", "olmo_hybrid")


def make(folder, kind):
  """A checkpoint of a kind; the memory is inserted by `convert` and then moved, so that it says something."""
  name, _, memory = kind.partition("+")
  plain = tiny.checkpoint(folder / name, name)
  if not memory:
    return plain
  fast = FastConfig(num_heads=1, key_dim=8, value_dim=8)
  convert.convert(
    convert.ConvertConfig(source=str(plain), target=str(folder / "m"), memory_layers=1, fast=fast)
  )
  cfg, weights, source = pretrained.load(folder / "m")
  layer = weights["blocks"]["1"]["mixer"]
  layer["o"] = layer["o"] + 0.5 * jax.random.normal(jax.random.key(1), layer["o"].shape)
  pretrained.export(folder / "moved", cfg, weights, source)
  return folder / "moved"


def run(folder, text, session=None, count=COUNT, passes=2):
  """What the command prints: pieces of text as they came, and what it told."""
  out, told = Pieces(), io.StringIO()
  values = {
    "checkpoint": str(folder),
    "window": WINDOW,
    "sleep": {"num_passes": passes},
    "max_new_tokens": count,
  }
  command.run(config.from_dict(command.GenerateConfig, values), text, session, out, told)
  return out.pieces, re.sub(r"[0-9.]+ ms", "_ ms", told.getvalue())


class Pieces(io.StringIO):
  def __init__(self):
    super().__init__()
    self.pieces = []

  def write(self, text):
    self.pieces.append(text)
    return super().write(text)


def expected(folder, count):
  """Greedy tokens by a plain loop over windows, in which nothing is cached but the state."""
  sleep_cfg = SleepConfig(num_passes=2)
  cfg, weights, _ = pretrained.load(folder, window=WINDOW)
  asleep = hybrids.jit(lambda x, s: model.consolidate(weights, x, s, cfg, sleep_cfg))
  awake = hybrids.jit(lambda x, s: model.predict(weights, x, s, cfg)[0])
  tokens, state, at = Tokenizer(folder, cfg).encode(TEXT), model.init_state(cfg, 1), 0
  for _ in range(count):
    while len(tokens) - at > WINDOW:
      if state:  # without fast weights what leaves the window is forgotten
        state = asleep(np.array([tokens[at : at + WINDOW]]), state)
      at += WINDOW
    room = WINDOW - (len(tokens) - at)  # what follows a token changes nothing for it
    logits = awake(np.array([tokens[at:] + [0] * room]), state)
    tokens.append(int(np.argmax(logits[0, WINDOW - 1 - room])))
  return tokens[-count:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_text_streams_through_sleep_and_a_session_goes_on_to_the_bit(kind, tmp_path):
  folder = make(tmp_path, kind)
  whole, told = run(folder, TEXT, tmp_path / "whole")
  tokenizer = Tokenizer(folder, pretrained.open_source(folder).model)
  assert "".join(whole) == tokenizer.decode(expected(folder, COUNT)) + "\n"
  assert len(whole) >= COUNT  # a piece a token, not all at the end
  read = len(tokenizer.encode(TEXT)) + COUNT
  nights = told.count("[slept ")
  assert nights == read // WINDOW > 1
  assert f"[{read} tokens read, {nights} windows slept on, 2 passes each" in told
  assert ("no fast weights" in told) == (kind not in REMEMBER)
  first, _ = run(folder, TEXT, tmp_path / "session", count=3)
  rest, _ = run(folder, None, tmp_path / "session", count=COUNT - 3)
  assert "".join(first)[:-1] + "".join(rest) == "".join(whole)
  assert (tmp_path / "session").read_bytes() == (tmp_path / "whole").read_bytes()
  with pytest.raises(config.ConfigError, match="sleep.num_passes was 2, is 3"):
    run(folder, None, tmp_path / "session", passes=3)


@pytest.mark.slow
def test_ctrl_c_stores_the_session_and_ends_with_code_3(tmp_path):
  folder = tiny.checkpoint(tmp_path / "jet", "jet")
  session = tmp_path / "session"
  flags = (
    *(f"--config={forked.ROOT}/experiments/configs/generate.py:plain", f"--config.checkpoint={folder}"),
    *(
      "--config.window=64",
      f"--session={session}",
      "--prompt=What is the total",
      "--config.max_new_tokens=100000",
    ),
  )
  with contextlib.ExitStack() as stack:
    child = stack.enter_context(
      subprocess.Popen(
        [sys.executable, "-m", "experiments.generate", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=forked.ROOT,
        env=forked.environment(),
      )
    )
    stack.callback(child.kill)
    assert child.stdout.read(1)  # it has begun
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=240)
  assert child.returncode == 3, err
  last = err.strip().splitlines()[-1]
  assert re.fullmatch(rf"stopped by SIGINT after \d+ tokens; the session is stored in {session}, .*", last), (
    err
  )
  assert session.is_file()
