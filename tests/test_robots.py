# SPDX-License-Identifier: Apache-2.0
"""Demonstrations: LIBERO's records, statistics of actions, drawn rooms."""

import importlib
import io
import struct
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from spatial_jax.data import actions, libero, tfrecord
from spatial_jax.world import reaching

STEPS = (5, 3, 11)  # of each episode


def field(number, content):
  """A length-delimited field of protobuf."""
  return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value):
  out = b""
  while value > 127:
    out, value = out + bytes([value & 127 | 128]), value >> 7
  return out + bytes([value])


def feature(values):
  """Bytes, floats (packed) or integers (one field each)."""
  if isinstance(values[0], bytes):
    return field(1, b"".join(field(1, value) for value in values))
  if isinstance(values, np.ndarray):
    return field(2, field(1, values.astype("<f4").tobytes()))
  numbers = (varint(1 << 3) + varint(v % 2**64) for v in values)
  return field(3, b"".join(numbers))


def example(features):
  entries = (
    field(1, field(1, name.encode()) + field(2, feature(values)))
    for name, values in features.items()
  )
  return field(1, b"".join(entries))


def picture(color):
  stream = io.BytesIO()
  Image.new("RGB", (32, 32), color).save(stream, "PNG")
  return stream.getvalue()


def episode(number):
  rng = np.random.default_rng(number)
  count = STEPS[number]
  taken = rng.normal(size=(count, 7)).astype(np.float32)
  taken[:, 5] = 0.25  # never turns
  taken[:, 6] = rng.choice([-1.0, 1.0], count)  # LIBERO: 1 closes
  return {
    "steps/action": taken.ravel(),
    "steps/observation/state": rng.normal(size=count * 8).astype(np.float32),
    "steps/observation/image": [picture((10 * i, 0, 0)) for i in range(count)],
    "steps/observation/wrist_image": [picture((0, 0, 255))] * count,
    "steps/language_instruction": [b"Pick up the Bowl"] * count,
    "steps/is_last": [0] * (count - 1) + [-1],
  }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Two files, as TFDS names them."""
  where = tmp_path_factory.mktemp("libero")
  for shard, numbers in enumerate(((0, 1), (2,))):
    content = b""
    for number in numbers:
      record = example(episode(number))
      content += struct.pack("<QI", len(record), 0) + record + bytes(4)
    name = f"libero_tiny-train.tfrecord-{shard:05d}-of-00002"
    (where / name).write_bytes(content)
  return where


def test_records_hold_what_was_written(folder):
  records = tfrecord.Records(folder, "train")
  assert len(records) == 3
  for number in (2, 0, 1):
    got, want = records[number], episode(number)
    assert got.keys() == want.keys()
    for name, values in want.items():
      if isinstance(values[0], bytes):
        assert got[name] == values
      else:
        np.testing.assert_array_equal(got[name], values)


def test_a_broken_or_missing_file_is_named(folder, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no \*-val\.tfrecord"):
    tfrecord.Records(folder, "val")
  whole = next(folder.iterdir()).read_bytes()
  (tmp_path / "a-train.tfrecord-0").write_bytes(whole[:-5])
  with pytest.raises(ValueError, match="ends within a record"):
    tfrecord.Records(tmp_path, "train")


def test_percentiles_become_one_and_back():
  values = np.random.default_rng(0).normal(3, 2, (5000, 3)).astype(np.float32)
  values[:, 1] = 7
  known = actions.statistics(values, (True, True, False))
  got = actions.normalize(values, known)
  assert np.mean(np.abs(got[:, 0]) == 1) == pytest.approx(0.02, abs=0.002)
  assert not np.any(got[:, 1])
  np.testing.assert_array_equal(got[:, 2], values[:, 2])
  inside = np.abs(got[:, 0]) < 1
  again = actions.restore(got, known)
  np.testing.assert_allclose(again[inside], values[inside], atol=1e-5)


def test_the_command_prints_statistics_that_the_source_reads(folder, tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "spatial_jax.data.libero", str(folder)],
    capture_output=True,
    text=True,
    check=True,
  )
  file = tmp_path / "statistics.json"
  file.write_text(done.stdout)
  known = actions.load(file)
  assert known["num_transitions"] == sum(STEPS)
  assert known["action"]["mask"] == [True] * 6 + [False]
  with pytest.raises(ValueError, match="not of 'other'"):
    actions.load(file, "other")
  config = ConfigDict({"data": {"length": 200}})
  config.data.libero = {
    "folder": str(folder),
    "statistics": str(file),
    "tokenizer": "",
    "side": 16,
    "draws": 4,
  }
  source = libero.make(config, "train")
  assert len(source) == 12
  row, again = source[7], source[7]
  for name, value in row.items():
    np.testing.assert_array_equal(value, again[name])
  assert row["images"].shape == (2, 16, 16, 6)
  assert row["slots"].sum() == row["actions"].size == 56
  first = int(np.argmax(row["slots"]))
  words = source.tokenizer.decode(row["tokens"][:first])
  assert words == libero.PROMPT.format("pick up the bowl")
  assert row["tokens_mask"].sum() == first + 57
  assert row["tokens"][first + 56] == source.tokenizer.end_id


def test_a_row_is_one_step_and_what_follows(folder):
  records = tfrecord.Records(folder, "train")
  known = libero.statistics(records)
  source = libero.Libero(
    records, known, tokenizer="", length=200, side=8, augment=False
  )
  row = source[1]  # of the episode with 3 steps
  colors = row["images"][0, ..., 3:] * 0.5 + 0.5
  step = round(float(colors[0, 0, 0]) * 255 / 10)
  want = libero.moves(records[1])[[min(step + i, 2) for i in range(8)]]
  want = actions.normalize(want, known["action"])
  np.testing.assert_array_equal(row["actions"], want)
  assert not np.any(row["actions"][:, 5])
  assert set(np.unique(row["actions"][:, 6])) <= {0.0, 1.0}
  wrist = row["images"][1] * libero._STD + libero._MEAN
  np.testing.assert_allclose(wrist[..., [2, 5]], 1, atol=1e-5)


def test_hands_in_rooms_go_straight_to_the_thing_and_close():
  config = importlib.import_module("configs.spatial_forcing").get_config("test")
  source = reaching.make(config, "train")
  row, room = source[3], source.rooms.room(3)
  words = source.tokenizer.decode(row["tokens"][row["tokens_mask"]])
  (thing,) = (
    i
    for i in room.view.single
    if f"the {room.view.name(i)}." in words.replace("  ", " ")
  )
  end = row["state"][:3] + row["actions"][:, :3].sum(0)
  where = room.view.in_camera(0, room.view.center[[thing]])[0]
  np.testing.assert_allclose(end, where, atol=1e-5)
  assert row["actions"][-1, 6] == -1 and np.all(row["actions"][:-1, 6] == 1)
  assert row["slots"].sum() == row["actions"].size
  config.data.length = 40
  with pytest.raises(ValueError, match=r"config.data.length=40 is too short"):
    reaching.make(config, "train")[3]
