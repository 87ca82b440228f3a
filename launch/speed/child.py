# SPDX-License-Identifier: Apache-2.0
"""One side of one row, in a process of its own.

Reads lines from stdin: a number of calls to time. Answers on stdout, a JSON
object a line; the first one tells that it is ready. What libraries print goes
to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import sys
import time

import numpy as np


def build(make: str, case: dict, folder: str):
  """The program that "module:function" makes."""
  module, function = make.split(":")
  program = getattr(importlib.import_module(module), function)
  return program(pathlib.Path(folder), case)


def measure(program, calls: int) -> dict[str, list[float]]:
  """Wall and processor seconds of each call."""
  wall, processor = [], []
  for _ in range(calls):
    start, used = time.perf_counter(), time.process_time()
    program.run()
    wall.append(time.perf_counter() - start)
    processor.append(time.process_time() - used)
  return {"wall": wall, "cpu": processor}


def describe(program) -> dict:
  """What the harness is told of a program."""
  return {
    "first": program.first,
    "flops": program.flops,
    "units": program.units,
    "notes": program.notes,
  }


def peak_memory() -> float:
  """Most memory that this process held, in GB, or its device did.

  `ru_maxrss` would start from the memory of the process that started this one.
  """
  if "jax" in sys.modules:
    stats = sys.modules["jax"].devices()[0].memory_stats()
    if stats:
      return stats["peak_bytes_in_use"] / 1e9
  torch = sys.modules.get("torch")
  if torch is not None and torch.cuda.is_available():
    return torch.cuda.max_memory_allocated() / 1e9
  with open("/proc/self/status") as file:
    line = next(line for line in file if line.startswith("VmHWM"))
  return int(line.split()[1]) * 1024 / 1e9


def main() -> None:
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  spec = json.loads(sys.argv[1])
  sys.path[0] = spec["root"]  # not this file's folder
  if spec["threads"]:
    # XLA has as many threads as it may use processors.
    usable = sorted(os.sched_getaffinity(0))[: spec["threads"]]
    os.sched_setaffinity(0, usable)
    os.environ["OMP_NUM_THREADS"] = str(spec["threads"])

  # Two sides share a GPU's memory, each takes what it needs; all of it in one
  # piece, which holds the most, is for a side that is alone.
  alone = str(bool(spec["cache"])).lower()
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", alone)
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
  if spec["cache"]:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = spec["cache"]

  def answer(**values):
    answers.write(json.dumps(values) + "\n")
    answers.flush()

  if ".peer:" not in spec["make"]:
    import jax

    from spatial_jax import sharding

    jax.set_mesh(sharding.mesh())  # as the trainer does: it chooses kernels
  program = build(spec["make"], spec["case"], spec["folder"])
  np.savez(spec["outputs"], **program.outputs)
  answer(**describe(program))
  for line in sys.stdin:
    answer(**measure(program, int(line)), peak=peak_memory())


if __name__ == "__main__":
  main()
