# SPDX-License-Identifier: Apache-2.0
"""Files of what VGGT makes of frames, found by the frames themselves.

A file's name is a hash of the frames' pixels, so that another choice of frames,
or another size, never gets the tokens of these. Inside is a hash of the tokens.
NumPy only; the `cache` command writes them.
"""

from __future__ import annotations

import hashlib
import pathlib

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from spatial_jax.types import Array, UInt8


def path(folder: str, frames: UInt8[Array, "F height width 3"]) -> pathlib.Path:
  """Where the tokens of these frames are."""
  return pathlib.Path(folder) / f"{_hash(frames)}.safetensors"


def write(
  folder: str, frames: UInt8[Array, "F height width 3"], tokens: Array
) -> pathlib.Path:
  """Keeps tokens [F P E]; a file is there whole or not at all."""
  file = path(folder, frames)
  file.parent.mkdir(parents=True, exist_ok=True)
  tokens = np.ascontiguousarray(tokens)
  part = file.with_suffix(".part")
  save_file({"geometry": tokens}, part, {"sha256": _hash(tokens)})
  part.rename(file)
  return file


def read(folder: str, frames: UInt8[Array, "F height width 3"]) -> np.ndarray:
  """Tokens [F P E] of these frames.

  Raises:
    ValueError: they aren't there, or the file is damaged.
  """
  file = path(folder, frames)
  if not file.exists():
    raise ValueError(
      f"no tokens of these frames are in {folder}; run the cache command with "
      "this recipe, and again whenever frames or their size change"
    )
  try:
    with safe_open(file, "numpy") as handle:
      tokens = handle.get_tensor("geometry")
      wanted = (handle.metadata() or {}).get("sha256")
  except SafetensorError as error:
    raise ValueError(f"{file} is damaged ({error}); remove it") from error
  if _hash(tokens) != wanted:
    raise ValueError(f"{file} is damaged: its hash differs; remove it")
  return tokens


def _hash(array: np.ndarray) -> str:
  digest = hashlib.sha256(f"{array.shape} {array.dtype}".encode())
  digest.update(np.ascontiguousarray(array).view(np.uint8))
  return digest.hexdigest()
