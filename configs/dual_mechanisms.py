# SPDX-License-Identifier: Apache-2.0
"""Where a trained model keeps space: probes, patches, ablations, steering.

  python launch/demo.py --workdir=runs/demo
  python -m spatial_jax analyse --config=configs/dual_mechanisms.py:model=demo \
    --workdir=runs/demo/seeing

Writes runs/demo/seeing/analysis/{analysis.json,*.svg,*.png,index.html}. This is
the recipe of the model plus the sizes of the analysis, so everything else can
be done with it too. Options: `model` (a file of configs/ whose model sees rooms
as a grid of tokens), then the options of that recipe, and `test`. What is done
and why: The Dual Mechanisms of Spatial Reasoning in VLMs, arXiv 2603.22278.
"""

import importlib

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
  parts = [part for part in (arg or "").split(",") if part]
  model = "demo"
  for part in parts:
    name, _, value = part.partition("=")
    if name == "model":
      model = value
  rest = [part for part in parts if not part.startswith("model=")]
  try:
    recipe = importlib.import_module(f"configs.{model}")
  except ModuleNotFoundError as error:
    if error.name != f"configs.{model}":
      raise
    raise ValueError(
      f"model={model!r}: there is no configs/{model}.py"
    ) from None
  c = recipe.get_config(",".join(rest))
  # Pairs of things that are asked about, on each of the two axes; multiples of
  # the batch. The rooms of a split are as many as are needed.
  c.analyse = ConfigDict(
    {
      "rooms": 4096,
      "batch": 32,
      "probe": 256,
      "patch": 128,
      "ablate": 128,
      "steer": 128,
      "seed": 0,
    }
  )
  if "test" in rest:
    c.analyse.update(dict.fromkeys(("probe", "patch", "ablate", "steer"), 8))
    c.analyse.update({"batch": 8, "rooms": 64})
  return c
