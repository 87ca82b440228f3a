# SPDX-License-Identifier: Apache-2.0
"""Rows whose labels are the tokens themselves; no jax, as workers demand."""

import sys
import time

import numpy as np

VOCAB, LENGTH = 16, 8


class Source:
  """Row i depends on i alone.

  After `slow_after` reads each takes a second; `pause` seconds at all times.
  """

  def __init__(self, rows: int, slow_after: int = 0, pause: float = 0.0):
    self._rows, self._slow_after, self._reads = rows, slow_after, 0
    self._pause = pause

  def __len__(self):
    return self._rows

  def __getitem__(self, index):
    self._reads += 1
    if self._slow_after and self._reads > self._slow_after:
      time.sleep(1.0)
    time.sleep(self._pause)
    rng = np.random.default_rng([7, int(index)])
    tokens = rng.integers(0, VOCAB, LENGTH, dtype=np.int32)
    weight = rng.integers(0, 2, LENGTH).astype(np.float32)
    weight[0] = 1.0
    return {
      "tokens": tokens,
      "segments": np.ones(LENGTH, np.int32),
      "labels": tokens,
      "loss_weight": weight,
      "index": np.int32(index),
      "has_jax": np.bool_("jax" in sys.modules),
    }


def make(config, split):
  data = config.data
  return Source(
    data.rows[split], data.get("slow_after", 0), data.get("pause", 0.0)
  )
