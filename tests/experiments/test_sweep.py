"""Sweeps: many command lines, the finished skipped, the broken run again, their exit codes passed on."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from unittest import mock

from absl.testing import parameterized

from sleep_jax.config import ConfigError
from sleep_jax.experiments import rule110, runner
from sleep_jax.experiments.configs import depth as depths
from sleep_jax.experiments.configs import rule110 as presets
from sleep_jax.experiments.configs import takeoff as takeoffs
from tests.forked import ROOT, Experiment

FILE, GSM = (str(ROOT / "experiments" / "configs" / f"{name}.py") for name in ("rule110", "gsm_infinite"))


def python(code, *arguments):
  """A command line of a stand-in for a run."""
  return [sys.executable, "-c", code, *map(str, arguments)]


def ends(code):
  return python(f"raise SystemExit({code})")


WAITS = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
pathlib.Path(sys.argv[1]).touch()
for _ in range(600):
  time.sleep(0.1)
"""

MEETS = """
import pathlib, sys, time
mine, other = map(pathlib.Path, sys.argv[1:])
mine.touch()
for _ in range(300):
  if other.exists():
    sys.exit(0)
  time.sleep(0.1)
sys.exit(1)
"""


def field(values, dotted):
  """A field of nested mappings by its dotted name."""
  for name in dotted.split("."):
    values = values[name]
  return values


class SweepTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.dir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def quietly(self, run, *args):
    """What `run` returns and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      got = run(*args)
    return got, out.getvalue(), err.getvalue()

  def record(self, name, *rows):
    (self.dir / name).mkdir()
    text = "".join(json.dumps({"kind": kind, "step": step}) + "\n" for kind, step in rows)
    (self.dir / name / "metrics.jsonl").write_text(text)
    return self.dir / name

  def test_runs_of_the_figures(self):
    fig2a = presets.sweep("fig2a", seeds=2)
    self.assertLen(fig2a, 12)
    self.assertEqual({c["data.rollout_steps"] for c in fig2a.values()}, {4, 8, 10, 12, 14, 16})
    self.assertEqual(presets.sweep("fig2a_cpu", seeds=2), fig2a)
    fig2b = presets.sweep("fig2b")
    self.assertEqual(sorted(c["sleep.num_passes"] for c in fig2b.values()), [1, 2, 3, 4])

  @parameterized.parameters(*presets.PRESETS)
  def test_every_command_is_one_that_the_experiment_takes(self, preset):
    todo = runner.commands(f"{FILE}:{preset}", str(self.dir / "all"), 2)
    self.assertEqual(set(todo), set(presets.sweep(preset, 2)))
    configs = set()
    for name, command in todo.items():
      self.assertEqual(command[:3], [sys.executable, "-m", "sleep_jax.experiments.rule110"])
      self.assertEqual(command[3:5], [f"--config={FILE}:{preset}", f"--workdir={self.dir / 'all' / name}"])
      values = presets.get_config(preset)
      for argument in command[5:]:
        key, _, value = argument.removeprefix("--config.").partition("=")
        values.update_from_flattened_dict({key: type(field(values, key))(value)})
      configs.add(rule110.build(values.to_dict())[0])
    self.assertLen(configs, len(todo))  # no two are the same run
    self.assertFalse((self.dir / "all").exists())

  def test_every_run_of_the_study_of_takeoffs_is_another_and_builds(self):
    todo = takeoffs.sweep("demo", seeds=2)
    self.assertLen(todo, 2 * (3 * len(takeoffs.SETTINGS) - 2))
    self.assertEqual({name.rsplit("_", 2)[0] for name in todo}, set(takeoffs.SETTINGS))
    self.check_study(takeoffs.get_config("demo"), todo, presets.DEMO_STEPS)
    plain, demo = (self.built(c.get_config("demo")) for c in (takeoffs, presets))
    chosen = takeoffs.get_config("demo")
    chosen.update_from_flattened_dict(takeoffs.SETTINGS["two_heads_cosine"](presets.DEMO_STEPS))
    self.assertEqual(self.built(chosen), demo)  # the demo has what the study found
    self.assertNotEqual(plain, demo)

  def test_the_study_of_depth_differs_from_the_demo_in_depth_alone(self):
    todo = depths.sweep("demo", seeds=2)
    short = {name: x for name, x in todo.items() if name.startswith("short_")}
    self.assertLen(short, 2 * 2 * len(depths.DEPTHS))
    todo = {name: x for name, x in todo.items() if name not in short}
    self.assertLen(todo, 2 * 3 * len(depths.DEPTHS))
    for changes in short.values():  # as many tokens as N = 4
      (four,) = [
        x
        for x in todo.values()
        if x | {"sleep.num_passes": 0} == changes | {"sleep.num_passes": 0} and x["sleep.num_passes"] == 4
      ]
      self.assertLess(changes["sleep.num_passes"], four["sleep.num_passes"])
    self.assertNotIn(presets.get_config("demo").data.rollout_steps, depths.DEPTHS)
    easy = {name: x for name, x in todo.items() if x["data.rollout_steps"] <= depths.EASY}
    deep = {name: x for name, x in todo.items() if name not in easy}
    self.check_study(depths.get_config("demo"), deep, presets.DEMO_STEPS)
    self.check_study(depths.get_config("demo"), easy, presets.DEMO_STEPS // 4)
    demo = presets.sweep("demo", seeds=2)
    for name, changes in deep.items():
      (same,) = [run for run in demo.values() if run.items() <= changes.items()]
      self.assertEqual(set(changes) - set(same), {"data.rollout_steps"}, name)

  def test_the_study_of_four_blocks_compares_equal_tokens_and_equal_passes(self):
    todo = depths.sweep("four_blocks", seeds=2)
    half = {name: x for name, x in todo.items() if name.startswith("half_") or x["sleep.num_passes"] > 1}
    longer = {name: x for name, x in todo.items() if name not in half}
    self.assertLen(half, 2 * 3 * len(depths.DEEP))
    self.assertLen(longer, 2 * len(depths.DEEP))
    self.assertEqual({x["train.steps"] for x in half.values()}, {presets.DEMO_STEPS // 2})
    base, demo = (self.built(c) for c in (depths.get_config("four_blocks"), presets.get_config("demo")))
    self.assertEqual(base.model.blocks, demo.model.blocks * 2)
    self.assertEqual(dataclasses.replace(base, model=demo.model), demo)
    self.check_study(depths.get_config("four_blocks"), longer, presets.DEMO_STEPS)

  def built(self, values):
    return rule110.build(values.to_dict())[0]

  def check_study(self, base, todo, passes):
    """Every run builds, no two are the same, and every N makes so many passes."""
    built = set()
    for changes in todo.values():
      values = base.copy_and_resolve_references()
      values.update_from_flattened_dict(changes)
      cfg, task = rule110.build(values.to_dict())
      task.check(cfg)
      built.add(cfg)
      self.assertEqual(cfg.sleep.num_passes * cfg.train.steps, passes)  # as much compute for every N
    self.assertLen(built, len(todo))

  def test_a_file_without_a_sweep_or_an_unknown_preset_is_refused(self):
    with self.assertRaisesRegex(ConfigError, "needs a preset, FILE.py:PRESET; known: tiny"):
      runner.commands(FILE, str(self.dir), 1)
    with self.assertRaisesRegex(ConfigError, "needs a preset, FILE.py:PRESET; known: tiny"):
      runner.commands(f"{FILE}:fig3", str(self.dir), 1)
    (self.dir / "bare.py").write_text("def get_config(): return {}\n")
    with self.assertRaisesRegex(ConfigError, "says nothing of a sweep"):
      runner.commands(f"{self.dir / 'bare.py'}:tiny", str(self.dir), 1)
    with self.assertRaisesRegex(ConfigError, "there is no file"):
      runner.commands("nofile.py:tiny", str(self.dir), 1)

  def test_status_says_how_far_a_run_came(self):
    self.assertEqual(runner.status(self.dir / "absent"), "new")
    stopped = self.record("stopped", ("eval", 0), ("train", 5), ("train", 10))
    self.assertEqual(runner.status(stopped), "stopped at step 10")
    self.assertEqual(runner.status(self.record("started")), "stopped at step 0")
    done = self.record("done", ("eval", 0), ("train", 20), ("done", 20))
    self.assertEqual(runner.status(done), "done at step 20")
    for steps, state in ((20, "done at step 20"), (30, "stopped at step 20")):
      self.assertEqual(runner.status(done, ["python", f"--config.train.steps={steps}"]), state)

  @parameterized.parameters(1, 2, 5)
  def test_all_are_run_and_each_gives_its_code(self, jobs):
    todo = {f"run{i}": ends(i) for i in range(4)}
    codes, _, _ = self.quietly(runner.run_all, todo, jobs)
    self.assertEqual(codes, {"run0": 0, "run1": 1, "run2": 2, "run3": 3})

  def test_what_runs_wrote_to_is_closed_when_they_have_ended(self):
    children, start = [], subprocess.Popen

    def remembered(*args, **how):
      children.append(start(*args, **how))
      return children[-1]

    with mock.patch.object(runner.subprocess, "Popen", remembered):
      self.assertEqual(runner.run_all({"a": ends(0), "b": ends(1)}, 2), {"a": 0, "b": 1})
    self.assertLen(children, 2)
    self.assertTrue(all(child.stdout.closed for child in children))

  def test_lines_carry_the_name_of_their_run_and_errors_are_among_them(self):
    code = (
      "import sys; print('to out'); print('to err', file=sys.stderr); sys.stdout.buffer.write(b'\\xff\\n')"
    )
    _, out, _ = self.quietly(runner.run_all, {"n4": python(code)}, 1)
    self.assertEqual(sorted(line.split(maxsplit=1) for line in out.splitlines()),
                     [["n4", "to err"], ["n4", "to out"], ["n4", "\N{REPLACEMENT CHARACTER}"]])  # fmt: skip

  def test_two_jobs_run_at_the_same_time(self):
    a, b = self.dir / "a", self.dir / "b"
    codes, _, _ = self.quietly(runner.run_all, {"a": python(MEETS, a, b), "b": python(MEETS, b, a)}, 2)
    self.assertEqual(codes, {"a": 0, "b": 0})

  def test_the_last_runs_share_the_cores_and_none_waits(self):
    """Three runs on two cores end only if all three are there at once."""
    paths = [self.dir / name for name in "abc"]
    meet = (
      "import pathlib, sys, time\npathlib.Path(sys.argv[1]).touch()\nfor _ in range(300):\n"
      "  if all(pathlib.Path(p).exists() for p in sys.argv[2:]): sys.exit(0)\n  time.sleep(0.1)\nsys.exit(1)"
    )
    todo = {path.name: python(meet, path, *paths) for path in paths}
    codes, _, _ = self.quietly(lambda: runner.run_all(todo, 2, share=True))
    self.assertEqual(codes, {"a": 0, "b": 0, "c": 0})

  @parameterized.parameters((1, 7), (2, 7), (3, 4))
  def test_with_shared_cores_all_are_run_and_each_gives_its_code(self, jobs, count):
    todo = {f"run{i}": ends(i) for i in range(count)}
    codes, _, _ = self.quietly(lambda: runner.run_all(todo, jobs, share=True))
    self.assertEqual(codes, {f"run{i}": i for i in range(count)})

  @parameterized.parameters(
    ([0, 0], 0), ([2, 2], 2), ([0, 2], 2), ([3, 0], 3), ([2, 3], 1), ([1, 2], 1), ([0, 1], 1), ([-9], 1)
  )
  def test_exit_codes_pass_on(self, codes, want):
    stand_ins = {c: ends(c) if c >= 0 else python("import os; os.kill(os.getpid(), 9)") for c in codes}
    todo = {f"run{i}": stand_ins[c] for i, c in enumerate(codes)}
    got, _, err = self.quietly(runner.execute, todo, dict.fromkeys(todo, "new"), 2)
    self.assertEqual(got, want)
    told = sorted(err.splitlines())
    self.assertEqual(told, [f"run{i}: exit code {c}" for i, c in enumerate(codes) if c])

  def test_the_finished_are_skipped_and_the_broken_run_again(self):
    todo = {name: python("import sys, pathlib; pathlib.Path(sys.argv[1]).touch()", self.dir / name)
            for name in ("done", "broken", "new")}  # fmt: skip
    states = {"done": "done at step 20", "broken": "stopped at step 5", "new": "new"}
    code, out, _ = self.quietly(runner.execute, todo, states, 1)
    self.assertEqual(code, 0)
    self.assertIn("3 runs, 1 done already", out)
    self.assertEqual({p.name for p in self.dir.iterdir()}, {"broken", "new"})

  def test_nothing_left_is_success(self):
    code, out, _ = self.quietly(runner.execute, {"a": ends(1)}, {"a": "done at step 20"}, 2)
    self.assertEqual((code, out), (0, "1 runs, 1 done already\n"))

  def test_sigterm_reaches_the_running_and_starts_no_more(self):
    ready = [self.dir / "first", self.dir / "second"]
    todo = {"a": python(WAITS, ready[0]), "b": python(WAITS, ready[1]), "c": python(WAITS, self.dir / "c")}
    before = signal.getsignal(signal.SIGTERM)

    def stop():
      deadline = time.monotonic() + 60
      while not all(p.exists() for p in ready) and time.monotonic() < deadline:
        time.sleep(0.05)
      os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    code, _, err = self.quietly(runner.execute, todo, dict.fromkeys(todo, "new"), 2)
    stopper.join()
    self.assertEqual(code, 3)
    self.assertEqual(sorted(err.splitlines()), ["a: exit code 3", "b: exit code 3", "c: not started"])
    self.assertFalse((self.dir / "c").exists())
    self.assertIs(signal.getsignal(signal.SIGTERM), before)


class CommandLineTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.dir = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    cls.experiment = cls.enterClassContext(Experiment("experiments.sweep", cls.dir))

  def test_list_says_what_there_is_to_do_and_writes_nothing(self):
    folder = self.dir / "all"
    (folder / "t32_n2_s0").mkdir(parents=True)
    (folder / "t32_n2_s0" / "metrics.jsonl").write_text('{"kind": "done", "step": 98000}\n')
    ended = self.experiment.run(f"--config={FILE}:fig2b", f"--workdir={folder}", "--list", cwd=self.dir)
    self.assertEqual((ended.code, ended.err), (0, ""))
    lines = {line.split()[0]: line for line in ended.out.splitlines()}
    self.assertEqual(set(lines), {"t32_n1_s0", "t32_n2_s0", "t32_n3_s0", "t32_n4_s0"})
    self.assertIn(" new ", lines["t32_n1_s0"])
    self.assertIn(" done at step 98000 ", lines["t32_n2_s0"])
    self.assertIn("-m sleep_jax.experiments.rule110 ", lines["t32_n3_s0"])
    self.assertIn("--config.sleep.num_passes=3", lines["t32_n3_s0"])
    self.assertEqual([p.name for p in folder.iterdir()], ["t32_n2_s0"])

  def test_a_run_that_a_killed_sweep_leaves_behind_takes_no_folder(self):
    """It was started and has not begun: the next start of the sweep wants that folder."""
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "sleep_jax.experiments.rule110", f"--config={FILE}:tiny"]
    orphan = subprocess.Popen(
      [*command, f"--workdir={self.dir}/left"], stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, text=True
    )
    os.close(writer)
    os.close(reader)  # as with the death of the sweep
    _, said = orphan.communicate(timeout=300)
    self.assertEqual((orphan.returncode, said), (1, ""))
    self.assertFalse((self.dir / "left").exists())

  def test_what_is_changed_is_changed_in_every_run(self):
    ended = self.experiment.run(
      f"--config={GSM}:ouro_sliding", "--workdir=stage2", "--list", "--config.train.steps=7",
      "--config.pretrained.folder=stage1/{run}", "--config.data.operations=(2, 4)", cwd=self.dir,
    )  # fmt: skip
    self.assertEqual((ended.code, ended.err), (0, ""))
    lines = {line.split()[0]: shlex.split(line)[2:] for line in ended.out.splitlines()}
    self.assertEqual(set(lines), {"n1_s0", "n2_s0", "n4_s0"})
    for name, words in lines.items():
      self.assertContainsSubset(
        {
          "sleep_jax.experiments.gsm_infinite", "--config.train.steps=7",
          f"--config.pretrained.folder=stage1/{name}", "--config.data.operations=(2, 4)",
          f"--config.sleep.num_passes={name[1]}",
        },
        set(words),
      )  # fmt: skip

  @parameterized.parameters(
    (("--workdir=x",), "--config is required"),
    ((f"--config={FILE}:tiny",), "--workdir is required"),
    ((f"--config={FILE}:fig3", "--workdir=x"), "unknown preset 'fig3'; known: tiny"),
    ((f"--config={FILE}", "--workdir=x"), "needs a preset, FILE.py:PRESET; known: tiny"),
    (("--config=nofile.py:tiny", "--workdir=x"), "there is no file 'nofile.py'"),
    (("--config", "nofile.py:tiny", "--workdir=x"), "there is no file 'nofile.py'"),
    ((f"--config={FILE}:tiny", "--workdir=x", "--jobs=0"), "jobs"),
    ((f"--config={FILE}:tiny", "--workdir=x", "--seeds=none"), "seeds"),
    ((f"--config={FILE}:tiny", "--workdir=x", "now"), "unexpected argument 'now'"),
    ((f"--config={FILE}:tiny", "--workdir=x", "--config.seed=1"), "--config.seed: is what the runs of this"),
    ((f"--config={FILE}:tiny", "--workdir=x", "--config.optim.muon_rl=1"), 'did you mean "muon_lr"?'),
  )
  def test_a_mistake_is_one_line(self, arguments, message):
    ended = self.experiment.run(*arguments, cwd=self.dir)
    self.assertEqual((ended.code, ended.out), (2, ""), ended.err)
    [line] = ended.err.splitlines()
    self.assertIn(message, line)
    self.assertFalse((self.dir / "x").exists())
