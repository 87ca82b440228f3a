# SPDX-License-Identifier: Apache-2.0
"""Array annotations used across the library."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

if TYPE_CHECKING:
  import jax

  Array = jax.Array | np.ndarray
else:
  try:
    import sys

    # Data workers must not import jax: the alias widens only once jax is there.
    Array = sys.modules["jax"].Array | np.ndarray
  except KeyError:
    Array = np.ndarray

Batch = dict[str, Array]

__all__ = ["Array", "Batch", "Bool", "Float", "Int"]
