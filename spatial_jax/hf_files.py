# SPDX-License-Identifier: Apache-2.0
"""Files of published weights, checked before a number of theirs is used.

A `Reader` gives names, shapes, dtypes and parts of tensors of

* a safetensors file, or a folder of them, with or without an index;
* a folder of the Hugging Face cache, whose files are links, or a hub id;
* an .npz file, or a checkpoint of Orbax; see `hf_flax`.

Nothing is unpickled, no file outside the folder is opened, and what a header
claims is compared with the file before memory is taken for it.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from spatial_jax import hf_flax, hf_hub

INDEX = "model.safetensors.index.json"
# Of a header or an index, in bytes. Published ones stay below it; parsed, JSON
# can take forty times its own size.
TEXT_LIMIT = 16 * 2**20

DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
  "C64": np.dtype(np.complex64),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U64": np.dtype(np.uint64),
  "U32": np.dtype(np.uint32),
  "U16": np.dtype(np.uint16),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_NOT_WEIGHTS = {
  b"PK\x03\x04": "a zip archive, probably a PyTorch pickle",
  b"\x80": "a pickle",
  b"\x93NUMPY": "a NumPy array",
  b"version https://git-lfs": "a pointer of git LFS (git lfs pull fetches it)",
  b"<": "a web page",
  b"{": "JSON text",
}


class Tensor(NamedTuple):
  """Where a tensor lies in a file."""

  dtype: np.dtype
  shape: tuple[int, ...]
  start: int  # byte in the file


class Reader:
  """Tensors of a source; parts of them are read when asked for.

  Raises ValueError, or FileNotFoundError where there is nothing to read, with
  the file, the tensor and what to do.

  Args:
    source: file, folder, or id on the Hugging Face hub (org/name[@revision]).
  """

  def __init__(self, source: str | os.PathLike):
    self.source = os.fspath(source)
    self.path = hf_hub.locate(self.source)
    self._files: dict[str, Any] = {}
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.dtypes: dict[str, np.dtype] = {}
    try:
      for file, wanted in _open(self.path):
        self._add(file, wanted)
    except BaseException:
      self.close()
      raise

  def _add(self, file, wanted):
    for name in wanted:
      if name not in file.tensors:
        raise ValueError(
          f"{file.path} does not hold the tensor {show(name)} that the index "
          "places there; fetch the index and the files again, of one revision"
        )
    for name, tensor in file.tensors.items():
      if name in self._files:
        raise ValueError(
          f"tensor {show(name)} is twice in {self.source}: in "
          f"{self._files[name].path} and in {file.path}; remove the file that "
          "does not belong to it, or give the one file to read"
        )
      self._files[name] = file
      self.shapes[name], self.dtypes[name] = tensor.shape, tensor.dtype

  def slice(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    """Part of a tensor; only that part is read.

    Args:
      index: slices of step 1 of the first axes; () is all.
    """
    return self._files[name].slice(name, index)

  def config(self, key: str) -> Any:
    """A value of the config.json beside the weights, or None."""
    path = os.path.join(self.path, "config.json")
    if not os.path.isfile(path) or os.path.getsize(path) > TEXT_LIMIT:
      return None
    with open(path, "rb") as file:
      config = parse(file.read(), path)
    parts = [config]
    if isinstance(config, dict):
      parts += [config.get("text_config"), config.get("llm_config")]
    found = (p[key] for p in parts if isinstance(p, dict) and key in p)
    return next(found, None)

  def close(self) -> None:
    for file in set(self._files.values()):
      file.close()


class Safetensors:
  """One safetensors file."""

  _file = -1

  def __init__(self, path: str):
    self.path = path
    self._file = _open_file(path)
    try:
      self.tensors = _header(self._file, path)
    except BaseException:
      self.close()
      raise

  def slice(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    tensor = self.tensors[name]
    shape = tensor.shape
    index = (*index, *(slice(None),) * (len(shape) - len(index)))
    parts = [range(*s.indices(n)) for s, n in zip(index, shape, strict=True)]
    out = np.empty([len(part) for part in parts], tensor.dtype)
    if not out.size:
      return out
    # Axes that are read whole form runs of bytes with the one before them.
    axis = len(shape)
    while axis and len(parts[axis - 1]) == shape[axis - 1]:
      axis -= 1
    axis = max(axis - 1, 0)
    steps = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    width, size = tensor.dtype.itemsize, math.prod(out.shape[axis:])
    buffer = memoryview(out.reshape(-1).view(np.uint8))
    first = parts[axis].start * steps[axis] if shape else 0
    for row, at in enumerate(itertools.product(*parts[:axis])):
      start = first + sum(i * s for i, s in zip(at, steps, strict=False))
      into = buffer[row * size * width : (row + 1) * size * width]
      self._read(into, tensor.start + start * width)
    return out

  def _read(self, into: memoryview, start: int) -> None:
    while into:
      count = os.preadv(self._file, [into], start)
      if not count:
        raise ValueError(
          f"{self.path} became shorter while it was read; fetch it again"
        )
      into, start = into[count:], start + count

  def close(self) -> None:
    if self._file >= 0:
      os.close(self._file)
      self._file = -1

  __del__ = close


def show(name: str) -> str:
  """A tensor's name as an error may print it, whatever it holds."""
  text = name if name.isprintable() else ascii(name)
  return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} letters)"


def _open(source: str) -> Iterable[tuple[Any, Iterable[str]]]:
  """Files of a source, each with the names that it must hold."""
  if not os.path.isdir(source):
    if source.endswith(_PICKLES):
      raise ValueError(_pickled(source, source))
    is_npz = source.endswith(".npz")
    yield (hf_flax.Npz if is_npz else Safetensors)(source), ()
    return
  folder = source
  try:
    names = sorted(os.listdir(folder))
  except OSError as error:
    raise ValueError(
      f"{folder} cannot be listed ({error.strerror}); check its permissions"
    ) from error
  if orbax := hf_flax.orbax_folder(folder):
    yield hf_flax.Orbax(orbax), ()
    return
  indices = [name for name in names if name.endswith(".safetensors.index.json")]
  if INDEX in indices or len(indices) == 1:
    index = INDEX if INDEX in indices else indices[0]
    files = _indexed(folder, index, names)
  else:
    # With several indices (of variants) the files' names decide, or clash.
    files = {name: () for name in names if name.endswith(".safetensors")}
  arrays = [name for name in names if name.endswith(".npz")]
  if not files and len(arrays) == 1:
    path = os.path.join(folder, arrays[0])
    _check_link(folder, path)
    yield hf_flax.Npz(path), ()
    return
  if not files:
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
      raise ValueError(_pickled(folder, pickles[0]))
    raise ValueError(
      f"{folder} holds no .safetensors file; give the folder or the file with "
      "the weights"
    )
  for name, wanted in files.items():
    path = os.path.join(folder, name)
    _check_link(folder, path)
    yield Safetensors(path), wanted


def _pickled(source: str, file: str) -> str:
  return (
    f"{source} holds pickled PyTorch weights ({file}), which can run code when "
    'read. Convert them where you trust them:\n  python -c "import torch, '
    f"safetensors.torch as s; s.save_file(torch.load('{file}', "
    "weights_only=True), 'model.safetensors')\""
  )


def _indexed(folder: str, index: str, names: list[str]) -> dict[str, list[str]]:
  """File -> names of its tensors, as the index has them."""
  path = os.path.join(folder, index)
  _check_link(folder, path)
  file = _open_file(path)
  try:
    size = os.fstat(file).st_size
    if size > TEXT_LIMIT:
      raise ValueError(
        f"{path} has {size} bytes; no index has more than {TEXT_LIMIT}. Fetch "
        "it again"
      )
    found = parse(os.pread(file, size, 0), path)
  finally:
    os.close(file)
  where = found.get("weight_map") if isinstance(found, dict) else None
  if not isinstance(where, dict):
    raise ValueError(
      f"{path} is no checkpoint index with a weight_map; fetch it again"
    )
  files: dict[str, list[str]] = {}
  for name, value in where.items():
    check_name(name, path)
    if not isinstance(value, str):
      raise ValueError(
        f"{path}: the file of tensor {show(name)} is {show(repr(value))}, not "
        "a file name; fetch the index again"
      )
    files.setdefault(value, []).append(name)
  # A name that leads out of the folder is absent from its listing too.
  if absent := sorted(files.keys() - set(names)):
    shown = ", ".join(show(repr(name)) for name in absent[:5])
    more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
    raise ValueError(
      f"{path} names files that are not in {folder}: {shown}{more} (first for "
      f"tensor {show(files[absent[0]][0])}); fetch them"
    )
  for name in files:
    if not name.endswith(".safetensors"):
      raise ValueError(
        f"{path} names {show(repr(name))}, which is no .safetensors file; "
        "remove the index if it belongs to another format"
      )
  return files


def _check_link(folder: str, path: str) -> None:
  """A link may lead into the folder, or to the blobs of the hub's cache."""
  root, real = os.path.realpath(folder), os.path.realpath(path)
  places = [root]
  parts = root.split(os.sep)
  if len(parts) > 2 and parts[-2] == "snapshots" and "--" in parts[-3]:
    places.append(os.path.join(os.sep.join(parts[:-2]), "blobs"))
  if all(os.path.commonpath([place, real]) != place for place in places):
    raise ValueError(
      f"{path} is a link out of its folder, to {real}; give the file that it "
      "leads to, or copy it into the folder"
    )


def _open_file(path: str) -> int:
  """Descriptor of a regular file; anything else could block or never end."""
  try:
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
      kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
      raise ValueError(f"{path} is {kind}, not a file of weights; remove it")
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
  except FileNotFoundError as error:
    raise ValueError(
      f"{path} is a link to a file that is not there; fetch it again"
      if os.path.islink(path)
      else f"{path} does not exist"
    ) from error
  except OSError as error:
    raise ValueError(
      f"{path} cannot be read ({error.strerror}); check its permissions, or "
      "fetch it again"
    ) from error


def parse(text: bytes, path: str) -> Any:
  """JSON whose objects have no key twice."""

  def unique(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
      seen: set[str] = set()
      twice = next(k for k, _ in pairs if k in seen or seen.add(k))
      raise ValueError(f"the key {show(twice)} is there twice")
    return found

  try:
    return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f"{path} holds no sound JSON ({show(str(error))}); fetch it again"
    ) from error


def check_name(name: str, path: str) -> None:
  # Control characters, and halves of UTF-16 pairs, which no file can hold.
  if not name or re.search("[\x00-\x1f\x7f\ud800-\udfff]", name):
    raise ValueError(
      f"{path}: {show(ascii(name))} is no name of a tensor; fetch the file "
      "again, or write it anew with proper names"
    )


def _header(file: int, path: str) -> dict[str, Tensor]:
  """Name -> tensor, of a file whose every byte is accounted for."""
  size = os.fstat(file).st_size
  start = os.pread(file, 32, 0)
  length = int.from_bytes(start[:8], "little")
  reason = None
  if size < 10:
    reason = f"it has {size} bytes"
  elif length > TEXT_LIMIT:
    reason = f"its header claims {length} bytes, more than {TEXT_LIMIT}"
  elif length > size - 8:
    reason = (
      f"its header of {length} bytes is cut short: the file has {size} bytes"
    )
  elif start[8:9] != b"{":
    reason = "its header does not begin with {"
  if reason:
    # Only then are the first bytes no length: a header of 640 bytes begins as
    # a pickle does.
    kinds = _NOT_WEIGHTS.items() if length > TEXT_LIMIT else ()
    kind = next((k for magic, k in kinds if start.startswith(magic)), None)
    raise ValueError(
      f"{path} is no readable safetensors file"
      + (f" but {kind}: " if kind else ": ")
      + f"{reason}; fetch it again, or convert it"
    )
  entries = parse(os.pread(file, length, 8), path)
  metadata = entries.pop("__metadata__", None)
  if not isinstance(metadata, dict | None):
    raise ValueError(f"{path}: __metadata__ is no object; fetch the file again")
  tensors, places = {}, []
  for name, entry in entries.items():
    check_name(name, path)
    try:
      dtype, shape, begin, end = _tensor(entry)
    except ValueError as error:
      raise ValueError(
        f"{path}: tensor {show(name)}: {error}; fetch the file again, or write "
        "it anew with safetensors"
      ) from None
    tensors[name] = Tensor(dtype, shape, 8 + length + begin)
    places.append((begin, end, name))
  _check_places(places, size - 8 - length, path)
  return tensors


def _tensor(entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
  """Dtype, shape, first and last byte of a header's entry."""
  if not isinstance(entry, Mapping):
    raise ValueError(f"its entry is {show(repr(entry))}, not an object")
  if unknown := entry.keys() ^ {"dtype", "shape", "data_offsets"}:
    raise ValueError(
      f"its entry lacks or should not have {show(', '.join(sorted(unknown)))}"
    )
  name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
  dtype = DTYPES.get(name) if isinstance(name, str) else None
  if dtype is None:
    raise ValueError(
      f"its dtype is {show(repr(name))}; expected one of {', '.join(DTYPES)}"
    )
  if not _are_counts(shape) or math.prod(shape) >= 2**60:
    raise ValueError(f"its shape is {show(repr(shape))}")
  if not _are_counts(offsets) or len(offsets) != 2:
    raise ValueError(f"its data_offsets are {show(repr(offsets))}")
  begin, end = offsets
  wanted = math.prod(shape) * dtype.itemsize
  if end - begin != wanted:
    raise ValueError(
      f"its data_offsets {offsets} span {end - begin} bytes, but {name} "
      f"{shape} takes {wanted}"
    )
  return dtype, tuple(shape), begin, end


def _are_counts(values: Any) -> bool:
  return (
    isinstance(values, list)
    and len(values) <= 32
    and all(type(v) is int and 0 <= v < 2**63 for v in values)
  )


def _check_places(
  places: list[tuple[int, int, str]], size: int, path: str
) -> None:
  """Tensors follow each other without a gap and fill the file."""
  end, before = 0, "the header"
  for begin, stop, name in sorted(places):
    if begin != end:
      what = "overlaps" if begin < end else "leaves a hole after"
      raise ValueError(
        f"{path}: tensor {show(name)} {what} {show(before)} (its data begins "
        f"at {begin}, expected {end}); fetch the file again"
      )
    if stop > size:
      raise ValueError(
        f"{path} is no readable safetensors file: it is cut short in tensor "
        f"{show(name)}, {stop - size} bytes after its end; fetch it again"
      )
    end, before = stop, name
  if end != size:
    raise ValueError(
      f"{path}: {size - end} bytes follow {show(before)}, the last tensor; "
      "fetch the file again"
    )
