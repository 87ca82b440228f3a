# SPDX-License-Identifier: Apache-2.0
"""Compiles for devices that needn't be here; what the program needs."""

from __future__ import annotations

import ctypes
import resource
import time
from typing import Any

import jax

from spatial_jax import sharding
from spatial_jax.plan import hlo

_ARENA_MAX, _MMAP_THRESHOLD = -8, -3  # numbers of the options in malloc.h


class TooLarge(ValueError):
  """A program needs more memory than a chip has."""


def measure(
  function: Any, *arguments: Any
) -> tuple[dict[str, Any], float, Any]:
  """Figures of a jitted function, the bytes that a device sends, the program.

  Seconds are those of tracing and compiling.

  Raises:
    TooLarge: it needs more memory than a chip has.
  """
  began, cpu = time.perf_counter(), time.process_time()
  cached = jax.config.jax_enable_compilation_cache
  # Nobody runs this program, and its seconds are to be those of compiling.
  jax.config.update("jax_enable_compilation_cache", False)
  try:
    program = function.lower(*arguments).compile(_options())
  except jax.errors.JaxRuntimeError as error:
    raise _too_large(error) from error
  finally:
    jax.config.update("jax_enable_compilation_cache", cached)
  found = hlo.collectives(program.as_text())
  kinds: dict[str, tuple[int, float]] = {}
  for (kind, _), (count, size) in hlo.by_kind(found).items():
    before = kinds.get(kind, (0, 0.0))
    kinds[kind] = before[0] + count, before[1] + size
  figures = {
    "compiled": True,
    "peak": float(program.memory_analysis().peak_memory_in_bytes),
    "collectives": kinds,
    "compile_seconds": time.perf_counter() - began,
    "compile_cpu_seconds": time.process_time() - cpu,
    # Linux counts it in KiB.
    "compile_memory": 1024.0
    * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
  }
  return figures, sum(one.wire for one in found), program


def _options():
  """Products by NVIDIA's library: others are tried out on the GPU itself."""
  is_gpu = sharding.platform() == "gpu"
  return {"xla_gpu_enable_triton_gemm": False} if is_gpu else None


def share_memory() -> None:
  """From here on glibc's malloc, if it is that, keeps less of what is freed.

  A thread keeps it for itself otherwise, and what was large lies between small
  pieces: of all that a compiler of many threads takes, 5 % and 1 %. For a
  process that only compiles, since threads that compute would wait for each
  other.
  """
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt:
    mallopt(_ARENA_MAX, 2)
    # Fixed; it would grow with what is freed, to 32 MiB.
    mallopt(_MMAP_THRESHOLD, 2**17)


def _too_large(error):
  text = str(error).splitlines()[0]
  # Memory of a core is a kernel's to fit, whatever the chip.
  if "RESOURCE_EXHAUSTED" not in text or "vmem" in text.lower():
    return error
  return TooLarge(f"does not fit: {text.partition('RESOURCE_EXHAUSTED: ')[2]}")
