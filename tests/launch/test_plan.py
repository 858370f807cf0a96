"""Plans: what they count, what they refuse, and the program that they compile for a TPU."""

import importlib.util
import json
import math
import pathlib
import re

import jax
import pytest

from sleep_jax import model, params
from sleep_jax.config import ConfigError, SleepConfig
from sleep_jax.cost import footprint
from sleep_jax.experiments import config_file
from sleep_jax.launch import aot, estimate, planning, problem
from sleep_jax.launch.hardware import find
from sleep_jax.pretrained import jet_nemotron
from tests import hybrids
from tests.forked import Experiment

RULE110, GSM = (f"experiments/configs/{name}.py" for name in ("rule110", "gsm_infinite"))
TINY = f"{RULE110}:tiny"


def values(path=TINY, **changes):
  found = config_file.read(path)
  config_file.change(found, {name.replace("__", "."): value for name, value in changes.items()})
  return found.to_dict()


def asked(path=TINY, **changes):
  return problem.read(path, values(path, **changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The command, for a model of one block, which is traced sooner than two."""
  with Experiment("sleep_jax.launch.plan", tmp_path_factory.mktemp("plan")) as experiment:
    yield lambda *arguments, **where: experiment.run(*arguments, "--config.model.blocks=('gdn',)", **where)


def test_the_state_is_counted_as_the_compiler_counts_it():
  """Against the arguments of the real step, compiled here for one device."""
  tiny = asked()
  lowered, state = aot.lower(tiny)
  sizes = estimate.bytes_by_kind(tiny, find("v5e:1x1"))
  others = footprint.size((state.step, jax.random.key_data(jax.random.key(0))))
  compiled = lowered.compile(compiler_options=hybrids.QUICK)
  assert sizes["weights"] + sizes["optimizer"] + others == compiled.memory_analysis().argument_size_in_bytes


def test_the_state_is_spread_over_the_mesh():
  """Each device holds its share of every array that its mesh axis divides, worked out by hand from the
  rules.
  """
  tiny, row = asked(), find("v5e:2x4")
  declared = jax.tree.leaves(model.declare(tiny.cfg.model), is_leaf=params.is_weight)
  by_hand = 0
  for weight in declared:
    split = any(
      axis == "w_embed" and size % 8 == 0 for axis, size in zip(weight.axes, weight.shape, strict=True)
    )
    by_hand += 4 * math.prod(weight.shape) // (8 if split else 1)
  assert estimate.bytes_by_kind(tiny, row)["weights"] == by_hand


@pytest.mark.slow
def test_what_a_gradient_keeps_is_affine_in_the_batch():
  fig, row = asked(f"{RULE110}:fig2b", train__batch_size="24"), find("v5p:2x2x1")
  assert estimate.bytes_by_kind(fig, row, affine=True) == estimate.bytes_by_kind(fig, row)


def test_the_roofline():
  """A step's FLOPs over the chips' peak; recomputation adds one forward pass of what is asleep a level."""
  row, sizes = find("h200:8"), {}
  for remat in estimate.RECOMPUTED:
    sizes[remat] = estimate.work(asked(f"{RULE110}:fig2b", sleep__remat=remat, sleep__num_passes="4"), row)
  assert len({work.useful for work in sizes.values()}) == 1
  assert sizes["none"].executed == sizes["none"].useful
  added = [sizes[remat].executed / sizes["none"].executed for remat in ("block", "pass", "window")]
  assert added[0] == pytest.approx(4 / 3) and 4 / 3 < added[1] < 5 / 3 and 5 / 3 < added[2] < 6 / 3
  assert sizes["none"].seconds["arithmetic"] == pytest.approx(sizes["none"].useful / (8 * 989e12))
  moved = {"all-reduce": [3, 9e9]}
  linked = estimate.work(asked(), row, moved)
  assert linked.limit == "links" and linked.least == pytest.approx(9e9 / 900e9)


def test_pads_of_a_shorter_last_window_are_executed_and_not_useful():
  """100 tokens in windows of 24: the last one has 4, which are filled up with pads where all is one loop."""
  row, fig = find("v5e:1x1"), f"{RULE110}:fig2b"
  scan, flat = (estimate.work(asked(fig, sleep__loops=loops), row) for loops in ("scan", "flat"))
  assert scan.executed == scan.useful == flat.useful
  whole = asked(fig, sleep__loops="flat").read
  assert [s.length for s in whole] == [24, 24] and sum(s.count for s in whole) == 5
  assert flat.executed == pytest.approx(scan.executed * 120 / 100, rel=0.05)


def test_a_preset_for_a_checkpoint_is_planned_without_one():
  jet = asked(f"{GSM}:jet_2b")
  assert jet.cfg.model.blocks == jet_nemotron.config_2b().blocks
  assert params.count(model.declare(jet.cfg.model)) == params.count(model.declare(jet_nemotron.config_2b()))
  assert jet.task is None and jet.tokens == 4000 and jet.layout.sum() == jet.cfg.data.cut.answer_tokens
  memory = asked(f"{GSM}:ouro_memory")
  assert memory.cfg.optim.trained != ("*",) and len(memory.cfg.model.blocks) == 30
  assert asked(f"{GSM}:ouro_sliding").cfg.model.blocks == memory.cfg.model.blocks


def test_the_longest_sequences_of_a_host_are_planned():
  tiny = asked(f"{GSM}:tiny")
  cut, window = tiny.cfg.data.cut, tiny.cfg.model.window
  assert tiny.tokens == max(
    range(window, 5 * window, window), key=lambda t: t * (t <= cut.max_tokens + window)
  )


@pytest.mark.parametrize(
  ("hardware", "changes", "said"),
  [
    ("v5e:2x4", {"mesh__model": "3"}, "mesh.model: must divide the 8 devices of v5e:2x4, got 3"),
    (
      "v5e:2x4",
      {"mesh__data": "4"},
      "mesh: must take the 8 devices of v5e:2x4, got 4 x 1; take mesh.data = 8",
    ),
    ("v5e:4x4", {"mesh__model": "8"}, "mesh.data: must be a multiple of the 4 hosts of v5e:4x4, got 2"),
    ("h200:4x8", {}, "train.batch_size: must be a multiple of mesh.data = 32, got 16; try 32"),
    (
      "h200:8",
      {"train__microbatches": "4"},
      "must leave a part a multiple of mesh.data = 8 sequences, got parts of 4",
    ),
  ],
)
def test_a_mesh_that_does_not_divide_is_refused(hardware, changes, said):
  cfg = asked(**changes).cfg
  with pytest.raises(ConfigError) as caught:
    problem.check_division(cfg.mesh, cfg.train, find(hardware))
  assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_says_what_fits(run):
  ended = run(f"--config={TINY}", "--hardware=h200:8", "--price=3")
  assert (ended.code, ended.err) == (0, "")
  for said in ("8 chip(s) on 1 host(s), 8 x 1 devices", "fits: ", "counted from shapes", "tokens/s", "price"):
    assert said in ended.out
  ended = run(f"--config={TINY}", "--hardware=h200:1", "--config.train.batch_size=8388608")
  assert ended.code == 1 and "does not fit, by " in ended.out and ended.err == ""


def test_a_table_and_its_json(run, tmp_path):
  arguments = (f"--config={TINY}", "--hardware=h200:8,b200:1,h100:4x8", "--table", "--passes=1,4")
  ended = run(*arguments, f"--out={tmp_path}/new/table")
  assert ended.code == 0
  text, rows = (pathlib.Path(f"{tmp_path}/new/table{suffix}").read_text() for suffix in (".md", ".json"))
  rows = json.loads(rows)
  assert ended.out == text and len(text.splitlines()) == 2 + 6
  assert [(row["hardware"], row["passes"]) for row in rows][:3] == [
    ("h200:8", 1),
    ("h200:8", 4),
    ("b200:1", 1),
  ]
  assert rows[0]["work"]["useful"] < rows[1]["work"]["useful"] and rows[0]["needed"] == sum(
    rows[0]["bytes"].values()
  )
  assert "must be a multiple of mesh.data = 32" in rows[4]["error"] and rows[4]["error"] in text


@pytest.mark.slow
def test_a_search_names_the_change_that_fits(run):
  ended = run(f"--config={TINY}", "--hardware=h200:1", "--config.train.batch_size=8388608", "--search")
  assert ended.code == 0
  assert (
    ended.out.startswith("fits with --config.train.microbatches=") and "as it is: does not fit" in ended.err
  )
  change = ended.out.splitlines()[0].removeprefix("fits with ").split()
  again = run(f"--config={TINY}", "--hardware=h200:1", "--config.train.batch_size=8388608", *change)
  assert again.code == 0 and again.out.splitlines()[1:] == ended.out.splitlines()[2:]


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (("--hardware=h300:8",), "the nearest chip is h"),
    (("--hardware=v5p:4x4",), "v5p has no topology '4x4'; the nearest is v5p:2x2x4"),
    ((), "--hardware is required"),
    (("--hardware=h200:8,h100:8",), "--hardware: takes one name without --table"),
    (("--hardware=h200:8", "--table", "--search"), "--search: says nothing beside --table"),
    (("--hardware=h200:8", "--passes=2"), "--passes: says nothing without --table"),
    (("--hardware=h200:8", "--table", "--passes=0"), "--passes: must be numbers from 1 on"),
    (("--hardware=h200:8", "--efficiency=2"), "efficiency"),
    (("--hardware=h200:8", "--config.mesh.model=3"), "mesh.model: must divide the 8 devices of h200:8"),
    (
      ("--hardware=h200:8", "--config.model.mlp_dim=2147483647", "--config.model.embed_dim=1073741824"),
      "the largest hardware of the table",
    ),
    (
      ("--hardware=h100:1", "--config.model.embed_dim=33554432", "--config.train.batch_size=1", "--search"),
      "no microbatches, remat or mesh that was tried makes this config fit h100:1, 80.00 GB a device",
    ),
  ],
)
def test_mistakes_are_one_line(run, arguments, said):
  ended = run(f"--config={TINY}", *arguments)
  lines = [line for line in ended.err.splitlines() if not line.startswith("as it is")]
  assert (ended.code, ended.out, len(lines)) == (2, "", 1), ended
  assert said in lines[0]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="what is said where libtpu is not")
def test_without_a_compiler_it_says_how_to_install_one(run):
  ended = run(f"--config={TINY}", "--hardware=v5e:2x2")
  assert ended.code == 0 and ended.err == f"{aot.NO_COMPILER}\n" and "counted from shapes" in ended.out


@pytest.mark.parametrize(
  ("loops", "kinds"),
  [
    ("scan", ["none", "block", "pass", "window", "offload"]),
    ("flat", ["none", "block", "pass", "offload"]),
    ("unroll", ["none", "block", "pass", "window"]),
  ],
)
def test_a_search_tries_what_the_loops_allow_and_moves_to_the_host_last(loops, kinds):
  small = {"model__blocks": "('hebbian',)", "sleep__num_passes": "1", "train__batch_size": "1"}
  planner = planning.Planner(TINY, values(sleep__loops=loops, **small), minutes=None)
  tried = [changes.get("sleep.remat", "none") for _, changes in planner._candidates(find("v5e:1x1"))]
  assert sorted(tried) == sorted(kinds)
  assert "offload" not in tried or tried[-1] == "offload"


def test_what_goes_to_the_host_is_counted_and_told(run):
  arguments = (f"--config={TINY}", "--hardware=v5e:1x1", "--shapes", "--config.sleep.num_passes=2")
  ended = run(*arguments, "--config.sleep.remat=offload", cwd=pathlib.Path(__file__).parents[2])
  [line] = [line for line in ended.out.splitlines() if line.startswith("in the host's memory")]
  small = asked(model__blocks="('gdn',)")  # as `run` asks for
  cfg = small.cfg
  size = footprint.on_host(
    cfg.model, SleepConfig(num_passes=2, remat="offload"), len(small.layout), batch=cfg.train.batch_size
  )
  assert line == f"in the host's memory, a device: {planning.gigabytes(size)}" and size > 0
  assert "host's memory" not in run(*arguments, cwd=pathlib.Path(__file__).parents[2]).out


def test_a_compiler_that_takes_too_long_is_stopped(monkeypatch, capsys):
  monkeypatch.setattr(aot, "available", lambda platform="tpu": True)
  plan = planning.Planner(TINY, values(), minutes=0.001).plan(find("v5e:2x2"))
  assert plan.source == "counted from shapes" and plan.fits
  said = (
    "v5e:2x2: the compiler was stopped after 0.001 minutes (--compile_minutes); counted from shapes instead\n"
  )
  assert capsys.readouterr().err == said


@pytest.mark.aot
@pytest.mark.parametrize("level", [None, "O1"])
def test_how_much_the_compiler_optimized_is_told(level, monkeypatch):
  pytest.importorskip("libtpu")
  monkeypatch.delenv("JAX_OPTIMIZATION_LEVEL", raising=False)
  if level is not None:
    monkeypatch.setenv("JAX_OPTIMIZATION_LEVEL", level)
  plan = planning.Planner(TINY, values(), minutes=5).plan(find("v5e:1x1"))
  said = " at JAX_OPTIMIZATION_LEVEL=O1" if level else ""
  assert re.fullmatch(rf"compiled in \d+ s with [\d.]+ GB of memory here{said}", plan.source)
  assert plan.compiling["seconds"] > 0 and plan.compiling["cpu_seconds"] > 0
  assert 0.1e9 < plan.compiling["host_bytes"] < 8e9


@pytest.mark.aot
def test_a_step_is_compiled_for_gpus():
  """By the compiler that would be used there, but for what it tries out on the device."""
  if not aot.available("gpu"):
    pytest.skip("needs the CUDA plugin and ptxas")
  row, small = find("h200:8"), {"model__blocks": "('gdn',)"}
  plan = planning.Planner(TINY, values(**small), minutes=10).plan(row)
  assert plan.fits and plan.source.startswith("compiled in")
  counted = estimate.bytes_by_kind(asked(**small), row)
  assert {name: plan.bytes[name] for name in ("weights", "optimizer")} == {
    name: counted[name] for name in ("weights", "optimizer")
  }
  assert plan.bytes["temporary"] > 0 and sum(times for times, _ in plan.collectives.values()) > 0
  assert plan.room == int(planning.ROOM * row.device_memory)


def test_gpus_are_counted_from_shapes_where_their_compiler_is_not(monkeypatch):
  monkeypatch.setattr(aot, "available", lambda platform="tpu": platform == "tpu")
  plan = planning.Planner(TINY, values(), minutes=5).plan(find("h100:8"))
  assert plan.source == "counted from shapes" and plan.compiling is None


@pytest.mark.aot
def test_a_step_is_compiled_for_a_slice():
  pytest.importorskip("libtpu")
  row = find("v5e:2x2")
  plan = planning.Planner(TINY, values(), minutes=5).plan(row)
  assert plan.fits and plan.source.startswith("compiled in")
  counted = estimate.bytes_by_kind(asked(), row)
  assert {name: plan.bytes[name] for name in ("weights", "optimizer")} == {
    name: counted[name] for name in ("weights", "optimizer")
  }
  assert plan.bytes["temporary"] > 0 and plan.collectives["all-gather"][0] > 0
  assert "links" in plan.work.seconds


@pytest.mark.aot
def test_a_step_too_large_for_a_chip_says_by_how_much():
  pytest.importorskip("libtpu")
  plan = planning.Planner(TINY, values(train__batch_size="1048576"), minutes=5).plan(find("v5e:1x1"))
  assert not plan.fits and plan.source.startswith("compiled in")
  assert plan.needed > plan.room > 15e9 and plan.verdict.startswith("does not fit, by ")
