# SPDX-License-Identifier: Apache-2.0
"""Records of TFDS data sets, read without TensorFlow.

A file is a line of [length u64, its checksum u32, bytes, their checksum u32]; a
record is a `tf.train.Example` in protobuf's wire format: feature -> list of
bytes, floats or integers. numpy only.
"""

from __future__ import annotations

import pathlib
import struct
from collections.abc import Iterator

import numpy as np

Feature = list[bytes] | np.ndarray
_HEADER = struct.Struct("<QI")


class Records:
  """Random access to the examples of one split of a TFDS folder.

  Args:
    folder: has files like name-train.tfrecord-00000-of-00016.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a file that ends within a record.
  """

  def __init__(self, folder: str | pathlib.Path, split: str):
    files = sorted(pathlib.Path(folder).glob(f"*-{split}.tfrecord-*"))
    if not files:
      raise FileNotFoundError(
        f"{folder} has no *-{split}.tfrecord-* files; give the folder of the "
        "data set's version, such as name/1.0.0"
      )
    self._places = [(f, *place) for f in files for place in _places(f)]

  def __len__(self) -> int:
    return len(self._places)

  def __getitem__(self, index: int) -> dict[str, Feature]:
    file, start, length = self._places[index]
    with file.open("rb") as stream:
      stream.seek(start)
      return example(stream.read(length))


def _places(file: pathlib.Path) -> Iterator[tuple[int, int]]:
  """Start and length of each record."""
  size, at = file.stat().st_size, 0
  with file.open("rb") as stream:
    while at < size:
      stream.seek(at)
      header = stream.read(_HEADER.size)
      whole = len(header) == _HEADER.size
      length = _HEADER.unpack(header)[0] if whole else 0
      at += _HEADER.size
      if not whole or at + length + 4 > size:
        raise ValueError(
          f"{file} ends within a record at byte {at}: it was not copied whole"
        )
      yield at, length
      at += length + 4


def example(record: bytes) -> dict[str, Feature]:
  """Features by name: bytes as a list, numbers as f32 or i64 arrays."""
  features = {}
  for _, part in _fields(record):
    for _, entry in _fields(part):
      name, value = b"", b""
      for number, content in _fields(entry):
        name, value = (content, value) if number == 1 else (name, content)
      for kind, content in _fields(value):
        features[name.decode()] = _READ[kind](content)
  return features


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
  """Number and content of each field."""
  at = 0
  while at < len(message):
    key, at = _varint(message, at)
    number, wire = key >> 3, key & 7
    if wire == 0:
      content, at = _varint(message, at)
    elif wire in (1, 2, 5):
      size = 8 if wire == 1 else 4
      if wire == 2:
        size, at = _varint(message, at)
      content, at = message[at : at + size], at + size
    else:
      raise ValueError(
        f"a record has a field of wire type {wire}: it is no tf.train.Example"
      )
    yield number, content


def _varint(message: bytes, at: int) -> tuple[int, int]:
  value = shift = 0
  while True:
    byte = message[at]
    value |= (byte & 127) << shift
    shift, at = shift + 7, at + 1
    if byte < 128:
      return value, at


def _bytes(content: bytes) -> list[bytes]:
  return [value for _, value in _fields(content)]


def _floats(content: bytes) -> np.ndarray:
  # Packed, or one field for each number: bytes of both stand side by side.
  return np.frombuffer(b"".join(v for _, v in _fields(content)), "<f4")


def _integers(content: bytes) -> np.ndarray:
  values = []
  for _, value in _fields(content):
    if isinstance(value, int):
      values.append(value)
      continue
    at = 0
    while at < len(value):
      number, at = _varint(value, at)
      values.append(number)
  return np.array(values, np.uint64).astype(np.int64)


_READ = {1: _bytes, 2: _floats, 3: _integers}
