# SPDX-License-Identifier: Apache-2.0
"""Eight fake CPU devices, checked array shapes, no silent broadcasting."""

import os
import pathlib

# Before jax is imported by anyone, and inherited by child processes.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  (
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    # Most of a test's time goes into compiling.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
  )
).strip()
# Threads of XLA. A thread that has reached a collective waits there for all
# devices. With one thread a device, two collectives that may run in any order
# can hold them all, each waiting for devices that the other one holds.
os.environ["NPROC"] = "64"
# One compilation cache per test process: child processes and later runs reuse
# it, and two processes never write the same file.
_worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
_root = pathlib.Path(__file__).parents[1]
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(_root / ".pytest_cache" / f"jax-{_worker}")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax
import jaxtyping

jax.config.update("jax_numpy_rank_promotion", "raise")

# Every annotation of the package is checked at each call, in tests only.
# An int passes for a float, as type checkers have it.
jaxtyping.install_import_hook(
  "spatial_jax",
  "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)


def pytest_addoption(parser):
  parser.addoption(
    "--cases",
    default=str(_root / "tests" / "golden"),
    help="folder of golden cases that test_golden.py compares with",
  )
  parser.addoption(
    "--strict-cases",
    action="store_true",
    help="fail when a golden case has no adapter",
  )
  parser.addoption(
    "--all-meshes",
    action="store_true",
    help="compare every model on every mesh with one device, not two of them",
  )
