# SPDX-License-Identifier: Apache-2.0
"""Chips, their published figures, and topologies that aren't here."""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import jax

GIB = 2**30


class Chip(NamedTuple):
  """One jax device; of TPU7x, which has two in a chip, one of them."""

  peak: float  # dense bfloat16, FLOP/s
  hbm: float  # bytes that a program may use
  bandwidth: float  # of the HBM, bytes/s
  link: float  # bytes/s of a link to a neighbour, one way; GPU: of all links
  axes: int  # of the torus; 0: a switch
  matrix: int  # rows and columns of the matrix unit, which smaller ones fill


# Vendors' figures; links and matrix units are not all published by them.
CHIPS = {
  "v4": Chip(275e12, 30.75 * GIB, 1.2e12, 45e9, 3, 128),
  "v5e": Chip(197e12, 15.75 * GIB, 0.82e12, 45e9, 2, 128),
  "v5p": Chip(459e12, 95.74 * GIB, 2.77e12, 90e9, 3, 128),
  "v6e": Chip(918e12, 31.25 * GIB, 1.64e12, 90e9, 2, 256),
  "tpu7x": Chip(1153e12, 94.75 * GIB, 3.69e12, 90e9, 3, 256),
  "a100": Chip(312e12, 79 * GIB, 2.04e12, 300e9, 0, 64),
  "h100": Chip(989e12, 79 * GIB, 3.35e12, 450e9, 0, 64),
  "h200": Chip(989e12, 140 * GIB, 4.8e12, 450e9, 0, 64),
}

# What can be rented, smallest first.
_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = (
  "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16"
)
SIZES = {
  "v5e": _FLAT,
  "v6e": _FLAT,
  **{name: tuple(_CUBE) for name in ("v4", "v5p", "tpu7x")},
}

# libtpu asks these where no TPU is, and is silent with them; the last is for
# jax's CUDA plugin, which asks for a driver.
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any name it knows
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "TPU_LOG_DIR": "disabled",
  "TPU_MIN_LOG_LEVEL": "3",
  "TPU_STDERR_LOG_LEVEL": "3",
  "TF_CPP_MIN_LOG_LEVEL": "3",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}


# What XLA compiles for an NVIDIA GPU by, where there is none.
_GPU = """
platform_name: "CUDA"
device_description_str: "{name}"
dnn_version_info {{ major: 9 minor: 8 }}
gpu_device_info {{
  cuda_compute_capability {{ major: {major} }}
  core_count: {cores}
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {most_shared}
  l2_cache_size: {l2}
  clock_rate_ghz: {clock}
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  shared_memory_per_block: 49152
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  fpus_per_core: {units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
"""
_HOPPER = {
  "major": 9,
  "cores": 132,
  "shared": 233472,
  "most_shared": 232448,
  "l2": 50 * 2**20,
  "clock": 1.98,
  "units": 128,
}
_AMPERE = {
  "major": 8,
  "cores": 108,
  "shared": 167936,
  "most_shared": 166912,
  "l2": 40 * 2**20,
  "clock": 1.41,
  "units": 64,
}
_GPUS = {"a100": _AMPERE, "h100": _HOPPER, "h200": _HOPPER}


class Topology(NamedTuple):
  kind: str
  sizes: tuple[int, ...]

  @property
  def chip(self) -> Chip:
    return CHIPS[self.kind]

  @property
  def is_gpu(self) -> bool:
    return self.chip.axes == 0

  @property
  def name(self) -> str:
    return f"{self.kind}:{'x'.join(map(str, self.sizes))}"

  @property
  def count(self) -> int:
    """Chips."""
    return math.prod(self.sizes)

  @property
  def wire(self) -> float:
    """Bytes/s at which a device takes part in a collective over all axes.

    A torus moves along all its axes both ways; without links around, which v5e
    and v6e have in whole pods only and others in multiples of 4, at half of it.
    """
    chip = self.chip
    if self.is_gpu:
      return chip.link
    whole = 16 if chip.axes == 2 else 4
    used = [size for size in self.sizes if size > 1]
    is_ring = all(size % whole == 0 for size in used)
    return chip.link * len(used) * (2 if is_ring else 1) or chip.link


def parse(text: str) -> Topology:
  """Topology of "v5p:4x4x4" or "h100:1"; says what there is if unknown."""
  kind, _, sizes = text.partition(":")
  parts = sizes.split("x")
  if kind not in CHIPS or not all(p.isdigit() and int(p) for p in parts):
    raise ValueError(
      f"--topology={text!r}: expected KIND:SIZES, for instance v5e:4x4, "
      f"v5p:4x4x4 or h100:1; kinds are {', '.join(CHIPS)}"
    )
  topology = Topology(kind, tuple(map(int, parts)))
  axes = topology.chip.axes or 1
  if len(parts) != axes:
    raise ValueError(
      f"--topology={text!r}: {kind} takes {axes} size(s), joined by x"
    )
  if topology.is_gpu and topology.count > 1:
    raise ValueError(f"--topology={text!r}: plans are for one GPU: {kind}:1")
  return topology


def devices(topology: Topology) -> list[Any]:
  """Devices of a topology, to compile for; none need be here.

  Empty for a GPU where jax's CUDA plugin, which has the compiler, isn't
  installed.
  """
  from jax.experimental import topologies

  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  jax.config.update("jax_platforms", "cpu")
  if topology.is_gpu:
    chip = topology.chip
    text = _GPU.format(
      name=topology.kind,
      bandwidth=int(chip.bandwidth),
      memory=int(chip.hbm),
      **_GPUS[topology.kind],
    )
    try:
      found = topologies.get_topology_desc(
        "", "cuda", target_config=text, topology="1x1x1"
      )
    except NotImplementedError:
      return []
    return list(found.devices)
  try:
    import libtpu  # noqa: F401
  except ImportError:
    raise ValueError(
      "planning for TPUs compiles with libtpu, which isn't installed: "
      "pip install 'spatial-jax[tpu]' (it needs no TPU)"
    ) from None
  try:
    found = topologies.get_topology_desc(topology.name, "tpu").devices
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f"--topology={topology.name}: {error}") from error
  return list(found)
