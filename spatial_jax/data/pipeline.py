# SPDX-License-Identifier: Apache-2.0
"""source -> shuffle -> repeat -> this host's share -> batches, with grain.

A source is random access: example i depends on i alone. So batches depend on
the seed only, not on threads, hosts or where a run was interrupted, and the
iterator's state is one number, the same for all hosts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from spatial_jax.data import workers

Example = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Check:
  """Asserts that each example has the names, shapes and dtypes of the first."""

  spec: Mapping[str, tuple[tuple[int, ...], np.dtype]]

  def __call__(self, example: Example) -> Example:
    got = spec(example)
    if got != self.spec:
      wrong = [
        f"{name}: got {got.get(name, 'nothing')}, "
        f"expected {self.spec.get(name, 'nothing')}"
        for name in sorted({*got, *self.spec})
        if got.get(name) != self.spec.get(name)
      ]
      raise ValueError(
        "an example does not have the shapes of the source's first one "
        "(pad it to a fixed size):\n  " + "\n  ".join(wrong)
      )
    return example


class Share(grain.MapDataset):
  """Some rows of each batch of another dataset, in turn."""

  def __init__(
    self, parent: grain.MapDataset, batch_size: int, rows: tuple[int, ...]
  ):
    super().__init__(parent)
    self._batch_size, self._rows = batch_size, rows

  def __len__(self) -> int:
    return len(self._parent) // self._batch_size * len(self._rows)

  def __getitem__(self, index: int) -> Example:
    batch, row = divmod(index, len(self._rows))
    return self._parent[batch * self._batch_size + self._rows[row]]


def spec(example: Example) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  """Shape and dtype of each array of an example."""
  return {
    name: (np.shape(x), np.asarray(x).dtype) for name, x in example.items()
  }


def example(config: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  """Spec of one example of config.data, without a pipeline."""
  return spec(workers.make(config, config.data.split)[0])


def make(
  config: Any,
  batch_size: int,
  *,
  rows: Sequence[int] | None = None,
) -> tuple[grain.IterDataset, dict[str, tuple[tuple[int, ...], np.dtype]]]:
  """Endless batches for this host, and the spec of one example.

  Args:
    config: the whole config; its `data` section is read here.
    batch_size: examples over all hosts.
    rows: of each batch, those that this host makes, see `sharding.host_rows`;
      by default all.
  """
  data = config.data
  source = workers.make(config, data.split)
  first = spec(source[0])
  if data.workers:
    source = workers.Workers(config, data.split, data.workers)
  dataset = grain.MapDataset.source(source).seed(data.seed)
  if data.shuffle:
    dataset = dataset.shuffle()
  rows = tuple(range(batch_size) if rows is None else rows)
  dataset = Share(dataset.repeat(), batch_size, rows)
  dataset = dataset.map(Check(first)).batch(len(rows))
  # Each thread makes a whole batch, `prefetch` of them ahead of the device.
  options = grain.ReadOptions(
    num_threads=max(data.threads, data.workers),
    prefetch_buffer_size=max(data.prefetch, data.threads, data.workers),
  )
  return dataset.to_iter_dataset(options), first
