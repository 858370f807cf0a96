"""Runs one experiment in several processes of this machine, each with CPU devices of its own.

    python -m launch.local_multiprocess --processes=2 --devices=4 -- -m experiments.rule110 \\
      --config=experiments/configs/rule110.py:tiny --workdir=work/two

It is the pod's way of running, on a laptop: what works here finds its peers on Slurm, Cloud TPU or Kubernetes
by --distributed alone. Processes meet on the loopback interface. When one of them ends badly the others are
ended too. The exit code is that of the first one that was not 0. SIGTERM, SIGHUP and Ctrl-C are passed on, so
that the run saves and stops; a second one ends it at once.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from absl import app, flags

PROCESSES = flags.DEFINE_integer("processes", 2, "how many", lower_bound=1)
DEVICES = flags.DEFINE_integer("devices", 1, "simulated CPU devices of each", lower_bound=1)

GRACE_S = 30.0  # that processes have to end by themselves after one of them has failed
USER_MISTAKE = 2


def run(arguments: Sequence[str], processes: int, devices: int) -> int:
  """Starts Python with `arguments` and the flags of each process, and waits for all.

  Args:
    arguments: of the interpreter, e.g. ("-m", "experiments.rule110", ...), of a main that has the flags of
      `experiments.cli.define_process_flags`.
    processes: how many.
    devices: CPU devices of each.

  Returns:
    0, or the exit code of the first process that ended with another; 1 for one that was ended by a signal.
  """
  port = _free_port()
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": ""}
  children = [
    subprocess.Popen(
      [
        sys.executable,
        *arguments,
        "--distributed",
        f"--coordinator_address=127.0.0.1:{port}",
        f"--num_processes={processes}",
        f"--process_id={i}",
      ],
      env=environment,
      stdin=subprocess.DEVNULL,
      start_new_session=True,  # a Ctrl-C reaches them through us, once
    )
    for i in range(processes)
  ]

  asked = []

  def forward(number, frame):
    del frame
    for child in children if asked else children[:1]:  # the coordination service tells the others
      with contextlib.suppress(ProcessLookupError):
        child.send_signal(signal.SIGKILL if asked else signal.SIGTERM)
    asked.append(number)

  numbers = [signal.SIGTERM, signal.SIGINT]
  if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as it is under nohup
    numbers.append(signal.SIGHUP)
  before = {number: signal.signal(number, forward) for number in numbers}
  try:
    return _wait(children)
  finally:
    for child in children:
      child.kill()
      child.wait()
    for number, old in before.items():
      signal.signal(number, old)


def _wait(children: Sequence[subprocess.Popen]) -> int:
  """Waits until all have ended, or `GRACE_S` after one has failed."""
  code, failed_at = 0, None
  while True:
    codes = [child.poll() for child in children]
    if failed_at is None:
      bad = next((c for c in codes if c), None)
      if bad is not None:
        code, failed_at = bad if bad > 0 else 1, time.monotonic()
    if None not in codes or (failed_at is not None and time.monotonic() - failed_at > GRACE_S):
      return code
    time.sleep(0.05)


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def main(argv: Sequence[str]) -> int:
  if len(argv) < 2:
    example = "-- -m experiments.rule110 --config=... --workdir=..."
    print(f"error: nothing to run; put it behind two dashes: {example}", file=sys.stderr)
    return USER_MISTAKE
  return run(argv[1:], PROCESSES.value, DEVICES.value)


if __name__ == "__main__":
  app.run(main)
