# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes Spatial-MLLM on conversations about videos, or on rendered rooms.

  python -m spatial_jax train --workdir=runs/spatial_mllm \
    --config=configs/spatial_mllm_sft.py:variant=v1_1,init=DIR,data=FILE
  python -m spatial_jax train --config=configs/spatial_mllm_sft.py:world \
    --workdir=runs/rooms

`data` is a file of conversations, `root` where their videos are
(spatial_jax/data/videos.py), `init` a folder with published weights and
tokenizer.json. To start as the published models did, `init` is that of
Qwen2.5-VL-3B-Instruct and `vggt` that of VGGT-1B; the connector is new.

VGGT and the vision tower are frozen, but for its merger. Merger and connector
learn at 2e-5, the decoder at 7e-6; 48 videos a step, one epoch. Weights in
bfloat16, with float32 copies of those that are trained: 11 GB, and 12 bytes for
each of 3.4 billion trained parameters, over all devices.

A row holds up to `questions` conversations about its video, which share one
pass of both towers. With `cache=DIR` VGGT doesn't run at all: its tokens are
read from there, 102 MB a video, where this wrote them:

  python -m spatial_jax cache --config=configs/spatial_mllm_sft.py:...,cache=DIR

`world` trains a tiny model from scratch; `test` is two steps of it, with what
is published as frozen.
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
FROZEN = (("vit/merger/.*", False), ("vit/.*", True))


def get_config(arg: str = "") -> ConfigDict:
  arg = common.parse_arg(
    arg,
    variant="v1_1",
    init="",
    vggt="",
    data="",
    root="",
    questions=8,
    cache="",
    world=False,
    test=False,
  )
  c = common.defaults()
  c.model_name = "spatial_mllm"
  c.init_from = arg.init
  if arg.world or arg.test:
    _rooms(c)
  else:
    _videos(c, arg)
  if arg.test:
    c.steps, c.batch_size = 2, 8
    c.optimizer.freeze = (*FROZEN, ("vggt/.*", True), (".*", False))
    c.data.world.rooms = 16
    c.evals.vsi.rooms = 8
  return c


def _videos(c: ConfigDict, arg: ConfigDict) -> None:
  c.steps, c.batch_size = 2800, 48  # one epoch of 135k questions alone
  c.model = ConfigDict(
    {
      "variant": arg.variant,
      "dtype": "bfloat16",
      "remat": "full",
      "loss_tokens": 4096,
    }
  )
  if arg.vggt:
    c.init_new = ("connector/.*",)
    c.init_parts = ConfigDict({"vggt": arg.vggt})
  c.data.source = "spatial_jax.data.videos"
  c.data.files = ConfigDict({"train": arg.data})
  c.data.length = 4096
  # 640 x 480 pixels within the published budget.
  c.data.media = ConfigDict(
    {
      "frames": 16,
      "images": 0,
      "height": 476,
      "width": 644,
      "patch": 14,
      "merge": 2,
      "temporal": 2,
    }
  )
  c.data.videos = ConfigDict(
    {
      "root": arg.root,
      "tokenizer": arg.init,
      "questions": arg.questions,
      "second_per_grid": 0.5,
      "cache": arg.cache,
    }
  )
  rate = 7e-6
  c.optimizer.update(
    {"lr": rate, "b2": 0.999, "weight_decay": 0.1, "master": True}
  )
  # As published: scales of RMS norms are decayed, too.
  c.optimizer.decay = ((".*/bias", False), (".*", True))
  c.optimizer.lr_mult = (
    ("(vit/merger|connector)/.*", 2e-5 / rate),
    (".*", 1.0),
  )
  c.optimizer.freeze = (*FROZEN, ("vggt/.*", True), (".*", False))
  if arg.cache:
    c.model.vggt = None
    c.data.media.geometry = (16, 34 * 46, 2048)
    c.optimizer.freeze = (*FROZEN, (".*", False))


def _rooms(c: ConfigDict) -> None:
  """A tiny model on rooms that are rendered inside the step."""
  from spatial_jax.data import text

  tokenizer = text.Tokenizer.load()
  text_length, chunk = 192, 48
  c.model = ConfigDict(
    {
      "variant": "tiny",
      "image_token": tokenizer.token_id("<|image_pad|>"),
      "video_token": tokenizer.token_id("<|video_pad|>"),
      # Views of a room aren't alike enough to make one token of two.
      "vit": {"temporal_patch": 1},
      "llm": {"vocab": tokenizer.vocab_size, "one_hot": True},
    }
  )
  c.data.source = "spatial_jax.world.dataset"
  c.data.length = 4 * 4 * 4 + 3 + text_length
  c.data.world = ConfigDict(
    {
      "seed": 0,
      "rooms": 1_000_000,
      "frames": 4,
      "image_size": 64,
      "patch_size": 8,
      "merge_size": 2,
      "text_length": text_length,
      "chunk": chunk,
      "questions_per_room": QUESTIONS,
    }
  )
  c.data.media = ConfigDict({"frames": 4, "height": 64, "width": 64})
  c.data.render = ConfigDict({"frames": True})
  c.steps, c.batch_size = 2000, 16
  # Nothing was trained before, so nothing is frozen.
  c.optimizer.update({"lr": 1e-3, "b2": 0.98})
  c.evals.vsi = ConfigDict(
    {"name": "spatial_jax.evaluators.vsi", "every": 0, "split": "test"}
  )
