"""The command line: every mistake is one line on stderr and exit code 2, and nothing is written."""

import contextlib
import io
import json
import pathlib
import tempfile
from unittest import mock

from absl.testing import parameterized

from sleep_jax import config, train
from sleep_jax.config import ConfigError
from sleep_jax.data import batching
from sleep_jax.experiments import cli, rule110
from sleep_jax.experiments.configs import rule110 as presets
from sleep_jax.runtime import checkpoint, metrics, workdir
from tests.forked import ROOT, Experiment

FILE = str(ROOT / "experiments" / "configs" / "rule110.py")
TINY = f"--config={FILE}:tiny"

# What is added to `--config=...:tiny --workdir=new`, and words of the one line that comes back.
MISTAKES = {
  "unknown_field": (("--config.sleep.num_pases=2",), 'did you mean "num_passes"?'),
  "unknown_group": (("--config.slep.num_passes=2",), "config has no field 'slep'; did you mean \"sleep\"?"),
  "field_of_a_value": (("--config.model.embed_dim.x=3",), "config.model.embed_dim is a single value"),
  "value_for_a_group": (("--config.train=3",), "--config.train"),
  "unknown_flag": (("--wordkir=x",), "'wordkir'. Did you mean: workdir"),
  "unknown_field_in_two_words": (("--config.sleep.num_pases", "2"), 'did you mean "num_passes"?'),
  "unknown_config_flag": (
    ("--confg.seed=1",),
    "Unknown command line flag 'confg.seed'; did you mean --config.seed?",
  ),
  "field_without_its_group": (("--steps=5",), "flag 'steps'; did you mean --config.train.steps?"),
  "field_of_two_groups": (
    ("--num_heads=2",),
    "did you mean --config.model.attention.num_heads or --config.model.fast.num_heads?",
  ),
  "field_of_one_of_two_groups": (("--fast.num_heads=2",), "; did you mean --config.model.fast.num_heads?"),
  "field_of_the_task": (("--rollout_steps=2",), "; did you mean --config.data.rollout_steps?"),
  "extra_argument": (("tiny",), "unexpected argument 'tiny': every option is a flag"),
  "text_for_a_number": (("--config.sleep.num_passes=two",), "--config.sleep.num_passes=two"),
  "fraction_for_a_whole_number": (("--config.sleep.num_passes=1.5",), "--config.sleep.num_passes=1.5"),
  "text_for_a_rate": (("--config.optim.muon_lr=fast",), "--config.optim.muon_lr=fast"),
  "no_value": (("--config.sleep.num_passes",), "--config.sleep.num_passes"),
  "empty_value": (("--config.sleep.num_passes=",), "--config.sleep.num_passes="),
  "no_passes": (("--config.sleep.num_passes=0",), "sleep.num_passes: must be at least 1, got 0"),
  "negative_passes": (("--config.sleep.num_passes=-2",), "sleep.num_passes: must be at least 1, got -2"),
  "no_window": (("--config.model.window=0",), "model.window: must be at least 1, got 0"),
  "window_does_not_divide": (("--config.model.window=5",), "model.window: must divide the 12 cells"),
  "window_too_short": (("--config.model.window=1",), "model.window: must hold the 2 answers"),
  "kv_heads_do_not_divide": (
    ("--config.model.attention.num_kv_heads=3",),
    "must divide num_heads = 2, got 3",
  ),
  "odd_heads": (("--config.model.attention.head_dim=7",), "head_dim: must be even for RoPE, got 7"),
  "vocab": (("--config.model.vocab_size=4",), "model.vocab_size: must be 3 ('0', '1', ASK), got 4"),
  "block": (("--config.model.blocks=('attn','gnd')",), "unknown block 'gnd'; did you mean \"gdn\"?"),
  "kernel": (
    ("--config.model.fast.kernel=xls",),
    "model.fast.kernel: unknown value 'xls'; did you mean \"xla\"",
  ),
  "form": (
    ("--config.model.attention.implementation=flash",),
    "model.attention.implementation: unknown value 'flash'; did you mean \"splash\"?",
  ),
  "form_of_another_platform": (
    ("--config.model.attention.implementation=cudnn",),
    "model.attention.implementation: 'cudnn' runs on gpu, not on cpu; known here: dense, blocked",
  ),
  "dtype": (("--config.model.dtype=bf16",), "model.dtype: unknown value 'bf16'; did you mean"),
  "rate_nan": (("--config.optim.muon_lr=nan",), "optim.muon_lr: must be above 0, got nan"),
  "seed": (("--config.seed=-1",), "seed: must be at least 0, got -1"),
  "steps_of_a_dispatch": (("--config.train.steps=7",), "train.steps: must be a multiple of train.steps_per"),
  "too_many_devices": (("--config.mesh.data=64",), "mesh: data = 64 x model = 1 does not fit 1 device(s)"),
}

# Whole command lines. {dir} is a folder with a file called `file`.
WHOLE = {
  "preset": ((f"--config={FILE}:huge", "--workdir=new"), "unknown preset 'huge'; known: tiny, demo"),
  "no_preset": ((f"--config={FILE}:", "--workdir=new"), "unknown preset ''; known: tiny, demo"),
  "no_config": (("--workdir=new",), "--config is required"),
  "nothing": ((), "--config is required"),
  "no_workdir": ((TINY,), "--workdir is required"),
  "empty_workdir": ((TINY, "--workdir="), "the workdir is an empty path"),
  "no_such_file": (
    ("--config=nofile.py:tiny", "--workdir=new"),
    "--config: there is no file 'nofile.py'; there are",
  ),
  "no_such_file_in_two_words": (
    ("--config", "nofile.py:tiny", "--workdir", "new"),
    "there is no file 'nofile.py'",
  ),
  "config_is_a_folder": (("--config={dir}", "--workdir=new"), "--config: there is no file"),
  "empty_config": (("--config=", "--workdir=new"), "--config: there is no file ''"),
  "workdir_is_a_file": ((TINY, "--workdir={dir}/file"), "file is a file, a workdir is a directory"),
  "workdir_in_a_file": ((TINY, "--workdir={dir}/file/new"), "cannot be written: Not a directory"),
  "workdir_is_a_url": ((TINY, "--workdir=gs://bucket/run"), "not a URL"),
}


def contents(folder):
  """Every path below a folder; files with their bytes."""
  return {
    str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))
  }


class CommandLineTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    scratch = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    cls.experiment = cls.enterClassContext(Experiment("experiments.rule110", scratch))

  def setUp(self):
    super().setUp()
    self.dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    (self.dir / "file").write_text("mine")

  def assert_refused(self, message, *arguments):
    before = contents(self.dir)
    ended = self.experiment.run(*arguments, cwd=self.dir)
    self.assertEqual(ended.code, 2, ended.err)
    self.assertIn(message, ended.err)
    self.assertLen(ended.err.splitlines(), 1)
    self.assertStartsWith(ended.err, "error: ")
    self.assertEqual(ended.out, "")
    self.assertEqual(contents(self.dir), before)

  @parameterized.named_parameters((name, *case) for name, case in MISTAKES.items())
  def test_a_mistake_in_a_field(self, arguments, message):
    self.assert_refused(message, TINY, "--workdir=new", *arguments)

  @parameterized.named_parameters((name, *case) for name, case in WHOLE.items())
  def test_a_mistake_in_the_command(self, arguments, message):
    self.assert_refused(message, *(a.replace("{dir}", str(self.dir)) for a in arguments))

  def test_a_mistake_in_the_config_file(self):
    (self.dir / "broken.py").write_text("def get_config(preset):\n  return (\n")
    self.assert_refused("broken.py, line 2: '(' was never closed", "--config=broken.py:tiny", "--workdir=new")

  def prepared(self, name="run", **changes):
    """A workdir as a run with the tiny preset, changed, leaves it at its start."""
    cfg, _ = rule110.build(presets.get_config("tiny").to_dict())
    path = self.dir / name
    workdir.prepare(path, config.to_dict(config.replace(cfg, **changes))).close()
    (path / "lock").unlink()
    return path

  def test_the_workdir_of_another_run_is_left_alone(self):
    path = self.prepared(sleep={"num_passes": 2}, seed=1)
    before = contents(path)
    ended = self.experiment.run(TINY, f"--workdir={path}", cwd=self.dir)
    self.assertEqual((ended.code, ended.out), (2, ""))
    [line] = ended.err.splitlines()
    self.assertIn("was made with another configuration", line)
    self.assertIn("sleep.num_passes: 2 in the workdir, 1 asked for", line)
    self.assertIn("seed: 1 in the workdir, 0 asked for", line)
    after = contents(path)
    after.pop("lock")
    self.assertEqual(after, before)

  def test_a_run_whose_rate_depends_on_its_length_is_not_made_longer(self):
    for at, (field, change) in enumerate((("decay_share", 0.5), ("warmup_share", 0.5), ("decay_steps", 10))):
      path = self.prepared(f"run{at}", optim={field: change})
      (path / "metrics.jsonl").write_text('{"kind": "done", "step": 20}\n')
      flags = (f"--config.optim.{field}={change}", "--config.train.steps=40")
      ended = self.experiment.run(TINY, *flags, f"--workdir={path}", cwd=self.dir)
      self.assertEqual((ended.code, ended.out), (2, ""))
      [line] = ended.err.splitlines()
      self.assertIn("train.steps: 20 in the workdir, 40 asked for", line)

  def test_a_folder_of_other_things_is_left_alone(self):
    (self.dir / "thesis").mkdir()
    (self.dir / "thesis" / "chapter1.tex").write_text("\\section")
    self.assert_refused("so it is no workdir", TINY, f"--workdir={self.dir / 'thesis'}")

  def test_damaged_metrics_are_the_one_line(self):
    path = self.prepared()
    (path / "metrics.jsonl").write_text('{"kind": "eval", "step": 0}\n{"ki\n{"kind": "eval", "step": 1}\n')
    ended = self.experiment.run(TINY, f"--workdir={path}", cwd=self.dir)
    self.assertEqual(ended.code, 2, ended.err)
    [line] = ended.err.splitlines()
    self.assertIn("metrics.jsonl line 2 is damaged", line)

  def test_a_finished_run_is_not_run_again(self):
    path = self.prepared()
    (path / "metrics.jsonl").write_text('{"kind": "done", "step": 20}\n')
    before = contents(path / "checkpoints")
    ended = self.experiment.run(TINY, f"--workdir={path}", cwd=self.dir)
    self.assertEqual((ended.code, ended.err), (0, ""))
    self.assertEqual(ended.out, f"{path} is complete: 20 steps\n")
    self.assertEqual(contents(path / "checkpoints"), before)


class ExitCodeTest(parameterized.TestCase):
  @parameterized.parameters(
    (None, 0, ""),
    (ConfigError("seed: no"), 2, "error: seed: no\n"),
    (workdir.WorkdirError("w"), 2, "error: w\n"),
    (checkpoint.CheckpointError("c"), 2, "error: c\n"),
    (metrics.MetricsError("m"), 2, "error: m\n"),
    (train.NotFiniteError("step 3: loss nan"), 1, "failed: step 3: loss nan\n"),
    (batching.WorkerError("data.workers: died"), 1, "failed: data.workers: died\n"),
    (train.PreemptedError("stopped by SIGTERM"), 3, "stopped by SIGTERM\n"),
    (KeyboardInterrupt(), 1, "stopped at once; what was saved before stays\n"),
  )
  def test_each_end_has_its_code_and_its_line(self, error, code, line):
    main, err = mock.Mock(side_effect=error, return_value=None), io.StringIO()
    with mock.patch.object(cli.app, "run") as absl_run, self.assertRaises(AssertionError):
      cli.run(main)
    [guarded] = absl_run.call_args.args
    with contextlib.redirect_stderr(err):
      self.assertEqual(guarded(["program"]), code)
    self.assertEqual(err.getvalue(), line)


class BuildTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.values = presets.get_config("tiny").to_dict()

  def refused(self, message):
    with self.assertRaises(ConfigError) as caught:
      rule110.build(self.values)
    self.assertIn(message, str(caught.exception))
    self.assertNotIn("\n", str(caught.exception))

  @parameterized.parameters(*presets.PRESETS)
  def test_every_preset_holds_every_field_and_fits_itself(self, preset):
    values = presets.get_config(preset).to_dict()
    cfg, task = rule110.build(values)
    self.assertEqual(json.loads(json.dumps(config.to_dict(cfg))), json.loads(json.dumps(values)))
    self.assertLen(task.layout, cfg.data.length)

  def test_fields_and_groups_have_their_names(self):
    self.values["model"]["attention"]["head_dims"] = 4
    self.refused('model.attention.head_dims: no such field; did you mean "head_dim"?')
    del self.values["model"]["attention"]["head_dims"], self.values["data"]
    self.refused("data: is required")

  @parameterized.parameters(
    (3, 16, "model.embed_dim: must be a multiple of model.attention.num_heads = 3"),
    (2, 6, "model.attention.head_dim: must be even for RoPE, got 6 / 2"),
  )
  def test_the_width_must_divide_into_heads(self, heads, width, message):
    self.values["model"]["embed_dim"] = width
    self.values["model"]["attention"] |= {"num_heads": heads, "head_dim": None}
    self.refused(message)

  def test_every_window_that_divides_the_context_will_do(self):
    for window in range(1, 14):
      self.values["model"]["window"] = window
      if 12 % window == 0 and window >= 2:
        rule110.build(self.values)
      else:
        self.refused("model.window")

  def test_required_gives_the_value_or_the_line(self):
    self.assertEqual(cli.required("seed", 0), 0)
    with self.assertRaisesRegex(ConfigError, "^--seed is required$"):
      cli.required("seed", None)
