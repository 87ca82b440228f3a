# SPDX-License-Identifier: Apache-2.0
"""Parameters that JAX code published: .npz files, and checkpoints of Orbax.

A tensor's name is its path in the tree, joined by "/": the name in the .npz
file (`img/Transformer/encoder_norm/scale`), or the keys in Orbax's tree. A last
key "value" that all have (of NNX) is left out. A name with "/" tells a key
table that a kernel is (in, out) already.
"""

from __future__ import annotations

import json
import math
import os
import threading
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_METADATA = "_METADATA"


class Tensor(NamedTuple):
  dtype: np.dtype
  shape: tuple[int, ...]
  where: Any


class Npz:
  """An .npz file; its arrays are read whole, one at a time."""

  def __init__(self, path: str):
    self.path = path
    self._lock = threading.Lock()
    self._last: tuple[str, np.ndarray] | None = None
    self._zip = None
    if not os.path.isfile(path):  # a pipe would block
      raise ValueError(f"{path} is no file; give an .npz file")
    try:
      self._zip = zipfile.ZipFile(path)
      members = self._zip.infolist()
      self.tensors = dict(map(self._tensor, members))
      if len(self.tensors) < len(members):
        raise zipfile.BadZipFile("it holds a name twice")
    except (zipfile.BadZipFile, OSError, EOFError) as error:
      self.close()
      raise ValueError(
        f"{path} is no readable .npz file ({error}); fetch it again"
      ) from error
    except BaseException:
      self.close()
      raise

  def _tensor(self, info: zipfile.ZipInfo) -> tuple[str, Tensor]:
    name = info.filename
    try:
      if not name.endswith(".npy"):
        raise ValueError("is no array")
      if info.file_size > 1100 * info.compress_size + 100:
        # Deflate reaches a ratio of 1032.
        raise ValueError(
          f"cannot unpack from {info.compress_size} bytes to {info.file_size}"
        )
      with self._zip.open(info) as file:
        shape, _, dtype = _array_header(file)
        start = file.tell()
      if dtype.hasobject:
        raise ValueError("holds pickled objects, which can run code when read")
      if math.prod(shape) * dtype.itemsize != info.file_size - start:
        raise ValueError(
          f"of {dtype} {list(shape)} has {info.file_size - start} bytes"
        )
    except (ValueError, RuntimeError, NotImplementedError) as error:
      raise ValueError(
        f"{self.path}: {name[:200]!r} {error}; fetch the file again, or write "
        "it anew with numpy.savez"
      ) from error
    if dtype.kind == "V" and dtype.itemsize == 2:  # how NumPy writes bfloat16
      dtype = np.dtype(ml_dtypes.bfloat16)
    return name.removesuffix(".npy"), Tensor(dtype, tuple(shape), info)

  def slice(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    with self._lock:
      if self._last is None or self._last[0] != name:
        self._last = (name, self._whole(name))
      return self._last[1][index]

  def _whole(self, name):
    tensor = self.tensors[name]
    try:
      with self._zip.open(tensor.where) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
      raise ValueError(
        f"{self.path}: {name!r} is damaged ({error}); fetch the file again"
      ) from error
    return array.view(tensor.dtype)

  def close(self) -> None:
    self._last = None
    if self._zip is not None:
      self._zip.close()


def _array_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
  """Shape, is_fortran, dtype of an .npy stream."""
  version = np.lib.format.read_magic(file)
  read = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
  }.get(version)
  if read is None:
    raise ValueError(f"is of the unknown .npy version {version}")
  return read(file)


def orbax_folder(folder: str) -> str | None:
  """Where in a folder a tree of Orbax lies: itself, or its item `params`."""
  for place in (folder, os.path.join(folder, "params")):
    if os.path.isfile(os.path.join(place, _METADATA)):
      return place
  return None


class Orbax:
  """Arrays of one item that Orbax wrote; parts of them are read."""

  def __init__(self, path: str):
    import tensorstore

    self.path = os.path.abspath(path)
    names = self._names()
    if names and all(keys[-1] == "value" for keys in names):
      names = {keys[:-1]: spec for keys, spec in names.items()}
    self.tensors = {}
    for keys, spec in names.items():
      name = "/".join(keys)
      try:
        store = tensorstore.open(spec, open=True, read=True).result()
      except ValueError as error:
        raise ValueError(
          f"{path}: {name!r} cannot be opened ({str(error)[:200]}); copy the "
          "checkpoint again"
        ) from error
      dtype = np.dtype(store.dtype.numpy_dtype)
      self.tensors[name] = Tensor(dtype, tuple(store.shape), store)

  def _names(self):
    """Keys of a leaf -> what tensorstore opens it by."""
    path = os.path.join(self.path, _METADATA)
    try:
      if os.path.getsize(path) > 16 * 2**20:
        raise ValueError("it is too large")
      with open(path, encoding="utf-8") as file:
        metadata = json.load(file)
      leaves = [
        tuple(str(key["key"]) for key in leaf["key_metadata"])
        for leaf in metadata["tree_metadata"].values()
        if "rray" in leaf["value_metadata"]["value_type"]
      ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
      raise ValueError(
        f"{path} is no readable metadata of Orbax ({error!r}); copy the "
        "checkpoint again"
      ) from error
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    root = {"driver": "file", "path": self.path + "/"}
    is_one_store = os.path.exists(os.path.join(self.path, "manifest.ocdbt"))

    def spec(keys):
      name = ".".join(keys)
      store = {**root, "path": f"{self.path}/{name}/"}
      if is_one_store:
        store = {"driver": "ocdbt", "base": root, "path": f"{name}/"}
      return {"driver": driver, "kvstore": store}

    return {keys: spec(keys) for keys in leaves}

  def slice(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    store = self.tensors[name].where
    try:
      return np.asarray(store[index].read().result())
    except ValueError as error:
      raise ValueError(
        f"{self.path}: {name!r} is damaged ({str(error)[:200]}); copy the "
        "checkpoint again"
      ) from error

  def close(self) -> None:
    """Files are open only while they are read."""
