"""A session that was stored goes on as if it had never stopped; every other file is refused in one line."""

import errno
import hashlib
import json
import os
import pathlib
import random
import stat
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from absl.testing import parameterized

from sleep_jax import config, generate, session_file
from sleep_jax.config import ConfigError, SleepConfig
from sleep_jax.session_file import SessionError
from tests import hybrids, unprivileged

TWO = SleepConfig(num_passes=2)
KEY = jax.random.key(5)
TEXT = {"unshown": "é", "tokens": [1, 2]}


def session_of(cfg, weights, length=10):
  session = generate.start(cfg, TWO, 2)
  return generate.read(weights, hybrids.random_tokens(2, length), session, cfg, TWO)


def parts(data):
  """The header of a session file as plain data, and the bytes behind it."""
  length = int.from_bytes(data[:8], "little")
  return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header, rest):
  """The file of a header and what follows, with the right checksum: what only a person can make."""
  blank = {**header, "__metadata__": {**header["__metadata__"], "sha256": "0" * 64}}
  text = json.dumps(blank, separators=(",", ":")).encode()
  head = len(text).to_bytes(8, "little") + text
  digest = hashlib.sha256(head + rest).hexdigest().encode()
  return head.replace(b'"sha256":"' + b"0" * 64, b'"sha256":"' + digest) + rest


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

  def save(self, path=None):
    session_file.save(path or self.path, self.session, self.weights, self.cfg, TWO, text=TEXT)

  def load(self):
    return session_file.load_with_text(self.path, self.weights, self.cfg, TWO)

  def check_path(self, path=None):
    session_file.check_path(path or self.path, self.cfg, TWO, 2)

  def refused(self, message, weights=None, cfg=None, sleep_cfg=TWO):
    with self.assertRaisesRegex(ConfigError, message) as caught:
      session_file.load(self.path, weights or self.weights, cfg or self.cfg, sleep_cfg)
    self.assertNotIn("\n", str(caught.exception))
    self.assertLess(len(str(caught.exception)), 500)

  def refused_or_same(self, data):
    """A file either means exactly what was stored, or is refused in one line."""
    self.path.write_bytes(data)
    try:
      session, text = self.load()
    except ConfigError as e:
      self.assertIn(str(self.path), str(e))
      self.assertNotIn("\n", str(e))
      return False
    self.assertEqual((jax.tree.structure(session), text), (jax.tree.structure(self.session), TEXT))
    hybrids.assert_same(session, self.session)
    return True

  def test_resumed_it_goes_on_to_the_bit(self):
    self.save()
    back, text = self.load()
    self.assertEqual(text, TEXT)
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

  def test_it_is_a_safetensors_file(self):
    self.save()
    arrays = safetensors.numpy.load_file(self.path)
    np.testing.assert_array_equal(arrays[".tokens"], self.session.tokens)
    self.assertLen(arrays, len(jax.tree.leaves(self.session)))

  def test_it_is_written_whole_or_not_at_all(self):
    self.save()
    first = self.path.read_bytes()
    self.save()
    self.assertEqual((self.path.read_bytes(), len(list(self.dir.iterdir()))), (first, 1))
    with self.assertRaisesRegex(ConfigError, "session: .*no/session cannot be written: No such file"):
      self.save(self.dir / "no" / "session")
    self.path.unlink()
    self.path.mkdir()
    with self.assertRaisesRegex(ConfigError, "cannot be written: it is a folder"):
      self.save()
    self.assertLen(list(self.dir.iterdir()), 1)

  def test_what_changes_no_number_may_change(self):
    self.save()
    cfg = config.replace(self.cfg, fast={"kernel": "xla"}, attention={"implementation": "blocked"})
    sleep_cfg = SleepConfig(num_passes=2, loops="unroll", remat="pass", backprop_passes=1, when="always")
    hybrids.assert_same(session_file.load(self.path, self.weights, cfg, sleep_cfg), self.session)

  @parameterized.parameters(("sleep", "when"), ("sleep", "kept"), ("model", "norm_cast"))
  def test_a_field_that_came_later_had_its_default(self, group, field):
    """A file of the time before there was such a field of the config."""
    self.save()
    header, rest = parts(self.path.read_bytes())
    told = json.loads(header["__metadata__"]["sleep_jax_session"])
    del told[group][field]
    header["__metadata__"]["sleep_jax_session"] = json.dumps(told)
    self.path.write_bytes(joined(header, rest))
    hybrids.assert_same(self.load()[0], self.session)

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
    self.path.write_bytes(data + b"\0")
    self.refused("session: .* is damaged or no session")

  def test_every_byte_is_under_the_checksum(self):
    """One bit of every byte of the header, the length before it included, and of a sample of what follows."""
    self.save()
    data, rng = self.path.read_bytes(), random.Random(0)
    behind = 8 + int.from_bytes(data[:8], "little")
    places = [*range(behind), *rng.sample(range(behind, len(data)), 200), len(data) - 1]
    same = 0
    for at in places:
      bit = 1 << rng.randrange(8)
      same += self.refused_or_same(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
    self.assertEqual(same, 0)

  @pytest.mark.slow
  def test_every_bit_is_under_the_checksum(self):
    self.save()
    data = self.path.read_bytes()
    behind = 8 + int.from_bytes(data[:8], "little")
    for at in range(behind):
      for bit in range(8):
        self.assertFalse(self.refused_or_same(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]))

  def test_files_of_format_1(self):
    """As they were: the position outside the checksum, in the order of the safetensors library."""
    self.save()
    header, _ = parts(self.path.read_bytes())
    told = json.loads(header["__metadata__"][session_file.HEADER]) | {"format": 1, "sha256": "0" * 64}
    old = safetensors.numpy.save(
      {".tokens": self.session.tokens, ".valid": self.session.valid},
      metadata={session_file.HEADER: json.dumps(told)},
    )
    self.path.write_bytes(old)
    self.refused("is of format 1, this program reads 2: read the text again")

  def test_other_files(self):
    self.refused("session: there is no file")
    for data in (b"a thesis, not a session", safetensors.numpy.save({"x": np.zeros(2)})):
      self.path.write_bytes(data)
      self.refused("is damaged or no session")
    self.path.unlink()
    os.mkfifo(self.path)  # nobody writes to it
    self.refused("is no regular file")
    self.path.unlink()
    self.path.mkdir()
    self.refused("cannot be read: Is a directory|is no regular file")
    self.path.rmdir()
    self.path.symlink_to("/dev/zero")
    self.refused("is no regular file")
    self.path.unlink()
    self.path.symlink_to(self.path)
    self.refused("cannot be read: Too many levels")

  def test_a_link_is_followed(self):
    self.path.symlink_to(self.dir / "there")
    self.check_path()
    self.save()
    self.assertTrue(self.path.is_symlink() and (self.dir / "there").is_file())
    hybrids.assert_same(self.load()[0], self.session)

  @parameterized.parameters(
    ({"filled": 4}, "2 rows, 4 tokens, 2 windows"),
    ({"windows": -1}, "2 rows, 2 tokens, -1 windows"),
    ({"windows": 10**30}, "2 rows, 2 tokens, 10+ windows"),
    ({"batch": 3}, "missing, unknown or misshapen"),
    ({"batch": 1 << 40}, "1099511627776 rows"),
    ({"batch": True}, "is damaged or no session .True is no whole number"),
    ({"format": 3}, "is of format 3, this program reads 2"),
    ({"format": [2]}, r"is of format \[2\], this program reads 2"),
    ({"batch": None}, "is damaged or no session"),
    ({"model": 1}, "is another model's: model was 1"),
    ({"sleep": {}}, "is another model's: sleep.num_passes was None"),
  )
  def test_a_header_that_lies(self, changes, message):
    self.save()
    header, rest = parts(self.path.read_bytes())
    told = json.loads(header["__metadata__"][session_file.HEADER])
    header["__metadata__"][session_file.HEADER] = json.dumps(told | changes)
    self.path.write_bytes(joined(header, rest))
    self.refused(message)

  def test_arrays_that_lie(self):
    self.save()
    header, rest = parts(self.path.read_bytes())
    self.assertTrue(self.refused_or_same(joined(header, rest)))  # so that it is not the checksum that refuses
    at, _ = header[".tokens"]["data_offsets"]
    wrong = rest[:at] + np.int32(self.cfg.vocab_size).tobytes() + rest[at + 4 :]
    self.path.write_bytes(joined(header, wrong))
    self.refused("is damaged: it has tokens in .*11")
    at, _ = header[".valid"]["data_offsets"]
    self.path.write_bytes(joined(header, rest[:at] + b"\2" + rest[at + 1 :]))
    self.refused("neither true nor false")

  def test_a_missing_array(self):
    self.save()
    header, rest = parts(self.path.read_bytes())
    *_, last = header
    size = header.pop(last)["data_offsets"]
    self.path.write_bytes(joined(header, rest[: size[0]]))
    self.refused(f"damaged: {last} missing, unknown or misshapen")
    header["a name\nof two lines" + 1000 * "x"] = {
      "dtype": "BOOL",
      "shape": [0],
      "data_offsets": size[:1] * 2,
    }
    self.path.write_bytes(joined(header, rest[: size[0]]))
    self.refused("damaged: .* a name of two lines|damaged: .*missing, unknown or misshapen")

  def test_headers_with_the_right_checksum_that_were_tampered_with(self, count=300):
    """No traceback, no hang, nothing allocated by a size that is only claimed."""
    self.save()
    header, rest = parts(self.path.read_bytes())
    rng, names = random.Random(1), [name for name in header if name != "__metadata__"]
    huge = [-1, 0, 1, 1 << 31, 1 << 62, 1 << 80, 1.5, None, True, "x", [], {}, [[1]], float("nan")]
    for _ in range(count):
      made = json.loads(json.dumps(header))
      name = rng.choice(names)
      field = rng.choice([*made[name], "more", None])
      if field is None:
        made[name] = rng.choice(huge)
      elif isinstance(made[name].get(field), list) and rng.random() < 0.8:
        values = made[name][field]
        values[rng.randrange(len(values) + 1) :] = rng.sample(huge, rng.randint(0, 2))
      else:
        made[name][field] = rng.choice(["F64", "I32", *huge])
      self.refused_or_same(joined(made, rest))

  def test_text_that_is_no_header(self):
    self.save()
    header, rest = parts(self.path.read_bytes())
    digest = header["__metadata__"]["sha256"]
    for text in (
      "[" * 100_000,
      '{"__metadata__":' * 5000,
      "null",
      "[]",
      "{}",
      '{"__metadata__":null}',
      '{"__metadata__":{"sleep_jax_session":1}}',
      '{"__metadata__":{"sleep_jax_session":"[]"}}',
      '{"__metadata__":{"sleep_jax_session":"{\\"format\\":2}","sha256":"' + digest + '"}}',
      json.dumps(header)[:-1]
      + ',".tokens":{"dtype":"I32","shape":[0],"data_offsets":[0,0]}}',  # a name twice
      '{"a":' + "9" * 5000 + "}",
      "\udcff",
    ):
      data = text.encode("utf-8", "surrogateescape")
      self.assertFalse(self.refused_or_same(len(data).to_bytes(8, "little") + data + rest))
    for length in (0, 1 << 20, 1 << 40, (1 << 64) - 1):
      self.assertFalse(self.refused_or_same(length.to_bytes(8, "little") + b"{}" + rest))

  def test_a_path_that_cannot_be_written_to(self):
    self.check_path()
    self.assertEmpty(list(self.dir.iterdir()))
    (self.dir / "file").write_text("")
    os.mkfifo(self.dir / "pipe")
    for path, message in (
      (self.dir, "it is a folder"),
      (self.dir / "no" / "session", "No such file or directory"),
      (self.dir / "file" / "session", "Not a directory"),
      (self.dir / "pipe", "it is no regular file"),
      (pathlib.Path("/dev/full"), "it is no regular file"),
      (self.dir / ("x" * 300), "File name too long"),
      (pathlib.Path("a\0b"), "null"),
    ):
      with self.assertRaisesRegex(ConfigError, f"session: .*{message}") as caught:
        self.check_path(path)
      self.assertNotIn("\n", str(caught.exception))
    self.assertEqual({p.name for p in self.dir.iterdir()}, {"file", "pipe"})

  @unprivileged.user()
  def test_no_permission(self):
    self.save()
    self.path.chmod(stat.S_IRUSR)
    with self.assertRaisesRegex(ConfigError, "session: .* cannot be written: Permission denied"):
      self.check_path()
    self.dir.chmod(stat.S_IRUSR | stat.S_IXUSR)
    self.addCleanup(self.dir.chmod, stat.S_IRWXU)
    with self.assertRaisesRegex(ConfigError, "session: .* cannot be written: Permission denied"):
      self.check_path(self.dir / "new")

  def failing(self, name, number):
    """Makes a call of the system fail."""

    def fail(*args, **kwargs):
      del args, kwargs
      raise OSError(number, os.strerror(number))

    patch = pytest.MonkeyPatch()
    patch.setattr(os, name, fail)
    self.addCleanup(patch.undo)
    return patch

  @parameterized.parameters("ENOSPC", "EDQUOT", "EIO", "EFBIG")
  def test_a_disk_that_fails(self, number):
    self.save()
    first = self.path.read_bytes()
    for name in ("posix_fallocate", "fsync"):
      patch = self.failing(name, getattr(errno, number))
      with self.assertRaisesRegex(SessionError, "session: .* cannot be written: "):
        self.check_path() if name == "posix_fallocate" else self.save()
      patch.undo()
      self.assertEqual((self.path.read_bytes(), len(list(self.dir.iterdir()))), (first, 1))

  def test_a_file_system_that_cannot_reserve_room(self):
    self.failing("posix_fallocate", errno.EOPNOTSUPP)
    self.check_path()
    self.assertEmpty(list(self.dir.iterdir()))

  def test_a_file_that_cannot_be_replaced_leaves_the_session_beside_it(self):
    self.save()
    patch = self.failing("replace", errno.EBUSY)
    with self.assertRaisesRegex(SessionError, "cannot be replaced: .*; it is stored in (.*)") as caught:
      self.save()
    patch.undo()
    kept = pathlib.Path(str(caught.exception).rpartition(" ")[2])
    self.assertEqual(kept.read_bytes(), self.path.read_bytes())

  def test_one_number_that_is_not_finite_is_kept_as_it_is(self):
    session = self.session.replace(logits=self.session.logits.at[0, 0].set(jnp.nan))
    session_file.save(self.path, session, self.weights, self.cfg, TWO)
    hybrids.assert_same(session_file.load(self.path, self.weights, self.cfg, TWO), session)
