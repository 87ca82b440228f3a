# SPDX-License-Identifier: Apache-2.0
"""The five mechanisms on one small backbone: same rooms, questions, optimizer.

  python launch/world_compare.py --workdir=runs/compare            # two CPU cores
  python launch/world_compare.py --workdir=runs/compare --config=gpu

trains and scores every row of `ROWS`, and writes one table and plots. Or one of
the models by hand, as the command does it:

  C=configs/world_compare.py
  python -m spatial_jax train --config=$C:stage=vision,cpu --workdir=V
  python -m spatial_jax train --config=$C:stage=vggt,cpu --workdir=G
  python -m spatial_jax train --config=$C:row=dual,cpu,vggt=G/weights \
    --workdir=D --config.init_from=V

All rows start from the same vision tower, trained as that of configs/demo.py,
and from a VGGT that was trained on rooms, if they have one; the rest is new.
`seed` changes first values and the order of rooms. `test`: two tiny steps.
"""

from ml_collections import ConfigDict

from configs import common, demo, vggt_world
from spatial_jax.models import vggt

_DEMO = vggt.VARIANTS["demo"]
_NAMES = ("width", "depth", "heads", "patch", "image_size", "vit_depth")
_NAMES += ("vit_heads", "layer_scale", "token_std")
VGGT = {name: _DEMO[name] for name in _NAMES}


def _prune(drop):
  return {"vit": {"prune": {"drop": drop, "after": 0}}}


# What a row's model has beyond the plain one.
ROWS = {
  "plain": {},
  "dual": {"vggt": VGGT, "stages": ("fuse",)},
  "sva": {"vggt": VGGT, "sva": {"width": 96, "depth": 2, "heads": 3}},
  # True depth and poses.
  "patches_3d": {"lift": {"level": True, "samples": 4, "waves": 6}},
  "forcing": {
    "align": {"layer": 2, "width": 2 * _DEMO["width"], "weight": 0.5},
    "teacher": VGGT,
  },
  "pruned_30": _prune(0.3),
  "pruned_50": _prune(0.5),
  "pruned_70": _prune(0.7),
}
# Parameters that the vision stage doesn't have.
NEW = r"(vggt|connector|sva|lift|align|teacher|vit/scorer)/.*"


def get_config(arg: str = "") -> ConfigDict:
  arg = common.parse_arg(
    arg,
    row="plain",
    stage="joint",
    seed=0,
    vggt="",
    cpu=True,
    gpu=False,
    test=False,
  )
  if arg.row not in ROWS or arg.stage not in ("vision", "vggt", "joint"):
    raise ValueError(
      f"row={arg.row!r}, stage={arg.stage!r}: expected a row of "
      f"{', '.join(ROWS)} and a stage of vision, vggt, joint"
    )
  if arg.stage == "vggt":
    c = vggt_world.get_config("test" if arg.test else "cpu")
    if not arg.test:
      c.steps = 4000 if arg.gpu else 150
    c.seed = arg.seed
    return c
  is_vision = arg.stage == "vision"
  options = ["stage=vision"] * is_vision + ["test"] * arg.test
  c = demo.get_config(",".join(options))
  c.seed = c.data.seed = arg.seed
  if not arg.test:
    c.steps = 250 if is_vision else 300
    c.evals.vsi.rooms = 192
  if arg.gpu:
    c.steps, c.batch_size = 4000, 64
    c.evals.vsi.rooms = 1024
  if not is_vision:
    _mechanism(c, arg)
  return c


def _mechanism(c: ConfigDict, arg: ConfigDict) -> None:
  row = ConfigDict(ROWS[arg.row])
  c.model_name = "mechanisms"
  c.model.update(row)
  c.data.render.frames = True
  c.data.render.depth = "lift" in row
  frozen = [name for name in ("vggt", "teacher") if name in row]
  c.init_new = (*c.init_new, *([NEW] if row else []))
  if arg.vggt:
    c.init_parts = ConfigDict({name: arg.vggt for name in frozen})
  else:
    frozen = ["teacher"] * ("teacher" in row)
  c.optimizer.freeze = (
    *((f"{name}/.*", True) for name in frozen),
    (".*", False),
  )
  if "vit" in row:
    from spatial_jax.data import stts

    world = c.data.world
    group = (world.image_size // world.patch_size // world.merge_size) ** 2
    lost = stts.budget(world.frames, group, row.vit.prune.drop)
    prefix, chunk = c.model.llm.packing
    c.model.llm.packing = (prefix - lost, chunk)
  if arg.test:
    c.model.vit.layers = 2  # the scorer needs one block after its own
