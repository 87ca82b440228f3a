# SPDX-License-Identifier: Apache-2.0
"""Eight fake CPU devices, checked array shapes, no silent broadcasting."""

import functools
import gc
import importlib
import importlib.metadata
import os
import pathlib

# Before jax is imported by anyone, and inherited by child processes.
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of a test's time goes into compiling.
QUICK = "--xla_backend_optimization_level=0"
QUICK += " --xla_llvm_disable_expensive_passes=true"
QUICK += " --xla_cpu_experimental_ynn_fusion_type="  # no calls of YNNPACK
QUICK += " --xla_cpu_parallel_codegen_split_count=1"  # parts cost 15 % more
if importlib.metadata.version("jaxlib").startswith("0.10."):
  # Newer versions lack this choice. It halves the time again.
  QUICK += " --xla_cpu_use_fusion_emitters=false"
QUICK = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()
# What child processes take that need no mesh; test workers inherit it.
QUICK = os.environ.setdefault("ONE_DEVICE", QUICK)
os.environ["XLA_FLAGS"] = f"{QUICK} --xla_force_host_platform_device_count=8"
# Threads of XLA. A thread that has reached a collective waits there for all
# devices. With one thread a device, two collectives that may run in any order
# can hold them all, each waiting for devices that the other one holds.
os.environ["NPROC"] = "64"
# One compilation cache for the child processes of tests and for later runs.
# With a size it is locked while it is read or written.
_root = pathlib.Path(__file__).parents[1]
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(_root / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax
import jaxtyping
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_numpy_rank_promotion", "raise")
# Writing programs takes a tenth of a test's time, and few are compiled twice.
jax.config.update("jax_enable_compilation_cache", False)

# Numbers alone, in a hundred thousand calls: not worth checking below.
importlib.import_module("spatial_jax.world.placement")

_jaxtyped = jaxtyping.jaxtyped


def _jaxtyped_if_annotated(*, typechecker):
  """Closures without annotations would be wrapped each time they are made."""
  wrap = _jaxtyped(typechecker=typechecker)
  return lambda fn: wrap(fn) if getattr(fn, "__annotations__", True) else fn


# Every annotation of the package is checked at each call, in tests only.
# An int passes for a float, as type checkers have it.
jaxtyping.jaxtyped = _jaxtyped_if_annotated
jaxtyping.install_import_hook(
  "spatial_jax",
  "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)


def pytest_collection_finish():
  # Traces are many small objects: collected at the usual pace, beside all that
  # was imported, they take a tenth of the time of a test.
  gc.collect()
  gc.freeze()
  gc.set_threshold(100_000, 50, 100)
  # This thread hands fusions to threads of XLA that compile them (jax 0.12). A
  # fusion that finds all compilers busy gets a new one, and to make one takes
  # longer than the fusion does. So those threads go first.
  jax.jit(jax.numpy.sin)(np.ones(9))  # starts them, with their own priority
  os.nice(10)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
  """Compiled programs of one file are of no use to the next."""
  yield
  jax.clear_caches()


@pytest.fixture
def kept_programs():
  """The cache for a test whose commands compile the same programs again."""
  jax.config.update("jax_enable_compilation_cache", True)
  compilation_cache.reset_cache()
  yield
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()


@pytest.fixture
def one_device(monkeypatch):
  """Meshes of one device where they are not the subject: they compile fast."""
  from spatial_jax import sharding

  mesh = functools.partial(sharding.mesh, devices=jax.devices()[:1])
  monkeypatch.setattr(sharding, "mesh", mesh)


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
    "--all-recipes",
    action="store_true",
    help="train two steps of every recipe, not of one",
  )
  parser.addoption(
    "--all-meshes",
    action="store_true",
    help="compare every model on every mesh with one device, not two of them",
  )
