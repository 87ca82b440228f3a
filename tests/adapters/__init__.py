# SPDX-License-Identifier: Apache-2.0
"""What computes a recorded case with the library, a module a system.

Each module's ADAPTERS maps (system, entry) to a function of the case's folder
and config. It returns two dictionaries of arrays: what the library gives, and
what the reference gave. Adapters hold no numbers of a case: cases of other
sizes run as well. A module's TOLERANCES, where it has some, maps the same pairs
to (regex of an output, largest absolute difference) of outputs that, as their
case says, can't meet the usual tolerance.
"""

from tests.adapters import (
  cambrian,
  dual_mechanisms,
  echogen,
  llava_3d,
  spatial_forcing,
  spatial_mllm,
  stts,
  vggt,
)

ADAPTERS = {
  **cambrian.ADAPTERS,
  **dual_mechanisms.ADAPTERS,
  **echogen.ADAPTERS,
  **llava_3d.ADAPTERS,
  **spatial_forcing.ADAPTERS,
  **spatial_mllm.ADAPTERS,
  **stts.ADAPTERS,
  **vggt.ADAPTERS,
}
TOLERANCES = {
  **dual_mechanisms.TOLERANCES,
  **llava_3d.TOLERANCES,
  **stts.TOLERANCES,
  **vggt.TOLERANCES,
}
