# SPDX-License-Identifier: Apache-2.0
"""What a side of a row gives the harness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Program(NamedTuple):
  """Something to time, warm, and what it computes."""

  run: Callable[[], Any]  # once; returns when the device has finished
  outputs: dict[str, np.ndarray]  # to be compared with the other side's
  first: float  # seconds of the first call, in which it is compiled
  flops: float = 0.0  # of one run
  units: float = 1.0  # tokens, frames ... of one run
  # Figures beside the time, such as fitted exponents.
  notes: dict[str, float] = {}  # noqa: RUF012 (never written)
