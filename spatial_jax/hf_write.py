# SPDX-License-Identifier: Apache-2.0
"""Writes safetensors folders tensor by tensor, with what else a model needs."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from spatial_jax.hf_files import DTYPES, INDEX

_CODES = {dtype: code for code, dtype in DTYPES.items()}
# Beside the weights: sizes, tokenizer, image processor, chat template.
_COMPANIONS = (".json", ".txt", ".model", ".jinja", ".tiktoken")


class Output(NamedTuple):
  """A tensor whose numbers are made when it is written."""

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  make: Callable[[], np.ndarray]

  @property
  def size(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def write(folder: str, outputs: Iterable[Output], shard_bytes: int) -> None:
  """One file, or several with an index where they would be larger.

  Raises FileExistsError when the folder holds weights that would not be
  overwritten: readers would mix them with these.
  """
  shards: list[list[Output]] = [[]]
  size = 0
  for output in outputs:
    if size + output.size > shard_bytes and shards[-1]:
      shards.append([])
      size = 0
    shards[-1].append(output)
    size += output.size
  count = len(shards)
  files = ["model.safetensors"]
  if count > 1:
    numbers = range(1, count + 1)
    files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in numbers]
  os.makedirs(folder, exist_ok=True)
  mine = {*files, INDEX} if count > 1 else set(files)
  weights = (".safetensors", ".safetensors.index.json")
  others = [n for n in sorted(os.listdir(folder)) if n.endswith(weights)]
  if others := [name for name in others if name not in mine]:
    raise FileExistsError(
      f"{folder} already holds other weights ({others[0]}); remove them or "
      "choose another folder"
    )
  where = {}
  for file, shard in zip(files, shards, strict=True):
    # Readers never see half a file.
    partial = os.path.join(folder, file + ".partial")
    _write_file(partial, shard)
    os.replace(partial, os.path.join(folder, file))
    where.update((output.name, file) for output in shard)
  if count > 1:
    total = sum(output.size for shard in shards for output in shard)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    with open(os.path.join(folder, INDEX), "w", encoding="utf-8") as stream:
      json.dump(index, stream, indent=1)


def _write_file(path: str, outputs: Sequence[Output]) -> None:
  # Wide numbers first: all lie at multiples of their size.
  outputs = sorted(outputs, key=lambda output: -output.dtype.itemsize)
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for output in outputs:
    begin, end = end, end + output.size
    header[output.name] = {
      "dtype": _CODES[output.dtype],
      "shape": list(output.shape),
      "data_offsets": [begin, end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with open(path, "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for output in outputs:
      array = output.make()
      if array.shape != output.shape or array.dtype != output.dtype:
        raise ValueError(
          f"{output.name} was announced as {output.dtype}{output.shape} but is "
          f"{array.dtype}{array.shape}; make the functions of its table row "
          "depend on shapes alone"
        )
      file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def copy_companions(
  like: str, folder: str, dtype: str | None = None
) -> list[str]:
  """Copies what stands beside the weights of a published model.

  Args:
    like: folder of the model.
    dtype: written into config.json, where it names one.

  Returns the names of the files.
  """
  names = [
    name
    for name in sorted(os.listdir(like))
    if name.endswith(_COMPANIONS) and not name.endswith(".index.json")
  ]
  if not names:
    raise FileNotFoundError(
      f"{like} has neither config.json nor tokenizer files; give the folder of "
      "the published model"
    )
  for name in names:
    shutil.copyfile(os.path.join(like, name), os.path.join(folder, name))
  path = os.path.join(folder, "config.json")
  if dtype and "config.json" in names:
    with open(path, encoding="utf-8") as file:
      config = _with_dtype(json.load(file), dtype)
    with open(path, "w", encoding="utf-8") as file:
      json.dump(config, file, indent=2)
      file.write("\n")
  return names


def _with_dtype(config: Any, dtype: str) -> Any:
  if not isinstance(config, dict):
    return config
  return {
    key: dtype
    if key in ("dtype", "torch_dtype") and isinstance(value, str)
    else _with_dtype(value, dtype)
    for key, value in config.items()
  }
