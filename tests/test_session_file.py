"""A session that was stored goes on as if it had never stopped; every other file is refused in one line."""

import json
import pathlib
import tempfile

import jax
import numpy as np
import safetensors.numpy
from absl.testing import parameterized

from sleep_jax import config, generate, session_file
from sleep_jax.config import ConfigError, SleepConfig
from tests import hybrids

TWO = SleepConfig(num_passes=2)
KEY = jax.random.key(5)


def session_of(cfg, weights, length=10):
  session = generate.start(cfg, TWO, 2)
  return generate.read(weights, hybrids.random_tokens(2, length), session, cfg, TWO)


class SessionFileTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.cfg = hybrids.model_config(("gdn", "attn"), eviction="sliding", dtype="bfloat16")
    cls.weights = hybrids.random_params(cls.cfg)
    cls.session = session_of(cls.cfg, cls.weights)

  def setUp(self):
    super().setUp()
    self.dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.path = self.dir / "session"

  def save(self):
    session_file.save(self.path, self.session, self.weights, self.cfg, TWO)

  def refused(self, message, weights=None, cfg=None, sleep_cfg=TWO):
    with self.assertRaisesRegex(ConfigError, message) as caught:
      session_file.load(self.path, weights or self.weights, cfg or self.cfg, sleep_cfg)
    self.assertNotIn("\n", str(caught.exception))

  def test_resumed_it_goes_on_to_the_bit(self):
    self.save()
    back = session_file.load(self.path, self.weights, self.cfg, TWO)
    self.assertEqual(jax.tree.structure(back), jax.tree.structure(self.session))  # and the counters in it
    hybrids.assert_same(back, self.session)
    run = {
      name: list(
        generate.generate(
          self.weights, s, self.cfg, TWO, count=7, key=KEY, sampling=generate.SamplingConfig(1.0)
        )
      )
      for name, s in (("resumed", back), ("never stopped", self.session))
    }
    for (token, session), (same, other) in zip(*run.values(), strict=True):
      np.testing.assert_array_equal(token, same)
      hybrids.assert_same(session, other)
    self.assertEqual(session.windows, 4)

  def test_it_is_written_whole_or_not_at_all(self):
    self.save()
    first = self.path.read_bytes()
    self.save()
    self.assertEqual((self.path.read_bytes(), len(list(self.dir.iterdir()))), (first, 1))
    with self.assertRaisesRegex(ConfigError, "session: .*no/session cannot be written: No such file"):
      session_file.save(self.dir / "no" / "session", self.session, self.weights, self.cfg, TWO)
    self.path.unlink()
    self.path.mkdir()
    with self.assertRaisesRegex(ConfigError, "cannot be written: Is a directory"):
      self.save()
    self.assertLen(list(self.dir.iterdir()), 1)

  def test_what_changes_no_number_may_change(self):
    self.save()
    cfg = config.replace(self.cfg, fast={"kernel": "xla"})
    sleep_cfg = SleepConfig(num_passes=2, loops="unroll", remat="pass", backprop_passes=1)
    hybrids.assert_same(session_file.load(self.path, self.weights, cfg, sleep_cfg), self.session)

  def test_another_models(self):
    self.save()
    other = config.replace(self.cfg, window=5)
    self.refused("is another model's: model.window was 4, is 5", cfg=other)
    self.refused("is another model's: sleep.num_passes was 2, is 3", sleep_cfg=SleepConfig(num_passes=3))
    self.refused("is of other weights", weights=hybrids.random_params(self.cfg, seed=1))

  @parameterized.parameters(0, 7, 100, 0.5, 0.999)
  def test_cut_off(self, keep):
    self.save()
    data = self.path.read_bytes()
    self.path.write_bytes(data[: keep if keep >= 1 or keep == 0 else int(keep * len(data))])
    self.refused("session: .* is damaged or no session")

  def test_other_files(self):
    self.refused("session: there is no file")
    for data in (b"a thesis, not a session", safetensors.numpy.save({"x": np.zeros(2)})):
      self.path.write_bytes(data)
      self.refused("is damaged or no session")

  @parameterized.parameters(
    ({"filled": 4}, "2 rows, 4 tokens, 2 windows"),
    ({"windows": -1}, "2 rows, 2 tokens, -1 windows"),
    ({"batch": 3}, "missing, unknown or misshapen"),
    ({"format": 2}, "is of format 2, this program reads 1"),
    ({"batch": None}, "is damaged or no session"),
    ({"model": 1}, "is another model's: model was 1"),
  )
  def test_a_header_that_lies(self, changes, message):
    self.save()
    with safetensors.safe_open(self.path, framework="np") as opened:
      header = json.loads(opened.metadata()[session_file.HEADER])
      arrays = {name: opened.get_tensor(name) for name in opened.keys()}
    changed = {session_file.HEADER: json.dumps(header | changes)}
    self.path.write_bytes(safetensors.numpy.save(arrays, metadata=changed))
    self.refused(message)

  def test_a_bit_that_turned(self):
    self.save()
    data = bytearray(self.path.read_bytes())
    data[-1] ^= 1
    self.path.write_bytes(data)
    self.refused("is damaged: its checksum is wrong")

  def test_a_missing_array(self):
    self.save()
    with safetensors.safe_open(self.path, framework="np") as opened:
      metadata = opened.metadata()
      arrays = {name: opened.get_tensor(name) for name in opened.keys()}
    arrays.pop(".logits")
    header = json.loads(metadata[session_file.HEADER]) | {"sha256": session_file._checksum(arrays)}
    metadata = {session_file.HEADER: json.dumps(header)}
    self.path.write_bytes(safetensors.numpy.save(arrays, metadata=metadata))
    self.refused("damaged: .logits missing, unknown or misshapen")
