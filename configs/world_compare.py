# SPDX-License-Identifier: Apache-2.0
"""The five mechanisms on one small backbone: same rooms, questions, optimizer.

  python launch/world_compare.py --workdir=runs/compare
  python launch/world_compare.py --workdir=runs/compare --config=gpu

trains and scores every row of `ROWS`, and writes one table and plots. Or one of
the models by hand, as the command does it:

  C=configs/world_compare.py
  python -m spatial_jax train --config=$C:stage=vision,cpu --workdir=V
  python -m spatial_jax train --config=$C:stage=base,cpu --workdir=B \
    --config.init_from=V
  python -m spatial_jax train --config=$C:stage=vggt,cpu --workdir=G
  python -m spatial_jax train --config=$C:row=dual,cpu,vggt=G/weights \
    --workdir=D --config.init_from=B

As the published systems start from a model that sees and reads, all rows start
from the same plain one, half trained as that of configs/demo.py, and from a
VGGT that was trained on rooms, if they have one; only the mechanism is new.
`seed` changes first values and the order of rooms. `test`: two tiny steps.
"""

from ml_collections import ConfigDict

from configs import common, demo, vggt_world
from spatial_jax.models import vggt


def _stage(test: bool) -> ConfigDict:
  """A VGGT that sees frames as large as those of the rows."""
  c = vggt_world.get_config("test" if test else "cpu")
  if not test:
    c.steps, c.batch_size = 200, 8
    c.data.views.image_size = c.model.image_size = 64
    # Rows take its tokens; the dense heads only teach it.
    c.model.update({"dpt_features": 8, "dpt_channels": (8,) * 4})
  return c


def _vggt(test: bool) -> dict:
  """The part of the stage's VGGT that makes tokens."""
  names = ("width", "depth", "heads", "patch", "image_size", "vit_depth")
  names += ("vit_heads", "mlp_ratio", "registers", "layer_scale", "token_std")
  names += ("position_std",)
  model = {**vggt.VARIANTS["demo"], **_stage(test).model.to_dict()}
  return {name: model[name] for name in names} | {"keep": (model["depth"] - 1,)}


def rows(test: bool = False) -> dict[str, dict]:
  """What the model of each row has beyond the plain one."""
  geometry = _vggt(test)
  # The first block sees all, the second scores as bias, the third what stays.
  pruned = {
    f"pruned_{percent}": {"vit": {"prune": {"drop": percent / 100, "after": 0}}}
    for percent in (30, 50, 70)
  }
  return {
    "plain": {},
    "dual": {"vggt": geometry, "stages": ("fuse",)},
    "sva": {"vggt": geometry, "sva": {"width": 96, "depth": 2, "heads": 3}},
    # True depth and poses.
    "patches_3d": {"lift": {"level": True, "samples": 4, "waves": 6}},
    "forcing": {
      "align": {"layer": 2, "width": 2 * geometry["width"]},
      "teacher": geometry,
    },
    **pruned,
  }


# What geometry is good for. All twelve types of the demo need longer training
# until directions are learned than fits the time on two cores.
QUESTIONS = {
  "object_abs_distance": 3,
  "object_rel_distance": 2,
  "object_rel_direction_easy": 3,
  "object_rel_direction_medium": 3,
  "object_rel_direction_hard": 4,
  "camera_left_right": 2,  # launch/mechanisms.py asks for it
}
TOKENS = ("ground", "gather", "angle", "distance", "number", "verify")
CHUNKS = 4

# Parameters that the plain model doesn't have.
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
  known = rows(arg.test)
  stages = ("vision", "base", "vggt", "joint")
  if arg.row not in known or arg.stage not in stages:
    raise ValueError(
      f"row={arg.row!r}, stage={arg.stage!r}: expected a row of "
      f"{', '.join(known)} and a stage of {', '.join(stages)}"
    )
  if arg.stage == "vggt":
    c = _stage(arg.test)
    if arg.gpu:
      c.steps = 4000
    c.seed = arg.seed
    return c
  is_vision = arg.stage == "vision"
  options = ["stage=vision"] * is_vision + ["test"] * arg.test
  c = demo.get_config(",".join(options))
  c.seed = c.data.seed = arg.seed
  c.data.world.questions_per_room = ConfigDict(QUESTIONS)
  c.data.world.text_length = c.data.world.chunk * CHUNKS
  c.data.length = c.model.llm.packing[0] + c.data.world.text_length
  if not is_vision:
    for name in set(demo.TOKENS) - set(TOKENS):
      del c.auxiliary[name]
  if not arg.test:
    c.steps = {"vision": 200, "base": 300, "joint": 240}[arg.stage]
    c.evals.vsi.rooms = 256
  if arg.gpu:
    c.steps, c.batch_size = 4000, 64
    c.evals.vsi.rooms = 1024
  if arg.test:
    c.optimizer.name = "adamw"
    c.model.vit.layers = 2  # the scorer needs one block after its own
  if arg.stage == "base":
    c.optimizer.schedule.final = 0.5  # the rows go on
  if arg.stage == "joint":
    c.init_new = ()
    _mechanism(c, ConfigDict(known[arg.row]), arg.vggt)
  return c


def _mechanism(c: ConfigDict, row: ConfigDict, weights: str) -> None:
  c.model_name = "mechanisms"
  c.model.update(row)
  c.data.render.frames = True
  c.data.render.depth = "lift" in row
  if row:
    c.init_new = (NEW,)
  # As published, who sees geometry stays as it was trained.
  parts = [name for name in ("vggt", "teacher") if name in row]
  frozen = [f"{name}/.*" for name in parts if weights or name == "teacher"]
  c.optimizer.freeze = (*((name, True) for name in frozen), (".*", False))
  if weights:
    c.init_parts = ConfigDict(dict.fromkeys(parts, weights))
  if "vit" in row:
    from spatial_jax.data import stts

    world = c.data.world
    group = (world.image_size // world.patch_size // world.merge_size) ** 2
    lost = stts.budget(world.frames, group, row.vit.prune.drop)
    prefix, chunk = c.model.llm.packing
    c.model.llm.packing = (prefix - lost, chunk)
