# SPDX-License-Identifier: Apache-2.0
"""Array annotations used across the library."""

import sys
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

# Data workers must start without jax: the alias names jax.Array only where
# jax is there already. Annotations are checked in tests, which import it first.
if TYPE_CHECKING or "jax" in sys.modules:
  import jax

  Array = jax.Array | np.ndarray
else:
  Array = np.ndarray

Batch = dict[str, Array]

__all__ = ["Array", "Batch", "Bool", "Float", "Int", "UInt8"]
