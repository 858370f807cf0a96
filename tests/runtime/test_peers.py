"""Several processes meet, or say in one line why not; when one dies, the others say which and end."""

import contextlib
import errno
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

from sleep_jax.runtime import files, joining, peers
from tests import forked


def free_port():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


# What flags and variables hold.

BAD_ADDRESSES = [
  *("", ":", "nonsense", "host", "127.0.0.1", "127.0.0.1:", ":1234", "127.0.0.1:abc", "127.0.0.1:-1"),
  *("127.0.0.1:1.5", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:99999", "127.0.0.1:123456789"),
  *("127.0.0.1:1234:5678", "::1:1234", "http://127.0.0.1:1234", "127.0.0.1:1234/", "a b:1234", "[::1:1234"),
  *("[zz]:1234", "user@host:1", "\n:1", "x\n:1", "nosuchhost.invalid:1234", "256.256.256.256:1", "%s:1"),
  *("*:1", "-x:1", "x-:1", ".:1"),
  *("é" * 300 + ":1", "." * 70 + ":1", "127.0.0.1:１２"),
]


@pytest.mark.parametrize("address", BAD_ADDRESSES, ids=ascii)
def test_an_address_that_is_none_is_one_line(address):
  with pytest.raises(peers.PeerError, match="--coordinator_address: ") as e:
    peers.parse_address(address)
  assert str(e.value).isprintable()
  assert len(str(e.value)) < 250


@pytest.mark.parametrize(
  ("text", "want"),
  [("127.0.0.1:1", ("127.0.0.1", 1)), ("localhost:65535", ("localhost", 65535)), ("[::1]:80", ("::1", 80))],
)
def test_an_address(text, want):
  assert peers.parse_address(text) == want


def test_any_text_is_an_address_or_one_line():
  rng = random.Random(0)
  for _ in range(300):
    text = "".join(rng.choice("127.0:[]localhst-/@ \n\0é0123456789") for _ in range(rng.randrange(20)))
    with contextlib.suppress(peers.PeerError):
      host, port = peers.parse_address(text)
      assert host
      assert 0 < port < 65536


VARIABLES = sorted({*joining._NUMBERS, *(name for names in joining._TOGETHER for name in names)})
SLURM = dict(zip(joining._TOGETHER[0], ("1", "a", "2", "0", "0"), strict=True))


@pytest.fixture
def no_cluster(monkeypatch):
  """No variable of a cluster, and JAX as it is where it finds none."""
  for name in (*VARIABLES, "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS", "JAX_LOCAL_DEVICE_IDS"):
    monkeypatch.delenv(name, raising=False)

  def initialize(**asked):
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  return monkeypatch


@pytest.mark.parametrize(("found", "host"), [("n1:61441", "n1"), ("[fd00::1]:8482", "fd00::1")])
def test_without_a_way_out_of_its_network_a_machine_has_the_name_that_others_know(monkeypatch, found, host):
  def connect(self, address):
    raise OSError(errno.ENETUNREACH, "Network is unreachable")

  closed = type("Closed", (socket.socket,), {"connect": connect})
  monkeypatch.setattr(joining.socket, "socket", closed)
  monkeypatch.setattr(joining.distributed.global_state, "coordinator_address", found)
  assert joining._routed_address() == host


def assert_refused(match):
  with pytest.raises(peers.PeerError, match=match) as e:
    joining.join(None, None, None, print)
  assert str(e.value).isprintable()


def test_without_a_cluster_it_says_what_to_give(no_cluster):
  assert_refused("^--distributed: no cluster was found here; give coordinator_address, num_processes, proc")


@pytest.mark.parametrize("missing", SLURM)
def test_a_half_set_cluster_says_what_is_missing(no_cluster, missing):
  for name, value in SLURM.items():
    if name != missing:
      no_cluster.setenv(name, value)
  assert_refused(f"is set here, but not {missing}: start every process as the cluster does")


@pytest.mark.parametrize("name", joining._NUMBERS)
@pytest.mark.parametrize("value", ["", "abc", "-1", "1.5", "9" * 400, "0x1", "é", "１", " 1"], ids=ascii)
def test_a_variable_that_is_no_number_is_named(no_cluster, name, value):
  no_cluster.setenv(name, value)
  assert_refused(f"^--distributed: the variable {name} must be a number, got ")


@pytest.mark.parametrize("name", ["JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS"])
@pytest.mark.parametrize("value", ["", "nonsense", "127.0.0.1:abc", "127.0.0.1:0", "nosuchhost.invalid:1"])
def test_an_address_in_a_variable_is_checked_too(no_cluster, name, value):
  no_cluster.setenv(name, value)
  assert_refused(f"^--distributed: the variable {name}: ")


def test_other_variables_of_jax_are_checked_too(no_cluster):
  no_cluster.setenv("JAX_COORDINATOR_PORT", "65536")
  assert_refused("JAX_COORDINATOR_PORT must lie in 1..65535, got 65536")
  no_cluster.delenv("JAX_COORDINATOR_PORT")
  no_cluster.setenv("JAX_LOCAL_DEVICE_IDS", "0,x")
  assert_refused("JAX_LOCAL_DEVICE_IDS must be numbers, got '0,x'")


@pytest.mark.parametrize(
  "error",
  [KeyError("OMPI_COMM_WORLD_SIZE"), IndexError("list"), RuntimeError("a\nb\x1b"), ImportError("k8s")],
)
def test_whatever_jax_raises_is_one_line(no_cluster, error):
  def initialize(**asked):
    raise error

  no_cluster.setattr(jax.distributed, "initialize", initialize)
  with pytest.raises(peers.PeerError, match=f"^--distributed: {type(error).__name__}: ") as e:
    joining.join(None, None, None, print)
  assert "\n" not in str(e.value)


# Meeting, in threads of this process.


@pytest.fixture(autouse=True)
def stderr_as_it_is(monkeypatch):
  monkeypatch.setattr(peers, "_hush_jax", lambda: None)  # of this process


def calling(port):
  """A connection to a door that may not be open yet."""
  while True:
    with contextlib.suppress(ConnectionRefusedError):
      return socket.create_connection(("127.0.0.1", port), timeout=20)
    time.sleep(0.02)


def meet(port, index, count, results, wait_s=10.0, secret=""):
  try:
    results[index] = peers.meet(
      "127.0.0.1", port, index, count, lambda line: None, wait_s=wait_s, secret=secret
    )
  except (peers.PeerError, files.RunFailedError) as e:
    results[index] = e


def together(*members, wait_s=10.0):
  """(index, count) of each -> what meeting gave each."""
  port, results = free_port(), {}
  threads = [threading.Thread(target=meet, args=(port, *m, results, wait_s)) for m in members]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
    assert not thread.is_alive()
  return results


def test_processes_that_disagree_about_their_number_say_so():
  results = together((0, 2), (1, 3))
  assert {str(e) for e in results.values()} == {"--num_processes: process 0 has 2, process 1 has 3"}


def test_those_that_do_not_come_are_named():
  results = together((0, 4), (2, 4), wait_s=1.5)
  assert str(results[0]) == "--distributed: of 4 processes these have not come: 1, 3"
  assert str(results[2]) == "--distributed: process 0 ended before all processes had come"


def test_a_first_process_that_is_not_there_is_named():
  assert "process 0 does not answer at 127.0.0.1:" in str(together((1, 2), wait_s=1.0)[1])


def test_a_port_that_is_taken_is_named():
  with socket.create_server(("127.0.0.1", 0)) as taken:
    with pytest.raises(peers.PeerError, match=f"cannot listen on port {taken.getsockname()[1]}: Address"):
      peers.meet("127.0.0.1", taken.getsockname()[1], 0, 2, print, wait_s=1.0)


STRANGERS = [
  *(b"", b"GET / HTTP/1.1\r\n", b"x" * 100_000, b"\n", b"sleep_jax 1\n", b"sleep_jax 1 2 \xff\n"),
  *(b"sleep_jax %d 2 \n" % index for index in (7, 0, 10**8)),
  b"sleep_jax 1 2 abc\n",  # a secret, where there is none
  b"sleep_jax 1 3 abc\n",
  b"sleep_jax " + b"9" * 5000 + b" 2 \n",
]


def test_strangers_are_sent_away_and_keep_nobody_waiting():
  port, results = free_port(), {}
  first = threading.Thread(target=meet, args=(port, 0, 2, results, 60.0))
  first.start()
  with contextlib.ExitStack() as open_ones:
    for _ in range(2):  # so many that the first ones are dropped for the last
      for hello in STRANGERS:
        stranger = open_ones.enter_context(calling(port))
        with contextlib.suppress(OSError):
          stranger.sendall(hello)
    for _ in range(2 * peers._CALLERS):  # who say nothing, and stay
      open_ones.enter_context(calling(port))
    meet(port, 1, 2, results)
  first.join(30)
  assert [type(met) for met in results.values()] == [peers.Peers, peers.Peers]
  for met in results.values():
    met.leave(0)


def test_a_stranger_who_says_nothing_is_not_heard_for_ever(monkeypatch):
  monkeypatch.setattr(peers, "_HELLO_S", 0.5)
  port, results = free_port(), {}
  first = threading.Thread(target=meet, args=(port, 0, 2, results, 60.0))
  first.start()
  with calling(port) as stranger:
    assert stranger.recv(1) == b""  # sent away, while the door stays open
    assert first.is_alive()
    meet(port, 1, 2, results)
  first.join(30)
  assert set(results) == {0, 1}
  for met in results.values():
    met.leave(0)


def test_who_does_not_know_the_secret_is_a_stranger():
  port, results = free_port(), {}
  first = threading.Thread(target=meet, args=(port, 0, 2, results, 3.0), kwargs={"secret": "ab"})
  first.start()
  for secret in ("", "ac", "abc"):
    meet(port, 1, 2, results, 0.5, secret=secret)
    assert "process 0 does not answer" in str(results[1])
  meet(port, 1, 2, results, secret="ab")
  first.join(30)
  assert [type(met) for met in results.values()] == [peers.Peers, peers.Peers]
  for met in results.values():
    met.leave(0)


def test_it_listens_where_the_address_says():
  assert peers.own_address("127.0.0.1", free_port()) == "127.0.0.1"
  assert peers.own_address("127.0.0.2", free_port()) == "127.0.0.2"
  assert peers.own_address("localhost", free_port()) in ("127.0.0.1", "::1")
  assert peers.own_address("192.0.2.1", free_port()) is None  # no address of this machine


def test_a_name_that_is_local_here_alone_is_listened_to_everywhere(monkeypatch):
  """As on Debian, where a machine's own name leads to 127.0.1.1 on itself."""
  here = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
  monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kw: here)
  assert peers.own_address("node1", free_port()) is None


# One of several that ends, in processes of their own that know no JAX.

CHILD = """
import os, sys, time
from sleep_jax.runtime import peers
port, index, count, does = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
met = peers.meet("127.0.0.1", port, index, count, print, wait_s=60.0)
print("met", flush=True)
if does == "wait":
  time.sleep(120)
elif does == "abort":
  print("E1128 1 coordination_service_agent.cc:289] Polled an error", file=sys.stderr)
  print("F1128 1 client.h:80] Terminating process because the JAX distributed service", file=sys.stderr)
  print("a page of C++", file=sys.stderr, flush=True)
  time.sleep(120)
else:
  met.leave(int(does))
  sys.exit(int(does))
"""


def start(*does):
  """Processes that have met; each then does something."""
  port = free_port()
  children = [
    subprocess.Popen(
      [sys.executable, "-c", CHILD, str(port), str(i), str(len(does)), what],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=forked.environment(),
    )
    for i, what in enumerate(does)
  ]
  for child in children:
    assert child.stdout.readline() == "met\n"
  return children


def ends(children):
  """Exit code and stderr of each."""
  found = []
  for child in children:
    _, err = child.communicate(timeout=300)
    found.append((child.returncode, err))
  return found


@pytest.mark.parametrize(("count", "victim"), [(2, 0), (2, 1), (3, 0), (4, 2)])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_one_that_dies_is_named_once_and_ends_the_others(count, victim, number):
  children = start(*["wait"] * count)
  began = time.monotonic()
  children[victim].send_signal(number)
  found = ends(children)
  assert time.monotonic() - began < 30
  assert found.pop(victim)[0] == -number
  assert [code for code, _ in found] == [1] * (count - 1)
  told = f"failed: process {victim} of {count} ended without a word: killed, or out of memory?;"
  assert "".join(err for _, err in found) == f"{told} the same command goes on from the last checkpoint\n"


def test_what_jax_prints_about_it_is_dropped():
  children = start("wait", "abort")
  time.sleep(0.5)
  children[0].kill()
  [_, (code, err)] = ends(children)
  assert (code, err.count("\n")) == (1, 1)
  assert err.startswith("failed: process 0 of 2 ended without a word")


def test_one_that_fails_is_named_with_its_exit_code():
  [(code, err), (own, _)] = ends(start("wait", "1"))
  assert (code, own) == (1, 1)
  assert err.startswith("failed: process 1 of 2 failed with exit code 1; ")


def test_one_that_is_done_is_no_news():
  children = start("wait", "0", "3")
  for child in children[1:]:
    child.wait(60)
  time.sleep(1.0)
  assert children[0].poll() is None
  children[0].kill()
  ends(children)


def test_those_that_fail_alike_keep_their_own_words():
  assert [code for code, _ in ends(start("2", "2", "2"))] == [2, 2, 2]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
  with forked.Experiment("experiments.rule110", tmp_path_factory.mktemp("scratch")) as experiment:
    yield experiment


class TestOfTheCommandLine:
  @pytest.mark.parametrize(
    ("flags", "told"),
    [
      (("--coordinator_address=nonsense",), "--coordinator_address: must be HOST:PORT, got 'nonsense'"),
      (("--coordinator_address=127.0.0.1:0",), "--coordinator_address: the port must lie in 1..65535, got 0"),
      (("--coordinator_address=nosuchhost.invalid:1",), "host 'nosuchhost.invalid' is not known here"),
      (("--coordinator_address=127.0.0.1:1", "--num_processes=0"), "--num_processes: must be at least 1"),
      (("--coordinator_address=127.0.0.1:1", "--process_id=-1"), "--process_id: must lie in 0..1, got -1"),
    ],
  )
  def test_mistakes(self, tmp_path, experiment, flags, told):
    given = {"--num_processes": "2", "--process_id": "0"}
    given |= dict(flag.split("=", 1) for flag in flags)
    words = [f"{name}={value}" for name, value in given.items()]
    config = f"--config={forked.ROOT}/experiments/configs/rule110.py:tiny"
    ended = experiment.run(config, "--workdir=new", "--distributed", *words, cwd=tmp_path)
    assert (ended.code, ended.out) == (2, "")
    assert told in ended.err
    assert len(ended.err.splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_what_jax_says_at_its_end_is_kept_where_nobody_said_which_process_went():
  words = (
    b"E1128 1 coordination_service_agent.cc:1] x\na\nF1128 1 client.h:80] Terminating process because the JAX"
  )
  words += b" distributed service\nb\n"
  for said, want in ((b"", words.splitlines()), (b"\0\n", [b"a"]), (b"failed: c\n", [b"a", b"failed: c"])):
    told = subprocess.run([sys.executable, "-c", peers._FILTER], input=words + said, capture_output=True)
    assert sorted(told.stdout.splitlines()) == sorted(want)
    assert told.returncode == 0
