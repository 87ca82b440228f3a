# SPDX-License-Identifier: Apache-2.0
"""Finds the folder of a Hugging Face hub id, in its cache or by download."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

_ID = r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?"
_WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


def locate(source: str) -> str:
  """Path of a source: what exists is itself, else it is a hub id.

  Raises FileNotFoundError where it is neither.

  Args:
    source: path, or org/name[@revision].
  """
  if os.path.lexists(source):
    return _snapshot(source)
  match = re.fullmatch(_ID, source)
  if not match or source.startswith((".", "~")):
    raise FileNotFoundError(
      f"checkpoint {source} does not exist; give a .safetensors file, a folder "
      "that holds some, or a hub id (org/name)"
    )
  return _download(source, match[1], match[2])


def _snapshot(folder: str) -> str:
  """A model's folder in the hub's cache stands for its main revision."""
  snapshots = os.path.join(folder, "snapshots")
  if not os.path.isdir(snapshots):
    return folder
  revisions = sorted(os.listdir(snapshots))
  main = os.path.join(folder, "refs", "main")
  if os.path.isfile(main):
    with open(main, encoding="utf-8", errors="replace") as file:
      wanted = file.read(200).strip()
    revisions = [name for name in revisions if name == wanted]
  if len(revisions) != 1:
    raise FileNotFoundError(
      f"{folder} is a cached model without its main revision; give one of "
      f"the folders in {snapshots}"
    )
  return os.path.join(snapshots, revisions[0])


def headers(source: str) -> dict[str, tuple[str, tuple[int, ...]]] | None:
  """Tensor -> (dtype, shape) of a hub id, without its weights.

  None for a path.
  """
  match = re.fullmatch(_ID, source)
  if os.path.lexists(source) or not match or source.startswith((".", "~")):
    return None
  found = _ask(
    source,
    match[2],
    lambda hub: hub.get_safetensors_metadata(match[1], revision=match[2]),
  )
  return {
    name: (info.dtype, tuple(info.shape))
    for file in found.files_metadata.values()
    for name, info in file.tensors.items()
  }


def _download(source: str, repository: str, revision: str | None) -> str:
  return _ask(
    source,
    revision,
    lambda hub: hub.snapshot_download(
      repository, revision=revision, allow_patterns=list(_WANTED)
    ),
  )


def _ask(source: str, revision: str | None, question: Callable) -> Any:
  """What the hub answers; FileNotFoundError says why it doesn't.

  Args:
    question: called with the package huggingface_hub.
  """
  unknown = f"there is no folder {source} here; as a hub id, "
  try:
    import huggingface_hub
  except ImportError as error:
    raise FileNotFoundError(
      f"{unknown}it needs the package huggingface_hub (pip install "
      "huggingface_hub), or download it elsewhere and give the folder"
    ) from error
  try:
    return question(huggingface_hub)
  except Exception as error:
    # Its errors have moved between modules and releases; their names have not.
    names = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in names:
      why = "its terms must be accepted on its page first; then `hf auth login`"
    elif "RevisionNotFoundError" in names:
      why = f"it has no revision {revision}; leave out @{revision}, or check it"
    elif "NotASafetensorsRepoError" in names:
      why = (
        "the hub has no safetensors files of such a model: check its spelling"
      )
    elif "RepositoryNotFoundError" in names:
      why = "the hub has no such model, or it is private: check the spelling"
    else:
      why = (
        "the hub cannot be reached and the model is not in the local cache "
        f"({_first_line(error)}); download it elsewhere and give the folder"
      )
    raise FileNotFoundError(f"{unknown}{why}") from error


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return (lines[0] if lines else type(error).__name__)[:200]
