# SPDX-License-Identifier: Apache-2.0
"""Several processes train as one, through kills and on other meshes."""

import json
import pathlib
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from launch import chaos
from spatial_jax import hosts, metrics, sharding, train
from spatial_jax.data import pipeline
from tests import toy

STEPS, EVERY = 40, 8


def command(workdir, *more):
  return [
    "train",
    f"--config={pathlib.Path(toy.__file__)}",
    f"--workdir={workdir}",
    f"--config.steps={STEPS}",
    f"--config.checkpoint.every={EVERY}",
    *more,
  ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run of one process with eight devices as (2, 4)."""
  workdir = tmp_path_factory.mktemp("pods") / "whole"
  config = toy.get_config()
  config.steps, config.checkpoint.every = STEPS, EVERY
  config.checkpoint.keep = 9
  config.mesh.data = 2
  train.main(config.lock(), str(workdir))
  return workdir


def assert_same_curve(workdir, want):
  rows, wanted = metrics.read(str(workdir)), metrics.read(str(want))
  assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
  for a, b in zip(rows, wanted, strict=True):
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def wait_for(workdir, step, pod):
  until = time.monotonic() + 60
  while chaos.steps_done(workdir) < step:
    assert pod.running() and time.monotonic() < until
    time.sleep(0.01)


def test_two_processes_survive_both_signals_and_train_as_one(whole, tmp_path):
  """SIGTERM of one saves on all; after SIGKILL of one all end and go on."""
  workdir = tmp_path / "two"
  slow = "--config.data.pause=0.02"  # for each row, of which a step has four
  pod = chaos.Pod(command(workdir, slow), tmp_path / "log")
  wait_for(workdir, EVERY + 1, pod)
  pod.kill(signal.SIGTERM, [1])
  assert pod.join() == [143, 143]
  log = (tmp_path / "log.0").read_text()
  saved = int(log.rpartition("SIGTERM: saved step ")[2].split()[0])
  data = workdir / "checkpoints" / str(saved) / "data"
  assert len(list(data.glob("process_*-of-2.json"))) == 2

  # As soon as it goes on: before the first step, or after it.
  (tmp_path / "again.0").touch()
  # A step takes longer than the second after which jax looks for a signal.
  slower = "--config.data.pause=0.4"
  pod, start = chaos.Pod(command(workdir, slower), tmp_path / "again"), saved
  until = time.monotonic() + 60
  while "compiling for" not in (tmp_path / "again.0").read_text():
    assert pod.running() and time.monotonic() < until
    time.sleep(0.01)
  pod.kill(signal.SIGTERM, [0])
  assert pod.join() == [143, 143]
  told = (tmp_path / "again.0").read_text().rpartition("SIGTERM: ")[2]
  saved = int(told.partition(" step ")[2].split()[0])
  assert start <= saved <= start + 1

  pod = chaos.Pod(command(workdir, slow), tmp_path / "log")
  wait_for(workdir, saved + 1, pod)
  pod.kill(signal.SIGKILL, [0])
  assert all(pod.join())

  # Elastic: four devices as (4, 1), of two processes.
  pod = chaos.Pod(
    command(workdir, "--config.mesh.data=4"), tmp_path / "last", devices=2
  )
  assert pod.join() == [0, 0], (tmp_path / "last.0").read_text()
  assert_same_curve(workdir, whole)
  log = (tmp_path / "last.0").read_text()
  assert f"from checkpoint {saved} " in log and "done again" in log
  assert "slowest_host" in log and "goodput" in log
  assert "goodput" not in (tmp_path / "last.1").read_text()


def test_who_is_told_to_stop_while_starting_keeps_what_is_there(
  whole, tmp_path, monkeypatch, capsys
):
  workdir = shutil.copytree(whole, tmp_path / "told")
  shutil.rmtree(workdir / "checkpoints" / str(STEPS))
  left = STEPS - EVERY
  config = toy.get_config()
  config.steps, config.mesh.data = STEPS, 2
  with monkeypatch.context() as patched:
    patched.setattr(train, "_told_before", lambda saves, start: start == left)
    result = train.main(config.lock(), str(workdir))
  assert result.interrupted and result.step == left
  assert f"SIGTERM: still at step {left}" in capsys.readouterr().out
  result = train.main(config, str(workdir))
  assert result.step == STEPS and not result.interrupted
  assert_same_curve(workdir, whole)


def test_a_run_goes_on_with_fewer_devices_on_another_mesh(
  whole, tmp_path, monkeypatch
):
  workdir = shutil.copytree(whole, tmp_path / "four")
  for step in range(2 * EVERY, STEPS + 1, EVERY):
    shutil.rmtree(workdir / "checkpoints" / str(step))
  four = jax.devices()[:4]
  mesh = sharding.mesh
  monkeypatch.setattr(
    sharding, "mesh", lambda **sizes: mesh(**sizes, devices=four)
  )
  config = toy.get_config()
  config.steps, config.mesh.data = STEPS, 4
  result = train.main(config.lock(), str(workdir))
  assert result.state["step"].sharding.device_set == set(four)
  assert_same_curve(workdir, whole)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_saved_place_gives_any_number_of_hosts_the_same_rows(whole, count):
  file = whole / "checkpoints" / str(EVERY) / "data/process_0-of-1.json"
  config = toy.get_config()
  rows = np.arange(8).reshape(count, -1)
  seen = []
  for share in rows:
    data = iter(pipeline.make(config, 8, rows=share.tolist())[0])
    data.set_state(json.loads(file.read_text()))
    seen.append(next(data)["index"])
  data = iter(pipeline.make(config, 8)[0])
  want = [next(data)["index"] for _ in range(EVERY + 1)][-1]
  np.testing.assert_array_equal(np.concatenate(seen), want)


def test_processes_that_cannot_meet_are_told_what_to_set(monkeypatch):
  def fail(*args, **kwargs):
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", fail)
  with pytest.raises(ValueError, match="set JAX_COORDINATOR_ADDRESS=HOST"):
    hosts.start({})
  with pytest.raises(ValueError, match="belong together"):
    hosts.start({"JAX_NUM_PROCESSES": "2"})
  with pytest.raises(ValueError, match="'two' in the environment: no number"):
    hosts.start({"JAX_NUM_PROCESSES": "two"})


def test_alone_a_process_agrees_with_itself():
  assert hosts.all_agree(True) and not hosts.all_agree(False)
  assert hosts.slowest(0.5) == (0, 0.5)
  hosts.barrier("alone")
