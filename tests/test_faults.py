# SPDX-License-Identifier: Apache-2.0
"""Bad input ends in one clear error, and nothing saved before is lost."""

import errno
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax import __main__ as cli
from spatial_jax import checkpoint, metrics, sharding

# After the first unreadable array orbax closes the event loop to which the
# readers of the others still report.
pytestmark = [
  pytest.mark.usefixtures("kept_programs"),
  *(
    pytest.mark.filterwarnings(f"ignore::pytest.{name}")
    for name in (
      "PytestUnraisableExceptionWarning",
      "PytestUnhandledThreadExceptionWarning",
    )
  ),
]
ROOT = pathlib.Path(__file__).parents[1]
TOY = f"{ROOT}/tests/toy.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("trained")
  assert run("train", workdir) == 0
  return workdir


@pytest.fixture
def workdir(trained, tmp_path):
  """A copy of a run of 6 steps with checkpoints of steps 4 and 6."""
  return shutil.copytree(trained, tmp_path / "run")


def run(command, workdir, *more, arg=""):
  config = f"--config={TOY}" + (f":{arg}" if arg else "")
  return cli.main([command, config, f"--workdir={workdir}", *more])


def steps(workdir):
  return sorted(
    int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()
  )


def one_error(capsys):
  error = capsys.readouterr().err
  lines = [x for x in error.splitlines() if x.startswith("error: ")]
  assert len(lines) == 1 and "Traceback" not in error, error
  return error


def test_evaluating_without_a_checkpoint_says_so(tmp_path, capsys):
  assert run("evaluate", tmp_path) == 1
  assert "train first" in one_error(capsys)
  (tmp_path / "checkpoints").mkdir()
  assert run("evaluate", tmp_path) == 1
  assert "no checkpoint in" in one_error(capsys)


def test_starting_from_nowhere_says_so(tmp_path, capsys):
  where = f"--config.init_from={tmp_path}/nothing"
  assert run("train", tmp_path / "run", where) == 1
  assert "neither a workdir with checkpoints nor" in one_error(capsys)


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_checkpoint_of_another_shape_lists_what_differs(
  command, workdir, capsys
):
  assert run(command, workdir, "--config.model.width=16") == 1
  error = one_error(capsys)
  assert "another model, shape or optimizer" in error
  assert (
    "llm/head/kernel: got float32[8, 16], expected float32[16, 16]" in error
  )
  assert steps(workdir) == [4, 6]


def test_a_checkpoint_of_another_optimizer_lists_what_differs(workdir, capsys):
  assert run("train", workdir, "--config.optimizer.name=muon") == 1
  assert "missing: " in one_error(capsys)
  assert steps(workdir) == [4, 6]


def damage(path, how):
  """Cuts or overwrites the data files of a checkpoint's item."""
  for file in path.rglob("*"):
    if file.is_file() and file.parent.name == "d":
      if how == "missing":
        file.unlink()
        continue
      data = bytearray(file.read_bytes())
      middle = len(data) // 2
      data[middle : middle + 16] = bytes(16)
      file.write_bytes(data[:middle] if how == "cut" else data)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_changed_bit_is_found_by_the_checksum(devices):
  """The sums are taken on the host or by the devices, which agree."""
  tree = {
    "w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "b": np.zeros(2, jnp.bfloat16),
    "used": np.array([True, False]),
    "step": np.int32(-5),
  }
  manifest = checkpoint._manifest(tree)
  mesh = sharding.mesh(data=devices, fsdp=1, devices=jax.devices()[:devices])
  tree = jax.device_put(tree, sharding.replicated(mesh))
  checkpoint._verify(manifest, tree, "here")
  changed = {**tree, "b": tree["b"].at[1].set(1e-30)}
  with pytest.raises(checkpoint.Corrupt, match="the bytes of b have changed"):
    checkpoint._verify(manifest, changed, "here")


@pytest.mark.parametrize("how", ["cut", "overwritten", "missing", "no meta"])
def test_training_falls_back_from_a_damaged_checkpoint(how, workdir, caplog):
  newest = workdir / "checkpoints" / "6"
  if how == "no meta":
    (newest / "meta" / "metadata").write_text('{"step": 6')
  else:
    damage(newest / "params", how)
  assert run("train", workdir) == 0
  assert "6 is damaged" in caplog.text and "falling back" in caplog.text
  assert steps(workdir) == [4, 6]
  assert (workdir / "corrupt" / "6").exists()
  rows = [row["step"] for row in metrics.read(str(workdir))]
  assert rows == [1, 2, 3, 4, 5, 6]


def test_evaluating_falls_back_and_leaves_the_damaged_checkpoint(
  workdir, capsys, caplog
):
  damage(workdir / "checkpoints" / "6" / "params", "cut")
  assert run("evaluate", workdir) == 0
  assert "6 is damaged" in caplog.text
  assert "checkpoint 4 of" in capsys.readouterr().out
  assert steps(workdir) == [4, 6]


def test_when_all_checkpoints_are_damaged_the_run_stops(workdir, capsys):
  for step in (4, 6):
    damage(workdir / "checkpoints" / str(step) / "params", "cut")
  assert run("train", workdir) == 1
  assert "can be read" in one_error(capsys)
  assert (workdir / "corrupt" / "4").exists()


def test_a_workdir_in_use_names_the_process(workdir, capsys):
  with checkpoint.lock(str(workdir)):
    assert run("train", workdir, "--config.steps=9") == 1
  error = one_error(capsys)
  assert f"in use by process {os.getpid()} on host" in error
  assert run("train", workdir) == 0


def test_a_workdir_that_cannot_be_written_says_so(tmp_path, capsys):
  file = tmp_path / "file"
  file.write_text("")
  assert run("train", file) == 1
  assert "is not writable" in one_error(capsys)
  assert run("train", file / "below") == 1
  assert "choose another --workdir" in one_error(capsys)


def test_a_disk_that_fills_up_is_one_error_and_loses_nothing(
  workdir, capsys, monkeypatch
):
  from orbax.checkpoint._src.handlers import json_checkpoint_handler as handler

  def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with monkeypatch.context() as patch:
    patch.setattr(handler.JsonCheckpointHandler, "_save_fn", full)
    assert run("train", workdir, "--config.steps=8") == 1
  error = one_error(capsys)
  assert "could not be written" in error and "step 6 is kept" in error
  assert "No space left on device" in error
  assert steps(workdir) == [4, 6]
  # A user's process has ended; here the save's other writers may still write.
  found = None
  while found != (found := sorted(map(str, workdir.rglob("*")))):
    time.sleep(0.5)
  assert run("train", workdir, "--config.steps=8") == 0
  assert steps(workdir) == [6, 8]


def test_a_file_system_that_became_read_only_says_so(
  workdir, capsys, monkeypatch
):
  def refuse(*args, **kwargs):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))

  monkeypatch.setattr(pathlib.Path, "open", refuse)
  assert run("train", workdir, "--config.steps=9") == 1
  error = one_error(capsys)
  assert "is not writable (Read-only file system)" in error
  assert steps(workdir) == [4, 6]


def test_a_batch_that_devices_cannot_share_names_the_fix(tmp_path, capsys):
  assert run("train", tmp_path, "--config.batch_size=12") == 1
  error = one_error(capsys)
  assert "config.batch_size=12" in error and "multiple of 8" in error


def test_a_mesh_of_the_wrong_size_names_the_fix(tmp_path, capsys):
  assert run("train", tmp_path, "--config.mesh.tensor=3") == 1
  assert "config.mesh" in one_error(capsys)


def test_nan_stops_the_run_names_the_step_and_keeps_what_was_good(
  tmp_path, capsys
):
  more = ("--config.data.shuffle=false", "--config.steps=12")
  # Row 50 comes in step 7 of batches of 8.
  assert run("train", tmp_path, *more, arg="nan=50") == 1
  error = one_error(capsys)
  assert "loss is nan at step 7" in error and "step 6 is good" in error
  assert steps(tmp_path) == [4, 6]
  assert run("train", tmp_path, *more) == 0  # sound data: it goes on
  assert metrics.read(str(tmp_path))[-1]["step"] == 12


def test_kill_9_in_mid_save_leaves_the_last_checkpoint(workdir):
  """The process dies after orbax began to write step 8."""
  code = f"""
import os, signal, sys
from orbax.checkpoint._src.handlers import json_checkpoint_handler as handler
from spatial_jax import __main__ as cli

def die(*args, **kwargs):
  os.kill(os.getpid(), signal.SIGKILL)

handler.JsonCheckpointHandler._save_fn = die
handler.JsonCheckpointHandler.async_save = die
cli.main(["train", "--config={TOY}", "--workdir={workdir}",
          "--config.steps=9"])
"""
  killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
  assert killed.returncode == -signal.SIGKILL
  left = [p.name for p in (workdir / "checkpoints").iterdir()]
  assert any("tmp" in name for name in left), left
  assert steps(workdir) == [4, 6]
  assert run("evaluate", workdir) == 0
  assert run("train", workdir, "--config.steps=9") == 0
  left = [p.name for p in (workdir / "checkpoints").iterdir()]
  assert sorted(left) == ["8", "9"]


def test_a_second_process_cannot_use_the_workdir_of_a_running_one(tmp_path):
  code = (
    "import sys, time\nfrom spatial_jax import checkpoint\n"
    "with checkpoint.lock(sys.argv[1]):\n"
    "  print('held', flush=True)\n  time.sleep(60)"
  )
  holder = subprocess.Popen(
    [sys.executable, "-c", code, str(tmp_path)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert holder.stdout.readline() == "held\n"
  with (
    pytest.raises(OSError, match=f"process {holder.pid}"),
    checkpoint.lock(str(tmp_path)),
  ):
    pass
  holder.kill()
  holder.communicate()
  time.sleep(0.1)
  with checkpoint.lock(str(tmp_path)):  # kill -9 freed it
    pass
