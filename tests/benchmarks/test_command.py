"""The commands that run series of measurements refuse a mistake on one line, with exit code 2."""

import pytest

from sleep_jax.benchmarks import gpu_once, gpu_parts, report, throughput

MISTAKES = [
  (throughput, "--size=huge", "--size: unknown value 'huge'"),
  (throughput, "--windows=1000,x", "--windows: must be whole numbers"),
  (throughput, "--windows=0", "--windows: must be whole numbers"),
  (throughput, "--windows=", "--windows: must be whole numbers"),
  (throughput, "--passes=-1", "--passes: must be whole numbers"),
  (throughput, "--passes=99999999999999", "--passes: must be whole numbers"),
  (throughput, "--batch=1,2", "--batch: must be a whole number from 1 on"),
  (throughput, "--remat=all", "--remat: unknown value 'all'"),
  (throughput, "--rounds=0", "--rounds: must be a whole number from 1 on"),
  (throughput, "--no_such_flag\nx", "unrecognized arguments"),
  (gpu_once, "--parts=kernel_errors,fig9", "--parts: unknown value 'fig9'"),
  (gpu_once, "--parts=figure_2", "did you mean"),
  (gpu_once, "--parts=", "--parts: unknown value ''"),
  (gpu_once, "--size=small", "--size: unknown value 'small'"),
  (gpu_once, "--minutes=0", "--minutes: must be a number above 0, got '0'"),
  (gpu_once, "--minutes=-3", "--minutes: must be a number above 0"),
  (gpu_once, "--minutes=nan", "--minutes: must be a number above 0"),
  (gpu_once, "--minutes=inf", "--minutes: must be a number above 0"),
  (gpu_once, "--minutes=ten", "--minutes: must be a number above 0"),
  (gpu_once, "--dry_run", "--dry_run: runs on a CPU and needs --size=tiny"),
  (gpu_parts, "--part=none", "--part: unknown value 'none'"),
  (report, "--size=demo", "--size: unknown value 'demo'"),
  (report, "--sections=training,speed", "--sections: unknown value 'speed'"),
  (report, "--threads=0", "--threads: must be a whole number from 1 on"),
  (report, "--threads=100000", "--threads: must lie in 1.."),
]


def code_of(module, flags):
  try:
    return module.main(flags)
  except SystemExit as stopped:
    return stopped.code


@pytest.mark.parametrize(("module", "flag", "said"), MISTAKES, ids=lambda x: str(x)[:30])
def test_a_mistake_is_one_line(module, flag, said, tmp_path, capsys):
  flags = [flag] if module is gpu_parts else [flag, f"--out={tmp_path}"]
  assert code_of(module, flags) == 2
  printed = capsys.readouterr()
  assert said in printed.err and printed.err.startswith("error: ") and printed.err.count("\n") == 1
  assert not printed.out


@pytest.mark.parametrize("module", [throughput, gpu_once, report])
@pytest.mark.parametrize("where", ["file", "below a file", "link", "empty", "no folder"])
def test_a_folder_that_cannot_be_written_to_is_named(module, where, tmp_path, capsys):
  (tmp_path / "file").touch()
  (tmp_path / "link").symlink_to(tmp_path / "nothing")
  places = {"file": "file", "below a file": "file/results", "link": "link"}
  out = {"empty": "", "no folder": "/proc/results"}.get(where) if where not in places else None
  out = str(tmp_path / places[where]) if out is None else out
  assert code_of(module, ["--size=tiny", f"--out={out}"]) == 2
  printed = capsys.readouterr()
  assert printed.err.startswith("error: --out: ") and printed.err.count("\n") == 1
