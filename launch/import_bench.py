# SPDX-License-Identifier: Apache-2.0
"""Time and memory of loading a published model, beside safetensors alone.

  python launch/import_bench.py --folder=runs/import_bench

Writes random bfloat16 numbers in the files of Qwen2.5-VL-3B, in four shards,
unless the folder has them. Then two programs read them in turn, each in a
process of its own: `safetensors.numpy.load_file`, and `hf.load`, whose result
are stacked, transposed parameters on the default device, or with --devices=8
shards on as many fake ones. Both find the files in memory. Prints the times of
each round, their ratio, and the peak memory. --layers=2 makes a model of fewer
layers, for machines with little memory.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def abstract(variant: str, layers: int = 0):
  """Parameters in bfloat16, without data; the key table."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  from ml_collections import ConfigDict

  from spatial_jax import models

  config = {"variant": variant, "grid": (1, 8, 8)}
  if layers:
    config["vit"] = {"layers": layers, "full_layers": (layers - 1,)}
    config["llm"] = {"layers": layers}
  model, mod = models.build(
    ConfigDict({"model_name": "qwen2_5_vl", "model": config})
  )
  tokens = np.zeros((1, 16), np.int32)
  patch = 96 if variant == "tiny" else 1176
  params = jax.eval_shape(
    lambda: model.init(
      jax.random.key(0),
      tokens=tokens,
      segments=tokens,
      positions=np.zeros((1, 3, 16), np.int32),
      patches=np.zeros((1, 64, patch), np.float32),
    )["params"]
  )
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params
  )
  return params, mod.KEYS


def write(folder: pathlib.Path, variant: str, layers: int) -> None:
  import ml_dtypes
  import numpy as np

  from spatial_jax import hf, hf_write

  params, keys = abstract(variant, layers)
  rng = np.random.default_rng(0)

  def draw(shape):
    bits = rng.integers(2**16, size=shape, dtype=np.uint16)
    # Sign, one bit of the exponent and the mantissa: +-0.008 to 0.03.
    return ((bits & 0x80FF) | 0x3C00).view(ml_dtypes.bfloat16)

  outputs = [
    output._replace(make=lambda shape=output.shape: draw(shape))
    for output in hf.tensors(keys, params)
  ]
  total = sum(output.size for output in outputs)
  hf_write.write(str(folder), outputs, int(total / 3.7))


def read_alone(folder: pathlib.Path) -> float:
  import ml_dtypes  # noqa: F401 (tells NumPy of bfloat16)
  from safetensors.numpy import load_file

  start = time.perf_counter()
  kept = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
  seconds = time.perf_counter() - start
  assert kept
  return seconds


def read_ours(
  folder: pathlib.Path, variant: str, layers: int, devices: int
) -> tuple[float, float]:
  """Seconds, and GB of all shards together."""
  if devices:
    flag = f"--xla_force_host_platform_device_count={devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
  import jax

  from spatial_jax import hf, sharding

  params, keys = abstract(variant, layers)
  placed = sharding.parameters(params, sharding.mesh()) if devices else None
  jax.block_until_ready(jax.device_put(1.0))  # starts the device
  start = time.perf_counter()
  loaded = jax.block_until_ready(hf.load(keys, folder, params, placed))
  seconds = time.perf_counter() - start
  shards = [x.addressable_shards for x in jax.tree.leaves(loaded)]
  return seconds, sum(s.data.nbytes for x in shards for s in x) / 1e9


def child(which: str, args: argparse.Namespace) -> dict[str, float]:
  """Seconds and gigabytes of one program in a process of its own."""
  done = subprocess.run(
    [
      *(sys.executable, __file__, f"--folder={args.folder}"),
      *(f"--variant={args.variant}", f"--layers={args.layers}"),
      *(f"--devices={args.devices}", f"--child={which}"),
    ],
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def most_memory() -> float:
  """Most memory that this process held, in GB.

  `ru_maxrss` would start from the memory of the process that started this one.
  """
  with open("/proc/self/status") as file:
    line = next(line for line in file if line.startswith("VmHWM"))
  return int(line.split()[1]) * 1024 / 1e9


def main(argv=None) -> dict[str, float]:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--folder", type=pathlib.Path, required=True)
  parser.add_argument("--variant", default="3b")
  parser.add_argument("--layers", type=int, default=0)
  parser.add_argument("--devices", type=int, default=0)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--child", choices=("alone", "ours", "write"))
  args = parser.parse_args(argv)
  if args.child == "write":
    write(args.folder, args.variant, args.layers)
    return {}
  if args.child:
    out = {"shards": 0.0}
    if args.child == "alone":
      out["seconds"] = read_alone(args.folder)
    else:
      out["seconds"], out["shards"] = read_ours(
        args.folder, args.variant, args.layers, args.devices
      )
    print(json.dumps({**out, "peak": most_memory()}))
    return {}

  if not list(args.folder.glob("*.safetensors")):
    print(f"writing {args.folder}", flush=True)
    here = (sys.executable, __file__, f"--folder={args.folder}")
    more = (f"--variant={args.variant}", f"--layers={args.layers}")
    more += ("--child=write",)
    subprocess.run([*here, *more], check=True)
  files = sorted(args.folder.glob("*.safetensors"))
  size = sum(file.stat().st_size for file in files) / 1e9
  for file in files:
    with open(file, "rb") as stream:
      while stream.read(2**24):
        pass
  print(f"{len(files)} files, {size:.2f} GB")
  seconds = {"alone": [], "ours": []}
  peak = {"alone": 0.0, "ours": 0.0}
  shards = 0.0
  for number in range(args.rounds):
    # Neither profits from being second.
    for which in ("alone", "ours") if number % 2 == 0 else ("ours", "alone"):
      got = child(which, args)
      seconds[which].append(got["seconds"])
      peak[which] = max(peak[which], got["peak"])
      shards = max(shards, got["shards"])
    alone, ours = seconds["alone"][-1], seconds["ours"][-1]
    print(
      f"round {number + 1}: safetensors alone {alone:.2f} s, hf.load "
      f"{ours:.2f} s, ratio {ours / alone:.2f}",
      flush=True,
    )
  ratio = min(seconds["ours"]) / min(seconds["alone"])
  print(
    f"best of each: {min(seconds['alone']):.2f} s and "
    f"{min(seconds['ours']):.2f} s, ratio {ratio:.2f}\n"
    f"peak memory: {peak['alone']:.2f} GB and {peak['ours']:.2f} GB, which is "
    f"the {shards:.2f} GB of all shards and {peak['ours'] - shards:.2f} GB"
  )
  return {"ratio": ratio, "over": peak["ours"] - shards}


if __name__ == "__main__":
  main()
