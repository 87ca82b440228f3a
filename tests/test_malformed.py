# SPDX-License-Identifier: Apache-2.0
"""Malformed checkpoints: each gives one clear error, soon, in little memory.

A child process loads them, so that its memory can be measured and a read that
never ends be stopped. `malformed.py` has the cases.
"""

import json
import os
import pathlib
import select
import stat
import subprocess
import sys
import tempfile

import pytest
from safetensors.numpy import save_file

from spatial_jax import hf
from tests.malformed import CASES, tensors

ROOT = pathlib.Path(__file__).parents[1]
SECONDS = 60  # on a busy machine; each takes a few milliseconds on an idle one
MEGABYTES = 1000  # in all, of which jax takes 200

CHILD = """
import json, sys
import jax, jax.numpy as jnp
from spatial_jax import hf
KEYS = (
  ("embed.weight", "embed/embedding"),
  ("layers.{i}.w.weight", "blocks/w/kernel"),
  ("layers.{i}.norm.weight", "blocks/norm/scale"),
  ("head.weight", "head/kernel", hf.Tied("embed.weight")),
)
def leaf(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)
PARAMS = {
  "embed": {"embedding": leaf(6, 4)},
  "blocks": {"w": {"kernel": leaf(2, 4, 8)}, "norm": {"scale": leaf(2, 4)}},
  "head": {"kernel": leaf(4, 6)},
}
def memory():
  with open("/proc/self/status") as file:
    return next(int(x.split()[1]) for x in file if x.startswith("VmHWM")) // 977
def load(path):
  jax.block_until_ready(hf.load(KEYS, path, PARAMS))
load(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
  with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forgets the peak
  kind, text = "", ""
  try:
    load(json.loads(line))
  except BaseException as error:
    kind, text = type(error).__name__, str(error)
  print(json.dumps([kind, text, memory()]), flush=True)
"""


@pytest.fixture(scope="module")
def child(tmp_path_factory):
  """A process that loads what it is told: (path) -> (kind, text, peak)."""
  sound = tmp_path_factory.mktemp("sound")
  save_file(tensors(), sound / "model.safetensors")
  process = None

  def start():
    nonlocal process
    process = subprocess.Popen(
      [sys.executable, "-c", CHILD, str(sound)],
      cwd=ROOT,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert process.stdout.readline() == "ready\n"

  def load(path):
    if process is None or process.poll() is not None:
      start()
    process.stdin.write(json.dumps(str(path)) + "\n")
    process.stdin.flush()
    if not select.select([process.stdout], [], [], SECONDS)[0]:
      process.kill()
      process.wait()
      pytest.fail("it hangs")
    return json.loads(process.stdout.readline())

  yield load
  if process is not None:
    process.kill()
    process.communicate()


@pytest.mark.parametrize("name", CASES)
def test_a_malformed_checkpoint_is_one_clear_error(name, child, tmp_path):
  make, messages, wanted = CASES[name]
  folder = tmp_path / "checkpoint"
  folder.mkdir()
  kind, text, peak = child(make(folder) or folder)
  print(f"{peak} MB: {text}")
  assert kind == wanted, text
  for message in messages:
    assert message in text
  assert peak < MEGABYTES
  assert len(text) < 2000
  text.encode()  # what cannot be printed is escaped


def test_there_are_more_than_thirty():
  assert len(CASES) > 30


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become nobody")
def test_what_may_not_be_read_says_so():
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    folder.chmod(0o755)
    file = folder / "model.safetensors"
    save_file(tensors(), file)
    file.chmod(stat.S_IWUSR)
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    os.seteuid(65534)
    try:
      with pytest.raises(ValueError, match=r"cannot be read .*denied"):
        hf.Reader(file)
      with pytest.raises(ValueError, match=r"cannot be listed .*denied"):
        hf.Reader(closed)
    finally:
      os.seteuid(0)
