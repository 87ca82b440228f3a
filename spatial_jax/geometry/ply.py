# SPDX-License-Identifier: Apache-2.0
"""Point clouds as binary PLY, which every 3-D viewer opens. numpy only.

Format: https://paulbourke.net/dataformats/ply. A file is a text header that
names the properties of a vertex, then the vertices as packed little-endian
records. `read` takes what `write` writes and the point clouds of other programs
that keep to scalar vertex properties; faces are skipped.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping

import numpy as np

from spatial_jax.types import Array, Float, UInt8

_TYPES = {
  "char": "i1",
  "int8": "i1",
  "uchar": "u1",
  "uint8": "u1",
  "short": "i2",
  "int16": "i2",
  "ushort": "u2",
  "uint16": "u2",
  "int": "i4",
  "int32": "i4",
  "uint": "u4",
  "uint32": "u4",
  "float": "f4",
  "float32": "f4",
  "double": "f8",
  "float64": "f8",
}
_NAMES = {"f4": "float", "f8": "double", "u1": "uchar", "i4": "int"}
HEADER_BYTES = 1 << 16  # a longer header is no point cloud's


def write(
  path: str | os.PathLike,
  points: Float[Array, "n 3"],
  colors: UInt8[Array, "n 3"] | None = None,
  extra: Mapping[str, Float[Array, " n"]] | None = None,
  comments: tuple[str, ...] = (),
) -> None:
  """Writes x, y, z, then red, green, blue, then one float for each `extra`.

  Args:
    extra: name of a property -> its values, for instance confidence.
    comments: lines for the header, for instance the unit and the axes.
  """
  columns = {k: points[:, i] for i, k in enumerate("xyz")}
  fields = [(k, "<f4") for k in "xyz"]
  if colors is not None:
    columns |= {k: colors[:, i] for i, k in enumerate(("red", "green", "blue"))}
    fields += [(k, "u1") for k in ("red", "green", "blue")]
  for name, values in (extra or {}).items():
    columns[name] = values
    fields.append((name, "<f4"))
  rows = np.empty(len(points), fields)
  for name, values in columns.items():
    rows[name] = np.asarray(values)
  lines = [
    "ply",
    "format binary_little_endian 1.0",
    *(f"comment {line}" for line in comments),
    f"element vertex {len(rows)}",
    *(f"property {_NAMES[kind[-2:]]} {name}" for name, kind in fields),
    "end_header\n",
  ]
  partial = pathlib.Path(f"{os.fspath(path)}.partial")
  with partial.open("wb") as file:
    file.write("\n".join(lines).encode("ascii"))
    file.write(rows.tobytes())
  partial.replace(path)


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Vertex properties by name, each an array [n].

  Raises:
    ValueError: no PLY file, a kind that isn't read here, or one cut short.
  """
  path = pathlib.Path(path)
  with path.open("rb") as file:
    head = file.read(HEADER_BYTES)
    end = head.find(b"end_header\n")
    if not head.startswith(b"ply") or end < 0:
      raise ValueError(f"{path} is no PLY file: its header is missing")
    count, kind, fields = _header(path, head[:end].decode("ascii", "replace"))
    start = end + len(b"end_header\n")
    dtype = np.dtype(fields)
    if kind == "ascii":
      file.seek(start)
      table = np.loadtxt(file, max_rows=count, ndmin=2)
      return {
        name: table[:, i].astype(form) for i, (name, form) in enumerate(fields)
      }
    size = path.stat().st_size - start
    if size < count * dtype.itemsize:
      raise ValueError(
        f"{path} is cut short: {size} bytes of vertices, its header promises "
        f"{count * dtype.itemsize}"
      )
    file.seek(start)
    rows = np.frombuffer(file.read(count * dtype.itemsize), dtype)
  return {name: rows[name] for name, _ in fields}


def _header(path, text: str) -> tuple[int, str, list[tuple[str, str]]]:
  """Vertex count, format and fields."""
  count, kind, fields, element = 0, "", [], ""
  for line in text.splitlines():
    words = line.split()
    if not words:
      continue
    if words[0] == "format":
      kind = words[1]
    elif words[0] == "element":
      if not element and words[1] != "vertex":
        raise ValueError(f"{path}: {words[1]} stand before the vertices")
      element = words[1]
      count = int(words[2]) if element == "vertex" else count
    elif words[0] == "property" and element == "vertex":
      if words[1] not in _TYPES:
        raise ValueError(f"{path}: vertex property of type {words[1]!r}")
      order = ">" if kind == "binary_big_endian" else "<"
      fields.append((words[-1], order + _TYPES[words[1]]))
  if kind not in ("ascii", "binary_little_endian", "binary_big_endian"):
    raise ValueError(f"{path}: unknown PLY format {kind!r}")
  return count, kind, fields
