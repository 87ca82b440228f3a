# SPDX-License-Identifier: Apache-2.0
"""source -> shuffle -> repeat -> this host's share -> batches, with grain.

A source is random access: example i depends on i alone. So the order of
batches depends on the seed only, not on threads, processes or where a run was
interrupted, and the iterator's state is one number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
  process_index: int = 0,
  process_count: int = 1,
) -> tuple[grain.IterDataset, dict[str, tuple[tuple[int, ...], np.dtype]]]:
  """Endless batches for this host, and the spec of one example.

  Args:
    config: the whole config; its `data` section is read here.
    batch_size: examples over all hosts.
    process_index: this host.
    process_count: how many hosts share the batch.
  """
  if batch_size % process_count:
    raise ValueError(
      f"config.batch_size={batch_size} is not divisible by the number of "
      f"hosts, {process_count}"
    )
  data = config.data
  source = workers.make(config, data.split)
  if len(source) < process_count:
    raise ValueError(
      f"config.data.source={data.source!r} has {len(source)} example(s) in "
      f"split {data.split!r}, too few for {process_count} host(s)"
    )
  first = spec(source[0])
  if data.workers:
    source = workers.Workers(config, data.split, data.workers)
  dataset = grain.MapDataset.source(source).seed(data.seed)
  if data.shuffle:
    dataset = dataset.shuffle()
  dataset = dataset.repeat()[process_index::process_count]
  dataset = dataset.map(Check(first)).batch(batch_size // process_count)
  # Each thread makes a whole batch, `prefetch` of them ahead of the device.
  options = grain.ReadOptions(
    num_threads=max(data.threads, data.workers),
    prefetch_buffer_size=max(data.prefetch, data.threads, data.workers),
  )
  return dataset.to_iter_dataset(options), first
