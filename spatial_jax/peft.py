# SPDX-License-Identifier: Apache-2.0
"""Adapters of `lora.py` in the files of Hugging Face's PEFT, and back.

A folder holds adapter_model.safetensors, with two tensors for each linear
layer of the torch model, and adapter_config.json. The names follow from the
key table that loads the model's own weights.

Letters: D in, E out, r rank.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spatial_jax import hf, trees

Params = Mapping[str, Any]

_PREFIX = "base_model.model."  # of every tensor's name
_WEIGHTS, _SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def keys(table: hf.Table) -> tuple:
  """Table of PEFT's adapter tensors, made of a model's own.

  Its paths end in lora_a/kernel and lora_b/kernel: as kernels, (out, in)
  tensors become (in, out). Parameters that share a published tensor share its
  lora_A; their lora_b follow each other.
  """
  rows = []
  for names, path, *special in table:
    paths = (path,) if isinstance(path, str) else path
    names = (names,) if isinstance(names, str) else names
    names = [_PREFIX + n[:-7] for n in names if n.endswith(".weight")]
    is_linear = all(p.endswith("/kernel") for p in paths) and names
    if not is_linear or any(isinstance(s, hf.Custom) for s in special):
      continue
    a = tuple(f"{name}.lora_A.weight" for name in names)
    b = tuple(f"{name}.lora_B.weight" for name in names)
    layers = [p.removesuffix("/kernel") for p in paths]
    rows += [(a, f"{layer}/lora_a/kernel") for layer in layers]
    outs = tuple(f"{layer}/lora_b/kernel" for layer in layers)
    rows.append((b, outs[0] if len(outs) == 1 else outs))
  return tuple(rows)


def load(
  table: hf.Table,
  folder: str | os.PathLike,
  params: Params,
  *,
  dtype: Any = jnp.float32,
) -> dict[str, Any]:
  """Adapters from a folder that PEFT wrote; `lora.attach` puts them in place.

  Raises one ValueError that lists every tensor without a place (such as fully
  trained modules) and every layer of a scanned block that has none.

  Args:
    table: KEYS of the model.
    params: arrays or abstract shapes that hold the kernels.
  """
  folder = pathlib.Path(folder)
  settings = _settings(folder)
  source = folder / _WEIGHTS
  source = source if source.exists() else folder
  tensors = hf.Reader(source).shapes
  kernels = trees.flatten(params)
  rows, wanted, scales = keys(table), {}, {}
  for names, path in rows:
    if not str(path).endswith("/lora_a/kernel"):
      continue
    layer = path.removesuffix("/lora_a/kernel")
    found = [n for n in names if n.replace("{i}", "0") in tensors]
    if not found or f"{layer}/kernel" not in kernels:
      continue
    *lead, D, E = kernels[f"{layer}/kernel"].shape
    rank = tensors[found[0].replace("{i}", "0")][0]
    wanted[path] = jax.ShapeDtypeStruct((*lead, D, rank), dtype)
    b = jax.ShapeDtypeStruct((*lead, rank, E), dtype)
    wanted[f"{layer}/lora_b/kernel"] = b
    scale = _scales(settings, _module(found[0]), lead, rank)
    scales[f"{layer}/lora_scale"] = scale
  loaded = hf.load(rows, source, trees.unflatten(wanted))
  loaded = trees.flatten(loaded).items()
  leaves = {name.removesuffix("/kernel"): x for name, x in loaded}
  return trees.unflatten({**leaves, **scales})


def save(
  table: hf.Table,
  params: Params,
  folder: str | os.PathLike,
  *,
  base: str = "",
  release: int = 0,
) -> None:
  """Writes the adapters of `params` as a folder that PEFT loads.

  Args:
    table: KEYS of the model.
    params: all parameters, or kernels and adapters at least.
    base: path or hub id of the model that the adapters belong to.
    release: which of a row's alternative names to write.
  """
  leaves = trees.flatten(params)
  if not any(name.endswith("/lora_a") for name in leaves):
    raise ValueError("these parameters have no adapters to save")
  modules: dict[str, tuple[int, float]] = {}  # name -> rank, alpha
  tensors: dict[str, np.ndarray] = {}
  targets: list[str] = []  # regexes over the modules' names
  rows = keys(table)
  for names, path in rows:
    paths = (path,) if isinstance(path, str) else path
    if not paths[0].endswith("/lora_b/kernel"):
      continue
    layers = [p.removesuffix("/lora_b/kernel") for p in paths]
    if not any(f"{layer}/lora_a" in leaves for layer in layers):
      continue
    if any(f"{layer}/lora_b/kernel" in tensors for layer in layers):
      continue  # another naming, of which the first is written
    parts = _shared([_parts(leaves, layer) for layer in layers])
    tensors[f"{layers[0]}/lora_a/kernel"] = parts[0][0]
    for layer, part in zip(layers, parts, strict=True):
      tensors[f"{layer}/lora_b/kernel"] = part[1]
    name = _module(names[min(release, len(names) - 1)])
    targets.append(re.escape(name).replace(re.escape("{i}"), r"\d+"))
    rank, scale = parts[0][0].shape[-1], parts[0][2]
    for i, one in enumerate(scale.reshape(-1)):
      modules[name.replace("{i}", str(i))] = (rank, _alpha(one, rank))
  lost = [
    name
    for name in leaves
    if name.endswith("/lora_b") and f"{name}/kernel" not in tensors
  ]
  if lost:
    raise ValueError(f"no tensor name is known for {', '.join(lost)}")
  os.makedirs(folder, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder) as inside:
    hf.save(
      rows,
      trees.unflatten(tensors),
      inside,
      release=release,
      shard_bytes=2**62,
    )
    os.replace(
      pathlib.Path(inside, "model.safetensors"), pathlib.Path(folder, _WEIGHTS)
    )
  text = json.dumps(_describe(modules, targets, base), indent=2)
  pathlib.Path(folder, _SETTINGS).write_text(text + "\n")


def _module(name):
  """PEFT's tensor name -> the torch module's name."""
  return name.removeprefix(_PREFIX).rsplit(".", 2)[0]


def _alpha(scale, rank):
  """The shortest alpha that gives this float32 scale again."""
  for digits in (6, 17):
    alpha = float(f"{float(scale) * rank:.{digits}g}")
    if np.float32(alpha / rank) == scale:
      break
  return int(alpha) if alpha.is_integer() else alpha


def _settings(folder):
  try:
    settings = json.loads((folder / _SETTINGS).read_text())
    kind = settings["peft_type"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"{folder / _SETTINGS} is no readable adapter configuration ({error!r}); "
      "give a folder that PEFT wrote"
    ) from error
  if kind != "LORA" or settings.get("use_dora"):
    kind = "DoRA" if settings.get("use_dora") else kind
    raise ValueError(f"{folder} holds a {kind} adapter; only LoRA is read")
  return settings


def _scales(settings, module, lead, rank):
  """alpha / rank of each layer of a scan, as PEFT finds it."""
  root = math.sqrt(rank) if settings.get("use_rslora") else rank
  patterns = (settings.get("alpha_pattern") or {}).items()
  out = []  # 8: what PEFT takes for an alpha that is not there
  for i in range(math.prod(lead)):
    name = module.replace("{i}", str(i))
    own = (v for k, v in patterns if re.match(rf"(.*\.)?({k})$", name))
    out.append(next(own, settings.get("lora_alpha", 8)) / root)
  return jnp.asarray(out, jnp.float32).reshape(lead)


def _parts(leaves, layer):
  """kernel, a, b, scale of a layer; a rank of 0 where it has no adapter."""
  kernel = leaves[f"{layer}/kernel"]
  if f"{layer}/lora_a" in leaves:
    names = ("lora_a", "lora_b", "lora_scale")
    return tuple(np.asarray(leaves[f"{layer}/{name}"]) for name in names)
  *lead, D, E = kernel.shape
  return np.zeros((*lead, D, 0)), np.zeros((*lead, 0, E)), None


def _shared(parts):
  """Adapters of the parts of one published tensor, with one a for all of them.

  Those that were trained apart are stacked: a side by side, each b between
  zeros, so that the rank is the sum of theirs.
  """
  first = parts[0][0]
  if all(np.array_equal(a, first) for a, _, _ in parts):
    return parts
  scales = [scale for _, _, scale in parts if scale is not None]
  if not all(np.array_equal(scale, scales[0]) for scale in scales):
    raise ValueError(
      "adapters of the parts of one published tensor have different scales"
    )
  a = np.concatenate([part[0] for part in parts], axis=-1)
  a = a.astype(next(p[0].dtype for p in parts if p[2] is not None))
  out, start = [], 0
  for part in parts:
    rank = part[1].shape[-2]
    wide = np.zeros((*part[1].shape[:-2], a.shape[-1], part[1].shape[-1]))
    wide[..., start : start + rank, :] = part[1]
    start += rank
    out.append((a, wide.astype(a.dtype), scales[0]))
  return out


def _describe(modules, targets, base):
  """PEFT's settings of modules with these ranks and alphas."""
  rank, alpha = (
    Counter(values).most_common(1)[0][0]
    for values in zip(*modules.values(), strict=True)
  )
  return {
    "peft_type": "LORA",
    "base_model_name_or_path": base,
    "task_type": None,
    "inference_mode": True,
    "r": rank,
    "lora_alpha": alpha,
    "lora_dropout": 0.0,
    "bias": "none",
    # A list would be matched by the ends of names, in other towers too.
    "target_modules": "|".join(targets),
    "rank_pattern": {n: r for n, (r, _) in modules.items() if r != rank},
    "alpha_pattern": {n: a for n, (_, a) in modules.items() if a != alpha},
    "use_rslora": False,
  }
