# SPDX-License-Identifier: Apache-2.0
"""Several processes as one: start, agreement, the slowest, programs kept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

BARRIER_SECONDS = 600


def start(environment: Mapping[str, str] = os.environ) -> None:
  """Joins the other processes; the first use of jax.

  TPU pods, Slurm, Open MPI and Kubernetes say themselves who is who. Elsewhere
  JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
  JAX_PROCESS_ID do. A process that isn't heard of for
  JAX_HEARTBEAT_TIMEOUT_SECONDS (100) ends all others, which go on from the last
  checkpoint when the same command starts them again.
  """

  def number(name, default=None):
    text = environment.get(name)
    try:
      return default if text is None else int(text)
    except ValueError:
      raise ValueError(
        f"{name}={text!r} in the environment: no number"
      ) from None

  count = number("JAX_NUM_PROCESSES")
  index = number("JAX_PROCESS_ID")
  address = environment.get("JAX_COORDINATOR_ADDRESS")
  beat = number("JAX_HEARTBEAT_TIMEOUT_SECONDS", 100)
  if (count is None) != (index is None):
    raise ValueError(
      "JAX_NUM_PROCESSES and JAX_PROCESS_ID belong together: set both, or none "
      "where the cluster says them"
    )
  try:
    jax.distributed.initialize(
      address, count, index, heartbeat_timeout_seconds=beat
    )
  except (ValueError, RuntimeError) as error:
    raise ValueError(
      f"--multihost: the processes did not meet ({error}); set "
      "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID "
      "where no cluster says them, and start all processes within 5 minutes"
    ) from error


def cache_programs(folder: str) -> None:
  """Compiled programs are kept in a folder or bucket; "" leaves jax's own.

  JAX_COMPILATION_CACHE_DIR in the environment does the same.
  """
  if folder:
    jax.config.update("jax_compilation_cache_dir", folder)


def barrier(name: str) -> None:
  """Waits for all processes; an error names the one that is missing.

  Args:
    name: never used before in this run.
  """
  if jax.process_count() > 1:
    multihost.sync_global_processes(name, timeout=BARRIER_SECONDS)


def gather(value: Any) -> np.ndarray:
  """A number of each process, in all of them."""
  if jax.process_count() == 1:
    return np.asarray(value)[None]
  return np.asarray(multihost_utils.process_allgather(np.asarray(value)))


def all_agree(good: bool) -> bool:
  """Whether this is so on all processes."""
  return bool(gather(np.int32(good)).all())


def slowest(waited: float) -> tuple[int, float]:
  """The process that waited longest for its data, and how long."""
  each = gather(np.float32(waited))
  index = int(np.argmax(each))
  return index, float(each[index])
