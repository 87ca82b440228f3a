# SPDX-License-Identifier: Apache-2.0
"""What the launch scripts would run."""

import os
import pathlib
import shlex
import subprocess

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
TPU = {"PROJECT": "p", "ZONE": "z", "NAME": "n", "TYPE": "v5litepod-16"}
RUN = ("train", "--config=configs/demo.py", "--workdir=gs://b/n")


def dry(script, *words, status=0, **environment):
  """Lines of a dry run, each split into words, or the error."""
  done = subprocess.run(
    [LAUNCH / script, "--dry-run", *words],
    env={"PATH": os.environ["PATH"], **environment},
    capture_output=True,
    text=True,
  )
  assert done.returncode == status, done.stderr
  if status:
    return done.stderr
  return [shlex.split(line) for line in done.stdout.splitlines()]


def test_a_pod_is_asked_for_with_its_runtime():
  (line,) = dry("tpu_vm.sh", "create", **TPU)
  assert line[3:6] == ["queued-resources", "create", "n"]
  assert "--runtime-version=v2-alpha-tpuv5-lite" in line
  assert "--node-id=n" in line and "--spot" not in line
  (line,) = dry("tpu_vm.sh", "create", **TPU, SLICES="2", SPOT="1")
  assert {"--node-count=2", "--node-prefix=n", "--spot"} <= set(line)


def test_a_run_is_the_same_command_on_all_hosts_of_all_slices():
  lines = dry("tpu_vm.sh", "run", *RUN, "--config.seed=a b", SLICES="2", **TPU)
  assert [line[5] for line in lines] == ["n-0", "n-1"]
  for line in lines:
    assert "--worker=all" in line
    remote = shlex.split(line[-1].removeprefix("--command="))
    start = remote.index("-m")
    assert remote[start : start + 4] == [
      "-m",
      "spatial_jax",
      "train",
      "--multihost",
    ]
    assert "--config.seed=a b" in remote and RUN[2] in remote


def test_resume_runs_until_it_ends_well():
  assert dry("tpu_vm.sh", "resume", *RUN, **TPU) == dry(
    "tpu_vm.sh", "run", *RUN, **TPU
  )


def test_install_copies_the_committed_tree_to_all_workers():
  lines = dry("tpu_vm.sh", "install", **TPU)
  assert [line[0] for line in lines] == ["mkdir", "git", "gcloud", "gcloud"]
  assert "--worker=all" in lines[2] and "'.[tpu]'" in lines[3][-1]


def test_stop_and_delete_name_the_pod():
  ((*_, last),) = dry("tpu_vm.sh", "stop", **TPU)
  assert "kill -TERM" in last
  ((*line,),) = dry("tpu_vm.sh", "delete", **TPU)
  assert line[4:6] == ["delete", "n"] and "--force" in line


@pytest.mark.parametrize(
  ("words", "environment", "message"),
  [
    (("create",), {}, "PROJECT is not set"),
    (("fly",), TPU, "unknown command fly"),
    (("run",), TPU, "run what?"),
    (("run", "train", "--workdir=runs/x"), TPU, "must be a bucket"),
    (("create",), {**TPU, "TYPE": "v2-8"}, "set VERSION"),
  ],
)
def test_wrong_use_says_what_is_missing(words, environment, message):
  assert message in dry("tpu_vm.sh", *words, status=2, **environment)


def test_slurm_starts_one_process_for_each_gpu():
  (line,) = dry("slurm.sh", "train", "--config=c.py", "--workdir=w")
  assert line[0] == "srun" and "--kill-on-bad-exit=1" in line
  assert line[-4:] == ["train", "--multihost", "--config=c.py", "--workdir=w"]
  assert "give a command" in dry("slurm.sh", "train", status=2)


def test_the_job_set_fills_whole_slices():
  job = yaml.safe_load((LAUNCH / "gke.yaml").read_text())
  assert job["kind"] == "JobSet" and job["spec"]["failurePolicy"]["maxRestarts"]
  (slices,) = job["spec"]["replicatedJobs"]
  spec = slices["template"]["spec"]
  pod = spec["template"]["spec"]
  (container,) = pod["containers"]
  rows, columns = pod["nodeSelector"][
    "cloud.google.com/gke-tpu-topology"
  ].split("x")
  chips = container["resources"]["limits"]["google.com/tpu"]
  assert spec["completions"] == spec["parallelism"]
  assert spec["parallelism"] * chips == int(rows) * int(columns)
  assert "--multihost" in container["command"]
