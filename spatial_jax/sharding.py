# SPDX-License-Identifier: Apache-2.0
"""The one file that knows the mesh axes.

Activations and parameters are described by logical axes ("batch length
act_embed"); `RULES` says on which mesh axes each lies, `PARAMETERS` gives the
logical axes of a parameter by its name. Modules stay plain: parameters are
arrays without boxes, and activations pass through `constrain`.
"""

from __future__ import annotations

import functools
import logging
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spatial_jax import trees

MESH_AXES = ("data", "fsdp", "tensor", "context")

# Logical axis -> mesh axes. A mesh axis that is absent or doesn't divide the
# dimension is left out.
RULES: dict[str, tuple[str, ...]] = {
  # activations
  "batch": ("data", "fsdp"),
  "length": ("context",),
  "keys": (),  # gathered: every query of a shard sees all keys
  "frames": ("context",),
  "rows": ("data", "fsdp", "context"),  # frames of all rows, one after another
  "patches": (),
  "act_embed": (),
  "act_heads": ("tensor",),
  "act_mlp": ("tensor",),
  "act_vocab": ("tensor",),
  "head_dim": (),
  # parameters
  "layers": (),
  "embed": ("fsdp",),
  "heads": ("tensor",),
  "mlp": ("tensor",),
  # The vocabulary, never the width: a table sharded by width makes XLA
  # rematerialise the whole gather.
  "vocab": ("tensor", "fsdp"),
  "none": (),
}

# Regex over the parameter's name -> logical axes of its last dimensions; first
# match wins. A further leading dimension is the scanned layer axis. Adapters
# lie as the kernel beside them does.
PARAMETERS = (
  (r".*/(query|key|value|qkv)/kernel", "embed heads"),
  (r".*/(query|key|value|qkv)/bias", "heads"),
  (r".*/out/kernel", "heads embed"),
  (r".*/(gate|up)/kernel", "embed mlp"),
  (r".*/(gate|up)/bias", "mlp"),
  (r".*/down/kernel", "mlp embed"),
  (r"(.*/)?head/kernel", "none vocab"),
  # STTS's scorer: a sixteenth of its 4304 rows would end within a tile, and
  # gathering it would move every number twice.
  (r".*/middle/kernel", "mlp none"),
  (r"(.*/)?kernel", "embed none"),
  (r"(.*/)?embedding", "vocab none"),
  (r"(.*/)?(bias|scale)", "none"),
)
_ADAPTER = re.compile(r"lora_(a|b|scale)$")
_CPUINFO = pathlib.Path("/proc/cpuinfo")


def mesh(
  *,
  data: int = 1,
  fsdp: int = -1,
  tensor: int = 1,
  context: int = 1,
  slices: int = 0,
  devices: Sequence[Any] | None = None,
) -> Mesh:
  """Mesh over all devices; one size may be -1: whatever the others leave.

  Args:
    slices: groups of chips that only the data-centre network joins; 0 is what
      the devices say. Only the data axis crosses them, once a step.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = dict(zip(MESH_AXES, (data, fsdp, tensor, context), strict=True))
  free = [name for name, size in sizes.items() if size == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  given = ", ".join(f"{name}={size}" for name, size in sizes.items())
  fits = fixed > 0 and len(devices) % fixed == 0
  if len(free) > 1 or not fits or (not free and fixed != len(devices)):
    raise ValueError(
      f"config.mesh ({given}) does not fit {len(devices)} device(s): the "
      "product of the sizes must be the device count, and at most one size "
      "may be -1 (the rest)"
    )
  for name in free:
    sizes[name] = len(devices) // fixed
  # jax.make_mesh makes Explicit axes by default, on which a constraint is an
  # assertion; everything here relies on Auto.
  return Mesh(
    _arrange(devices, tuple(sizes.values()), slices),
    MESH_AXES,
    axis_types=(AxisType.Auto,) * len(MESH_AXES),
  )


def _arrange(devices, shape, slices):
  """Devices in the mesh's order: slices outermost, neighbours innermost."""
  where = [getattr(x, "slice_index", 0) or 0 for x in devices]
  slices = slices or len(set(where))
  if shape[0] % slices:
    raise ValueError(
      f"config.mesh.data={shape[0]} is no multiple of the {slices} slices: the "
      "other axes need the fast network within one"
    )
  order = np.argsort(where, kind="stable")
  groups = np.array_split(np.array(devices, object)[order], slices)
  inner = shape[0] // slices, *shape[1:]

  def torus(group):
    if group[0].platform != "tpu":
      return group.reshape(inner)
    return mesh_utils.create_device_mesh(
      inner, list(group), allow_split_physical_axes=True
    )

  return np.concatenate([torus(group) for group in groups])


def _spec(
  axes: Sequence[str], shape: Sequence[int], sizes: Mapping[str, int]
) -> tuple[P, list[str]]:
  """PartitionSpec of an array, and the logical axes that did not divide."""
  entries, dropped = [], []
  for axis, size in zip(axes, shape, strict=True):
    if axis not in RULES:
      raise ValueError(
        f"unknown logical axis {axis!r} in {' '.join(axes)!r}; known are "
        + ", ".join(RULES)
      )
    wanted = [n for n in RULES[axis] if sizes.get(n, 1) > 1]
    names = []
    for name in wanted:
      if size % math.prod(sizes[n] for n in (*names, name)) == 0:
        names.append(name)
    if len(names) < len(wanted):
      dropped.append(f"{axis}={size}")
    entries.append(tuple(names) or None)
  while entries and entries[-1] is None:
    entries.pop()
  return P(*entries), dropped


def spec(axes: Sequence[str], shape: Sequence[int]) -> P:
  """PartitionSpec of an array of such axes on the mesh in force."""
  current = jax.sharding.get_abstract_mesh()
  return _spec(axes, shape, {} if current.empty else current.shape)[0]


def own_rows(rows: int) -> int:
  """How many rows of a batch a device has."""
  current = jax.sharding.get_abstract_mesh()
  if current.empty or AxisType.Manual in current.axis_types:
    return rows
  placed = NamedSharding(current, spec(["batch"], [rows]))
  return placed.shard_shape((rows,))[0]


def single() -> bool:
  """Whether one device does all."""
  current = jax.sharding.get_abstract_mesh()
  return current.empty or current.size == 1


def rows_alone(rows: int) -> P | None:
  """Spec of a batch if every device has rows of its own; or None."""
  current = jax.sharding.get_abstract_mesh()
  manual = AxisType.Manual in current.axis_types
  if single() or manual:
    return None
  alone = own_rows(rows) * current.size == rows
  return spec(["batch"], [rows]) if alone else None


def platform() -> str:
  """What the devices of the mesh in force are: "tpu", "gpu" ...; "" if none.

  The mesh decides, not the default backend: programs for devices that aren't
  there are traced on a CPU.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  name = getattr(device, "platform", None) or ""
  return "gpu" if name == "cuda" else name


def compiler_options(*, few_rows: bool = False) -> dict[str, str]:
  """`jax.jit`'s of programs for the mesh in force, above all training steps.

  Args:
    few_rows: most products have few rows, as when a token a row is written.
  """
  if platform() != "cpu" or (few_rows and not _has_narrow_vectors()):
    return {}
  # Of the library that XLA calls there, sums are fast; products are slower than
  # XLA's own, and so are both in one. With 512-bit vectors and few rows, they
  # are faster.
  return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


@functools.cache
def _has_narrow_vectors() -> bool:
  """Whether this is an x86 processor without 512-bit vectors."""
  try:
    lines = _CPUINFO.read_text().splitlines()
  except OSError:
    return False  # not Linux: nothing was measured there
  flags = next((x for x in lines if x.startswith("flags")), "").split()
  return "avx2" in flags and "avx512f" not in flags


def constrain(x: Any, axes: str) -> Any:
  """Pins an activation to its mesh axes; nothing outside jit or a mesh.

  Args:
    x: array of as many dimensions as there are words in `axes`.
    axes: logical axes, for instance "batch length act_embed".
  """
  words = axes.split()
  if len(words) != x.ndim:
    raise ValueError(f"{axes!r} names {len(words)} axes of a {x.ndim}-D array")
  current = jax.sharding.get_abstract_mesh()
  spec, _ = _spec(words, x.shape, {} if current.empty else current.shape)
  if current.empty or not isinstance(x, jax.core.Tracer):
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(current, spec))


# Scopes by which `plan` knows what moves weights and their gradients.
GATHER, REDUCE = "gather_weight", "reduce_gradient"


def whole(x: Any, name: str) -> Any:
  """A parameter as a product needs it: gathered over the fsdp axis.

  Its gradient is summed into the parts in which the parameter lies. Left to
  itself, the compiler passes parts around while it multiplies, in programs that
  are several times as long. Convert to the product's dtype before: fewer bytes.

  Args:
    name: the parameter's; its end decides, as in `PARAMETERS`.
  """
  current = jax.sharding.get_abstract_mesh()
  if (
    current.empty
    or current.shape.get("fsdp", 1) == 1
    or AxisType.Manual in current.axis_types
    or not isinstance(x, jax.core.Tracer)
  ):
    return x
  words = next(w for r, w in PARAMETERS if re.fullmatch(r, name)).split()
  words = ["layers"] * (x.ndim - len(words)) + words
  parts, _ = _spec(words, x.shape, current.shape)
  names = [(e,) if isinstance(e, str) else e or () for e in parts]
  if not any("fsdp" in entry for entry in names):
    return x
  rest = P(*(tuple(n for n in e if n != "fsdp") or None for e in names))

  @jax.custom_vjp
  def gather(x):
    with jax.named_scope(GATHER):
      return jax.lax.with_sharding_constraint(x, NamedSharding(current, rest))

  def backward(_, gradient):
    placed = NamedSharding(current, parts)
    with jax.named_scope(REDUCE):
      return (jax.lax.with_sharding_constraint(gradient, placed),)

  gather.defvjp(lambda x: (gather(x), None), backward)
  return gather(x)


# Read in several places: gathered once, so that the parts of their gradients
# are added before they are summed over devices.
_TABLES = re.compile(r"(.*/)?(embed/embedding|head/kernel)")


def whole_tables(params: Any, dtype: Any) -> Any:
  """Parameters whose tables of words are gathered, in this dtype."""

  def gather(name, x):
    if not _TABLES.fullmatch(name):
      return x
    return whole(x.astype(dtype), name)

  current = jax.sharding.get_abstract_mesh()
  if current.empty or current.shape.get("fsdp", 1) == 1:
    return params
  return trees.map_names(gather, params)


def batch_sharding(on: Mesh | AbstractMesh) -> NamedSharding:
  """Rows of a batch over the data and fsdp axes."""
  return NamedSharding(on, P(RULES["batch"]))


def host_rows(on: Mesh, batch_size: int) -> tuple[int, ...]:
  """Rows of a batch that lie on devices of this process, ascending.

  Processes that share rows, since an axis other than the batch's runs through
  both, get the same ones.
  """
  where = batch_sharding(on).addressable_devices_indices_map((batch_size,))
  return tuple(
    sorted({row for (s,) in where.values() for row in range(batch_size)[s]})
  )


def replicated(on: Mesh | AbstractMesh) -> NamedSharding:
  return NamedSharding(on, P())


def check_batch(
  on: Mesh | AbstractMesh, batch_size: int, accumulate: int = 1
) -> None:
  """Every micro-batch must split evenly over the batch's mesh axes."""
  ways = math.prod(on.shape[name] for name in RULES["batch"])
  if batch_size < 1 or accumulate < 1 or batch_size % (ways * accumulate):
    step = ways * max(accumulate, 1)
    near = max(step, round(batch_size / step) * step)
    raise ValueError(
      f"config.batch_size={batch_size} cannot be split over {ways} device(s) "
      f"of the mesh's data and fsdp axes in {accumulate} micro-batch(es); use "
      f"a multiple of {step}, for instance --config.batch_size={near}, or "
      "give devices to config.mesh.tensor"
    )


def _kernel(name: str) -> str:
  return _ADAPTER.sub("kernel", name)


def parameters(shapes: Any, on: Mesh | AbstractMesh) -> Any:
  """NamedSharding of every parameter; a name without a rule is an error."""
  names = {_kernel(name): x for name, x in trees.flatten(shapes).items()}
  # Rows for other models' names are no mistake here: only missing ones are.
  rows = [
    row
    for row in PARAMETERS
    if any(re.fullmatch(row[0], name) for name in names)
  ]
  axes = trees.match(names, rows, "sharding.PARAMETERS")

  def place(name, leaf):
    words = axes[_kernel(name)].split()
    if kind := _ADAPTER.search(name):
      inner, outer = words
      split = {"a": [inner, "none"], "b": ["none", outer], "scale": []}
      words = split[kind.group(1)]
    extra = len(leaf.shape) - len(words)
    if extra < 0:
      raise ValueError(
        f"parameter {name} of shape {leaf.shape} has fewer dimensions than its "
        f"row {' '.join(words)!r} in sharding.PARAMETERS"
      )
    words = ["layers"] * extra + words
    spec, dropped = _spec(words, leaf.shape, on.shape)
    if dropped:
      logging.info("%s: %s not divisible, replicated", name, dropped)
    return NamedSharding(on, spec)

  return trees.map_names(place, shapes)


def infer(state: Mapping[str, Any], on: Mesh | AbstractMesh) -> dict[str, Any]:
  """Shardings of {params, opt, step}.

  Optimizer leaves whose path ends with a parameter's path and which have its
  shape (moments) lie as the parameter does; all others are replicated.
  """
  placed = parameters(state["params"], on)
  known = {
    name: (leaf.shape, sharding)
    for (name, leaf), sharding in zip(
      trees.flatten(state["params"]).items(),
      jax.tree.leaves(placed),
      strict=True,
    )
  }

  def place(name, leaf):
    parts = name.split("/")
    for start in range(len(parts)):
      shape, sharding = known.get("/".join(parts[start:]), (None, None))
      if shape == leaf.shape:
        return sharding
    return replicated(on)

  rest = {key: value for key, value in state.items() if key != "params"}
  return {"params": placed, **trees.map_names(place, rest)}
