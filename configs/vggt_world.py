# SPDX-License-Identifier: Apache-2.0
"""A small VGGT from random weights on rendered rooms: cameras, depth, points.

  python launch/vggt_world.py --workdir=runs/vggt

trains `cpu` on two CPU cores, scores it on rooms never seen, draws fused clouds
beside the truth and stores the weights. Or by hand:

  python -m spatial_jax train --config=configs/vggt_world.py:cpu --workdir=D
  python -m spatial_jax evaluate --config=configs/vggt_world.py:cpu --workdir=D
  python -m spatial_jax reconstruct --checkpoint=D --images=PHOTOS --workdir=E

Without an option: the same on an accelerator, with larger frames, textured
rooms and a wider model; it has not been run to its end. `test`: two tiny steps.
"""

from ml_collections import ConfigDict

from configs import common
from spatial_jax.world import scene


def get_config(arg: str = "") -> ConfigDict:
  arg = common.parse_arg(arg, cpu=False, test=False)
  small = arg.cpu or arg.test
  c = common.defaults()
  c.model_name = "vggt"
  c.model.variant = "demo"
  c.model.loss_weights = ConfigDict(
    {"camera": 1.0, "depth": 1.0, "points": 1.0}
  )
  c.data.source = "spatial_jax.world.views"
  c.data.views = ConfigDict(
    {
      "seed": 0,
      "rooms": 1_000_000,
      "frames": 4,
      "image_size": 32 if small else 224,
      "fov_degrees": 100.0,
      "scene": dict(scene.SIMPLE) if small else {},
    }
  )
  c.data.render = ConfigDict({"module": "world.photograph", "shadows": False})

  c.optimizer.update(
    {"name": "muon", "lr": 0.02, "b2": 0.98, "weight_decay": 0.01}
  )
  c.optimizer.muon.matrices = (
    (r"(.*/)?(blocks|trunk)/.*kernel", True),
    (".*", False),
  )
  # What all cameras have in common is learned within a few steps.
  c.optimizer.lr_mult = (("camera/refine/down/bias", 10.0), (".*", 1.0))
  c.optimizer.schedule.update(
    {"constant": 0.4, "decay": "linear", "final": 0.02}
  )
  c.batch_size, c.steps = 16, 480
  c.checkpoint.every = 10_000
  c.evals.geometry = ConfigDict(
    {"name": "spatial_jax.evaluators.geometry", "every": 0, "split": "test"}
  )
  # Saves memory; on CPU it is faster too than stacking what a scan saves.
  c.model.remat = "full"
  if small:
    # Half of the features cost a third of the time, and nothing in scores.
    c.model.update({"dpt_features": 8, "dpt_channels": (8, 8, 8, 8)})
  else:
    c.model.update(
      {
        "width": 384,
        "heads": 6,
        "mlp_ratio": 4,
        "registers": 4,
        "vit_heads": 6,
        "vit_depth": 6,
        "depth": 8,
        "patch": 14,
        "image_size": 224,
        "camera_heads": 12,
        "dpt_layers": (1, 3, 5, 7),
        "dpt_features": 96,
        "dpt_channels": (96, 192, 192, 192),
        "dtype": "bfloat16",
      }
    )
    c.batch_size, c.steps = 64, 50_000
  if arg.test:
    c.optimizer.name = "adamw"
    c.steps, c.batch_size = 2, 8
    c.model.update(
      {
        "width": 16,
        "heads": 1,
        "depth": 2,
        "vit_heads": 1,
        "vit_depth": 1,
        "image_size": 16,
        "camera_heads": 2,
        "camera_depth": 1,
        "dpt_layers": (0, 0, 1, 1),
      }
    )
    c.data.views.update({"frames": 2, "image_size": 16})
    c.evals.geometry.update({"rooms": 8, "constant_rooms": 8})
    c.evals.geometry.batch_size = 8
  return c
