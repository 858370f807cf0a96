"""Any name that a file system allows is a name for a workdir: what is saved there can be opened again."""

import os
import shutil
import tempfile

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sleep_jax.report import load
from sleep_jax.runtime import files, metrics, workdir
from sleep_jax.runtime.checkpoint import Checkpoints

ODD = [
  *("n[1]", "[", "]", "a*b", "**", "?", "{a,b}", "~", "~root", "$HOME", "${x}", "%41", "%s", "#x", "@", "!"),
  *("a b", " a", "a ", "-rf", "--", "...", "gs:", "file:", "s3:", "memory:", "C:", "a:b", "\\", "\\n", "|"),
  *(
    "new\nline",
    "\r",
    "\t",
    "\x01",
    "\x7f",
    "ünïcode",
    "日本",
    "😀",
    "\u202e",
    "e\u0301",
    "\u2028",
    "\udcff",
  ),
  *("a|b", "&", ";", "'", '"', "`", "<>", "=", "+", ",", "(1)", "x" * 255, "1200", "lock", "checkpoints"),
  *("3.orbax-checkpoint-tmp-1", ".trash"),
]
NAMES = st.text(
  st.characters(codec="utf-8", exclude_characters="/\0") | st.sampled_from("[]*?{}~$%:\\\n-!. \udc80\udcff"),
  min_size=1,
  max_size=30,
).filter(lambda name: name not in (".", "..") and len(os.fsencode(name)) <= 255)


def state(seed):
  return {"w": jax.random.normal(jax.random.key(seed), (3, 5)), "n": jnp.int32(seed)}


def live_in(path):
  """A run's life in a folder: it starts, writes rows, saves, ends, and a second start finds all of it."""
  said = []
  for start in range(2):
    with workdir.prepare(path, {"seed": 1}) as run:
      with (
        metrics.Writer(run.path, report=said.append) as writer,
        Checkpoints(run.checkpoints, config=run.config, report=said.append) as saved,
      ):
        restored = saved.restore(state(0))
        assert (restored and restored[0]) == (start or None)
        if restored:
          np.testing.assert_array_equal(restored[1]["w"], state(start)["w"])
        writer.write({"kind": "train", "step": start, "loss": 0.5})
        assert saved.save(start + 1, state(start + 1), block=True)
        assert saved.poll() == [start + 1]
        assert (run.lost(), writer.lost(), saved.lost()) == (None, None, None)
  assert said == []
  assert len(metrics.read(run.metrics)) == 2
  assert len(list((run.path / "tb").iterdir())) == 2
  [loaded] = load.load_runs([path])
  assert loaded.config == {"seed": 1}


def in_new_folder(do, *names):
  folder = tempfile.mkdtemp()
  before = set(os.listdir("."))
  try:
    do(os.path.join(folder, *names))
    assert os.listdir(folder) == [names[0]]
    assert set(os.listdir(".")) == before
  finally:
    shutil.rmtree(os.fsencode(folder))


@pytest.mark.parametrize("names", [ODD[i : i + 6] for i in range(0, len(ODD), 6)], ids=ascii)
def test_a_run_lives_below_odd_names(names):
  in_new_folder(live_in, *names)


@given(names=st.lists(NAMES, min_size=1, max_size=3))
@hypothesis.settings(max_examples=5)
def test_a_run_lives_below_any_names(names):
  in_new_folder(live_in, *names)


@pytest.mark.slow
@given(names=st.lists(NAMES, min_size=1, max_size=4))
@hypothesis.settings(max_examples=300)
def test_a_run_lives_below_any_names_often(names):
  in_new_folder(live_in, *names)


@pytest.mark.parametrize("name", ODD)
def test_each_odd_name_alone_holds_checkpoints(name, tmp_path):
  with Checkpoints(tmp_path / name) as saved:
    saved.save(1, state(1), block=True)
  with Checkpoints(tmp_path / name, read_only=True) as saved:
    assert saved.restore(state(0))[0] == 1


def test_the_longest_path_that_is_accepted_holds_a_run(tmp_path):
  most = workdir._MAX_PATH - workdir._ROOM
  path = str(tmp_path)
  while len(path) < most - 201:
    path = f"{path}/{'d' * 199}"
  path = f"{path}/{'e' * (most - len(path) - 1)}"
  assert len(path) == most
  with pytest.raises(workdir.WorkdirError, match=f"has {most + 1} bytes, too many"):
    workdir.prepare(path + "e", {})
  assert list(tmp_path.iterdir()) == []
  live_in(path)
  shutil.rmtree(tmp_path / ("d" * 199))


def test_where_no_other_path_leads_there_a_name_that_cannot_be_passed_on_is_refused(tmp_path, monkeypatch):
  """As on a system without /proc: nothing is trained that could not be restored."""
  monkeypatch.setattr(files, "_HELD", "/nowhere/{}")
  for name in ("n[1]", "a*b", "gs:", "\\", "\udcff", "new\nline"):
    with pytest.raises(workdir.WorkdirError, match="its name holds") as e:
      workdir.prepare(tmp_path / name, {"seed": 1})
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="its name holds"):
      Checkpoints(tmp_path / name)
  live_in(tmp_path / "an ordinary näme, v1.0=~@%+#")


def test_messages_show_odd_paths_in_one_line(tmp_path):
  odd = tmp_path / "a\nb\x1b[2J\udcff"
  odd.mkdir()
  (odd / "file\n").write_text("mine")
  with pytest.raises(workdir.WorkdirError, match=r"a\\nb\\x1b\[2J\\udcff holds file\\n but no") as e:
    workdir.prepare(odd, {})
  assert str(e.value).isprintable()


def test_a_checkpoint_that_cannot_be_opened_again_is_not_called_saved(tmp_path, monkeypatch):
  """Whatever the reason: here Orbax is given the very path, as if nothing were known of its patterns."""
  said = []
  monkeypatch.setattr(files, "_HELD", "/nowhere/{}")
  monkeypatch.setattr(files, "_ORDINARY", files.re.compile(".*", files.re.DOTALL))
  saved = Checkpoints(tmp_path / "n[1]", report=said.append)
  with pytest.raises(ValueError, match="step 1 was not saved: .*second attempt") as e:
    saved.save(1, state(1), block=True)
  assert isinstance(e.value, files.RunFailedError)
  assert (saved.poll(), saved.latest_step) == ([], None)
  assert not list(tmp_path.rglob("manifest.json"))
