# SPDX-License-Identifier: Apache-2.0
"""From published tensors to parameters: axes, layers, parts of a mesh.

tensors (out, in, ...) of L layers -> kernel (L, ..., in, out), of which each
device's part is filled on its own, in pieces that fit a cache.
"""

from __future__ import annotations

import functools
import math
import mmap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

_PIECE = 2 * 2**20  # bytes read at once

# First and last + 1 of each axis.
Box = tuple[tuple[int, int], ...]


class Custom(NamedTuple):
  """Functions tensor -> array of one layer, and back."""

  load: Callable[[np.ndarray], np.ndarray]
  save: Callable[[np.ndarray], np.ndarray]


class Entry(NamedTuple):
  """One parameter and the tensors that fill it."""

  path: str
  names: tuple[str, ...]
  stacked: bool
  custom: Custom | None
  start: int | None = None  # first row in a tensor that several share


def is_moved(name: str, path: str) -> bool:
  """Whether (out, in, ...) of the tensor becomes (..., in, out)."""
  # Names of JAX trees hold "/"; their kernels are (in, out) already.
  return path.rsplit("/", 1)[-1] == "kernel" and "/" not in name


def fits(
  stored: Sequence[int],
  name: str,
  path: str,
  layer: Sequence[int],
  custom: Custom | None,
) -> bool:
  """Whether a tensor's shape fills that of a parameter's layer."""
  stored, layer = tuple(stored), tuple(layer)
  if custom is None:
    if is_moved(name, path) and len(stored) >= 2:
      stored = (*stored[2:], stored[1], stored[0])
    if len(stored) == len(layer):
      return stored == layer
  return math.prod(stored) == math.prod(layer)


def box(index: Sequence[slice], shape: Sequence[int]) -> Box:
  """Bounds of slices of step 1."""
  return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def fill(
  reader: Any,
  entry: Entry,
  shape: Sequence[int],
  dtype: Any,
  boxes: Sequence[Box],
  pool: ThreadPoolExecutor,
  workers: int,
) -> list[np.ndarray]:
  """The boxes of a parameter as arrays of their own.

  Boxes of one host that lie side by side are read together, so that narrow
  columns on many devices cost one pass over the file.

  Args:
    workers: threads of the pool.
  """
  parts = [
    (wanted, _empty([stop - start for start, stop in wanted], dtype))
    for wanted in boxes
  ]
  layer = tuple(shape[1:] if entry.stacked else shape)
  stored = tuple(reader.shapes[entry.names[0]])
  axes = _axes(entry, stored, layer)
  hull = tuple(
    (min(b[0] for b in bounds), max(b[1] for b in bounds))
    for bounds in zip(*boxes, strict=True)
  )
  # What must be read whole is read once for all.
  is_dense = _volume(hull) <= 2 * sum(map(_volume, boxes))
  groups = [(hull, parts)]
  if not is_dense and axes is not None:
    groups = [(part[0], [part]) for part in parts]
  todo = []
  for outer, group in groups:
    numbers = range(*outer[0]) if entry.stacked else (None,)
    inner = outer[1:] if entry.stacked else outer
    if axes is None:
      pieces = [tuple((0, n) for n in layer)]
    else:
      width = reader.dtypes[entry.names[0]].itemsize
      pieces = list(_pieces(inner, axes, width))
    todo += [(n, piece, group) for n in numbers for piece in pieces]
  one = functools.partial(_deliver, reader, entry, layer, axes)
  # A share each, not piece by piece: on a busy machine every wake-up waits.
  shares = [todo[i::workers] for i in range(workers)]
  tasks = [pool.submit(_all, one, share) for share in shares if share]
  for task in tasks:
    task.result()
  return [array for _, array in parts]


def to_tensor(
  array: np.ndarray, name: str, path: str, custom: Custom | None, dtype: Any
) -> np.ndarray:
  """One layer of a parameter as it is published; the inverse of `fill`."""
  if custom is not None:
    array = custom.save(array)
  elif is_moved(name, path):
    array = np.moveaxis(array, (-2, -1), (1, 0))
  out = np.empty(array.shape, dtype or array.dtype)
  _copy(out, array)
  return out


def _volume(of: Box) -> int:
  return math.prod(stop - start for start, stop in of)


def _empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
  """Array at an address that jax on CPU takes over without a copy.

  In plain pages, taken at once. NumPy asks for huge ones, which the kernel may
  have to free and join first, at several times the cost of reading the file.
  """
  count = math.prod(shape)
  size = count * np.dtype(dtype).itemsize
  if size < _PIECE:
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
  populate = getattr(mmap, "MAP_POPULATE", 0)  # Linux
  pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | populate)
  return np.frombuffer(pages, dtype, count).reshape(shape)


def _axes(entry, stored, layer):
  """Parameter's axis of each of the tensor's; None where they don't pair."""
  count = len(stored)
  if entry.custom is not None or count != len(layer):
    return None
  if is_moved(entry.names[0], entry.path) and count >= 2:
    return (count - 1, count - 2, *range(count - 2))
  return tuple(range(count))


def _pieces(outer: Box, axes: Sequence[int], width: int):
  """Boxes of a few rows of the tensor each."""
  if not axes:
    yield outer
    return
  split = axes[0]
  start, stop = outer[split]
  row = _volume(outer) // max(stop - start, 1) * width
  step = max(_PIECE // max(row, 1), 1)
  for first in range(start, stop, step):
    last = min(first + step, stop)
    yield (*outer[:split], (first, last), *outer[split + 1 :])


def _all(function, arguments):
  for each in arguments:
    function(*each)


def _deliver(reader, entry, layer, axes, number, piece, parts):
  """Reads a piece of a layer and copies it into the parts that need it."""
  block = _block(reader, entry, layer, axes, entry.names[number or 0], piece)
  for wanted, array in parts:
    if number is not None:
      start, stop = wanted[0]
      if not start <= number < stop:
        continue
      wanted, array = wanted[1:], array[number - start]
    both = [
      (max(a, c), min(b, d))
      for (a, b), (c, d) in zip(piece, wanted, strict=True)
    ]
    if all(a < b for a, b in both):
      _copy(array[_within(both, wanted)], block[_within(both, piece)])


def _within(both, outer):
  """Index of a box in an array that holds a larger one."""
  return (
    *(slice(a - c, b - c) for (a, b), (c, _) in zip(both, outer, strict=True)),
    ...,  # a scalar would come out as no array
  )


def _block(reader, entry, layer, axes, name, piece):
  """A piece of a layer, in the parameter's axes."""
  if axes is None:
    whole = reader.slice(name)
    if entry.custom is not None:
      whole = entry.custom.load(whole)
    elif is_moved(name, entry.path) and whole.ndim >= 2:
      whole = np.moveaxis(whole, (1, 0), (-2, -1))
    return whole.reshape(layer)
  index = [slice(*piece[axis]) for axis in axes]
  if entry.start:
    rows = index[0]
    index[0] = slice(rows.start + entry.start, rows.stop + entry.start)
  block = reader.slice(name, tuple(index))
  return block.transpose(np.argsort(axes)) if axes else block


def _copy(out: np.ndarray, array: np.ndarray) -> None:
  """out[...] = array, converted."""
  if array.dtype == out.dtype:
    # Plain numbers: NumPy moves those of ml_dtypes one by one.
    bits = np.dtype(f"u{out.dtype.itemsize}")
    out, array = out.view(bits), array.view(bits)
  width = out.dtype.itemsize
  is_flipped = array.ndim == 2 and array.strides[0] == array.dtype.itemsize
  if is_flipped and width <= 8 and out.strides[-1] == width:
    _transpose(out, array.T)
  else:
    np.copyto(out, array, casting="unsafe")


def _transpose(out: np.ndarray, array: np.ndarray, rows: int = 128) -> None:
  """out[...] = array.T, several times as fast as NumPy.

  Numbers of a column are packed to words of 16 bytes first, so that a fraction
  as many are moved far.
  """
  width = out.dtype.itemsize
  number, word = np.dtype(f"u{width}"), np.dtype(np.complex128)
  count = word.itemsize // width
  end = len(array) - len(array) % count
  for first in range(0, end, rows):
    block = array[first : min(first + rows, end)]
    block = block.astype(out.dtype, copy=False).view(number)
    packed = np.empty((len(block) // count, block.shape[1], count), number)
    for i in range(count):
      packed[:, :, i] = block[i::count]
    into = out[:, first : first + len(block)]
    into.view(word)[...] = packed.view(word)[..., 0].T
  np.copyto(out[:, end:], array[end:].T, casting="unsafe")
