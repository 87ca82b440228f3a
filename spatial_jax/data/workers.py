# SPDX-License-Identifier: Apache-2.0
"""Processes that load examples of a source.

They import this file and the source's module only: neither jax nor grain,
whose import costs seconds and hundreds of megabytes in every process.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import multiprocessing
import os
import signal
import threading
from typing import Any

_source: Any = None


def make(config: Any, split: str) -> Any:
  """The source that config.data.source names: module.make(config, split)."""
  name = config.data.source
  try:
    module = importlib.import_module(name)
  except (ModuleNotFoundError, ValueError) as error:
    raise ValueError(
      f"config.data.source={name!r} cannot be imported ({error}); "
      "expected the import path of a module with make(config, split)"
    ) from error
  return module.make(config, split)


def _start(config: Any, split: str) -> None:
  global _source
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
  parent = multiprocessing.parent_process()

  def follow():
    parent.join()  # a parent killed with -9 takes its workers along
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()
  _source = make(config, split)


def _load(index: int) -> dict[str, Any]:
  return _source[index]


class Workers:
  """A source whose examples are made by other processes."""

  def __init__(self, config: Any, split: str, count: int):
    self._length = len(make(config, split))
    self._pool = concurrent.futures.ProcessPoolExecutor(
      count,
      # A forked child would inherit the locks of jax's threads.
      mp_context=multiprocessing.get_context("spawn"),
      initializer=_start,
      initargs=(config, split),
    )

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._pool.submit(_load, int(index)).result()

  def close(self) -> None:
    self._pool.shutdown(cancel_futures=True)
