# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (LoRA) for the linear layers of any model.

Paper: https://arxiv.org/abs/2106.09685. An adapter is three leaves beside the
kernel [... D E] of a linear layer, with the layer axes of scanned blocks in
front: lora_a [... D r], lora_b [... r E] and lora_scale [...], which is
alpha / r. `nn.layers.Dense` adds scale * (x @ a) @ b where it finds them. So
models know nothing of adapters, a checkpoint says by itself how its adapters
are scaled, and freezing the base is a rule of the optimizer.

The alternative, W + scale * a @ b before each step, needs no change of any
layer but holds a second copy of all adapted kernels and their gradients: of 32
blocks with 80 MiB of weights the compiler plans 166 MiB beside them, with
adapters in the layers 7 MiB. `merge` is for the end of the training. Adapters
in PEFT's files: `peft.py`.

Not dropped by `dropout`: what an adapter of an output head sees where the loss
is computed in chunks.

Letters: D in, E out, r rank, L layers of a scan.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from spatial_jax import trees
from spatial_jax.nn.layers import Dense, adapted_kernel
from spatial_jax.types import Array

Params = Mapping[str, Any]

LEAVES = r"(.*/)?lora_(a|b|scale)"


@contextlib.contextmanager
def linear_layers() -> Iterator[set[str]]:
  """Collects the names of the linear layers that are called inside.

  Only these read their adapters; elsewhere one would be ignored.
  """
  names: set[str] = set()

  def note(call, args, kwargs, context):
    if isinstance(context.module, Dense):
      names.add("/".join(context.module.path))
    return call(*args, **kwargs)

  with nn.intercept_methods(note):
    yield names


def init(
  key: Array,
  params: Params,
  layers: Iterable[str],
  *,
  ranks: Iterable[tuple[str, int]],
  scale: float = 1.0,
  start: str = "kaiming",
) -> dict[str, Any]:
  """Adapters that change nothing yet, since b is zero.

  Args:
    params: arrays that hold the kernels.
    layers: names of the linear layers, such as "llm/blocks/attention/query".
    ranks: rules (regex over a layer's whole name, rank); the first match wins,
      0 is no adapter, and every layer must match.
    scale: alpha / rank.
    start: how a is drawn: "kaiming" is uniform within 1 / sqrt(D), PEFT's
      default; "gaussian" has a deviation of 1 / r.
  """
  if start not in ("kaiming", "gaussian"):
    raise ValueError(
      f"config.lora.start={start!r}; expected 'kaiming' or 'gaussian'"
    )
  kernels = trees.flatten(params)
  kernels = {name: kernels[f"{name}/kernel"] for name in sorted(layers)}
  rank_of = trees.match(kernels, ranks, "config.lora.ranks")
  chosen = {name: rank for name, rank in rank_of.items() if rank}
  if not chosen:
    raise ValueError("config.lora.ranks gives no layer an adapter")
  leaves = {}
  keys = jax.random.split(key, len(chosen))
  for key, (name, rank) in zip(keys, chosen.items(), strict=True):
    kernel = kernels[name]
    *lead, D, E = kernel.shape
    if not 0 < rank <= min(D, E):
      raise ValueError(
        f"config.lora.ranks gives {name} of {D} x {E} the rank {rank}; "
        f"expected 1 to {min(D, E)}, or 0 for no adapter"
      )
    if start == "kaiming":
      a = jax.random.uniform(key, (*lead, D, rank), minval=-1.0, maxval=1.0)
      a = a * D**-0.5
    else:
      a = jax.random.normal(key, (*lead, D, rank)) / rank
    leaves[f"{name}/lora_a"] = a.astype(kernel.dtype)
    leaves[f"{name}/lora_b"] = jnp.zeros((*lead, rank, E), kernel.dtype)
    leaves[f"{name}/lora_scale"] = jnp.full(lead, scale, jnp.float32)
  return trees.unflatten(leaves)


def attach(params: Params, adapters: Params) -> dict[str, Any]:
  """Parameters with adapters beside their kernels."""
  return trees.unflatten({**trees.flatten(params), **trees.flatten(adapters)})


def base(params: Params) -> dict[str, Any]:
  """The parameters without their adapters, as before the training."""
  flat = trees.flatten(params).items()
  return trees.unflatten({k: x for k, x in flat if not _is_adapter(k)})


def adapters(params: Params) -> dict[str, Any]:
  """The leaves of adapters alone."""
  flat = trees.flatten(params).items()
  return trees.unflatten({k: x for k, x in flat if _is_adapter(k)})


def _is_adapter(name):
  return re.fullmatch(LEAVES, name) is not None


def merge(params: Params) -> dict[str, Any]:
  """Plain parameters: each kernel becomes W + scale * a @ b.

  The sum is taken in float32, layer by layer, and rounded once to the kernel's
  dtype: the same bits on every machine that multiplies in float32.
  """
  out = {
    name: merge(x) if isinstance(x, Mapping) else x
    for name, x in params.items()
    if not name.startswith("lora_")
  }
  if "lora_a" in params:
    layer = {k: params[k] for k in ("kernel", "lora_a", "lora_b", "lora_scale")}
    out["kernel"] = _merged(layer)
  return out


@jax.jit
def _merged(layer):
  if layer["kernel"].ndim == 2:
    return adapted_kernel(layer)
  return jax.lax.map(_merged, layer)  # one layer's float32 copy at a time


def dropout(params: Params, key: Array, rate: float) -> dict[str, Any]:
  """Parameters whose adapters drop a share of what they see, for one step.

  As the adapters, dropout travels in the parameters: a key for each layer, so
  that scanned blocks need no random streams of their own.
  """
  leaves = trees.flatten(params)
  names = [name for name in leaves if name.endswith("lora_scale")]
  for name, one in zip(names, jax.random.split(key, len(names)), strict=True):
    lead = leaves[name].shape
    where = name.removesuffix("scale") + "dropout"
    leaves[f"{where}/key"] = jax.random.key_data(jax.random.split(one, lead))
    leaves[f"{where}/rate"] = jnp.full(lead, rate, jnp.float32)
  return trees.unflatten(leaves)
