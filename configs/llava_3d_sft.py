# SPDX-License-Identifier: Apache-2.0
"""Trains LLaVA-3D on conversations about RGB-D scenes, or on rendered rooms.

  python -m spatial_jax train --workdir=runs/llava_3d \
    --config=configs/llava_3d_sft.py:stage=2,init=DIR,data=FILE,info=FILE,root=DIR
  python -m spatial_jax train --config=configs/llava_3d_sft.py:world \
    --workdir=runs/rooms
  python -m spatial_jax view --config=configs/llava_3d_sft.py:frames=DIR \
    --workdir=runs/look

`data`, `info`, `root`: conversations, scenes and where their frames are
(spatial_jax/data/scenes.py). `init` is a folder with published weights and
tokenizer.json: LLaVA-3D's, or those of LLaVA-1.5 and CLIP together for stage 1,
to which the embeddings of points are new (`new`).

Stage 1 trains the projector and both embeddings of points at 1e-3, stage 2 all
but CLIP at 2e-5; 1 epoch of batches of 128 and 64 each. The released stage 1
leaves the embeddings as they were drawn, unless told otherwise. 7.1 billion
parameters with their optimizer need about 115 GB over all devices.

`world` trains a tiny model from scratch on rooms with true depth and poses;
`test` is two steps of it. `frames` is a folder of posed RGB-D frames for `view`
(spatial_jax/data/rgbd.py).
"""

from ml_collections import ConfigDict

from configs import common

# Per room; what doesn't fit in the row is dropped.
QUESTIONS = {
  "object_counting": 2,
  "object_abs_distance": 4,
  "object_size_estimation": 2,
  "object_rel_distance": 3,
  "object_rel_direction_easy": 3,
  "object_rel_direction_medium": 3,
}


def get_config(arg: str = "") -> ConfigDict:
  arg = common.parse_arg(
    arg,
    variant="7b",
    stage=2,
    init="",
    new=False,
    data="",
    info="",
    root="",
    world=False,
    frames="",
    test=False,
  )
  if arg.stage not in (1, 2):
    raise ValueError(f"stage={arg.stage}: expected 1 or 2")
  c = common.defaults()
  c.model_name = "llava_3d"
  c.init_from = arg.init
  c.batch_size = 128 if arg.stage == 1 else 64
  c.optimizer.update({"lr": 1e-3 if arg.stage == 1 else 2e-5, "b2": 0.999})
  c.optimizer.freeze = (("vit/.*", True), (".*", False))
  if arg.stage == 1:
    c.optimizer.freeze = ((r"(vit|llm)/.*", True), (".*", False))
  if arg.world or arg.test:
    _rooms(c)
  else:
    _scenes(c, arg)
  if arg.frames:
    _frames(c, arg.frames)
  if arg.test:
    c.steps, c.batch_size = 2, 8
    c.data.world.rooms = 16
    c.evals.vsi.rooms = 8
  return c


def _scenes(c: ConfigDict, arg: ConfigDict) -> None:
  c.model = ConfigDict(
    {
      "variant": arg.variant,
      "dtype": "bfloat16",
      "remat": "products",
      "loss_tokens": 4096,
    }
  )
  if arg.new:
    c.init_new = ("(lift|click_embed)/.*",)
  c.data.source = "spatial_jax.data.scenes"
  c.data.files = ConfigDict({"train": arg.data})
  c.data.scenes = ConfigDict(
    {
      "info": arg.info,
      "root": arg.root,
      "images": "",
      "tokenizer": arg.init,
      "slots": 2560,
    }
  )
  c.data.length = 4096
  c.data.scene = ConfigDict({"frames": 20, "side": 336, "clicks": 16})


def _frames(c: ConfigDict, folder: str) -> None:
  """What `view` shows; intrinsics are for folders without a file of them."""
  c.data.rgbd = ConfigDict(
    {
      "folder": folder,
      "frames": 64,
      "intrinsics": (),  # fx, fy, cx, cy
      "depth_scale": 1000.0,
      "patch": 14,
      "voxel_size": 0.2,
    }
  )


def _rooms(c: ConfigDict) -> None:
  """A tiny model on rooms that are rendered inside the step."""
  from spatial_jax.data import text

  tokenizer = text.Tokenizer.load()
  # 4 frames of 8 x 8 patches fill about 165 voxels of this size.
  slots, text_length, chunk = 192, 192, 48
  pad = tokenizer.token_id("<|video_pad|>")
  c.model = ConfigDict({"variant": "tiny", "image_token": pad})
  c.model.llm = ConfigDict({"vocab": tokenizer.vocab_size, "one_hot": True})
  c.model.lift = ConfigDict({"capacity": slots, "voxel_size": 0.6})
  c.data.source = "spatial_jax.world.dataset"
  c.data.length = slots + 3 + text_length
  c.data.world = ConfigDict(
    {
      "seed": 0,
      "rooms": 1_000_000,
      "frames": 4,
      "image_size": 64,
      "patch_size": 8,
      "merge_size": 1,
      "visual_tokens": slots,
      "text_length": text_length,
      "chunk": chunk,
      "questions_per_room": QUESTIONS,
    }
  )
  c.data.scene = ConfigDict({"frames": 4, "side": 64})
  c.data.render = ConfigDict({"depth": True})
  c.steps, c.batch_size = 2000, 16
  c.optimizer.update({"lr": 1e-3, "b2": 0.98})
  c.optimizer.freeze = ((".*", False),)  # nothing was trained before
  c.evals.vsi = ConfigDict(
    {
      "name": "spatial_jax.evaluators.vsi",
      "every": 0,
      "split": "test",
      "rooms": 256,
    }
  )
