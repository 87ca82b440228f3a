# SPDX-License-Identifier: Apache-2.0
"""Trains Molmo2 with STTS's scorer and pruned videos.

  python -m spatial_jax train --workdir=runs/stts \
    --config=configs/stts_sft.py:variant=4b,init=DIR,data=FILE
  python -m spatial_jax train --workdir=runs/rooms \
    --config=configs/stts_sft.py:drop=0.5

`variant=4b|8b` fine-tunes all of Molmo2 on conversations about videos
(spatial_jax/data/molmo2_videos.py): `init` is a folder with the published
weights and tokenizer.json, `root` where the videos are; the scorer is new. A
row has two videos (`videos=4`: four) of 64 frames and up to 2251 other tokens
for each; 9686 are left for the decoder at `drop=0.5`, as published. The ViT's
last blocks compute 72 frames of 128 then; a batch for which that is too few
takes all.

Without a variant it is a tiny model from scratch: 2000 steps of 16 rooms, seen
in 4 frames of 64 x 64 pixels. The ViT drops `drop` of the 64 tokens of each
room, so that the decoder reads rows of 227 instead of 259 tokens at 0.5;
`drop=0.0` is the same model that sees all. `--config.model.keep_positions=True`
leaves the tokens left where they were; `--config.model.vision.bins=0.625`
computes the ViT's last blocks on 5 frames for every 8.

Learning rates are the published ones, or relative to the decoder's as there:
the scorer's is 10 times, the ViT's and connector's half of it. `test` is two
steps.
"""

from ml_collections import ConfigDict

from configs import common

LEARN = ((r"vision/scorer/.*", 10.0), (r"vision/.*", 0.5), (r".*", 1.0))

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
    drop=0.5,
    variant="tiny",
    init="",
    data="",
    root="",
    videos=2,
    test=False,
  )
  if not 0 <= arg.drop < 1:
    raise ValueError(f"drop={arg.drop}: expected a share from 0 to below 1")
  c = common.defaults()
  c.model_name = "stts"
  c.optimizer.lr_mult = LEARN
  if arg.variant == "tiny" or arg.test:
    _rooms(c, arg)
  else:
    _videos(c, arg)
  if arg.test:
    c.steps, c.batch_size = 2, 8
    c.data.world.rooms = 16
    c.evals.vsi.rooms = 8
  return c


def _videos(c: ConfigDict, arg: ConfigDict) -> None:
  from spatial_jax.data import stts

  videos, frames, groups, words = arg.videos, 64, 81, 2251
  c.steps, c.batch_size = 6250, 64
  c.model = ConfigDict(
    {
      "variant": arg.variant,
      "dtype": "bfloat16",
      "remat": "full",
      "loss_tokens": 4096,
      "vision": {"drop": arg.drop, "bins": min(1.0, 1 - arg.drop + 1 / 16)},
    }
  )
  c.init_from = arg.init
  c.init_new = (r"vision/scorer/.*",)
  lost = stts.budget(frames, groups, arg.drop)
  c.data.source = "spatial_jax.data.molmo2_videos"
  c.data.files = ConfigDict({"train": arg.data})
  length = videos * (frames * groups + words)
  # Whole blocks of attention's kernels.
  c.data.length = _blocks(length)
  c.data.kept = _blocks(length - videos * lost)
  c.data.frames = videos * frames
  c.data.videos = ConfigDict(
    {
      "root": arg.root,
      "tokenizer": arg.init,
      "frames_per_video": frames,
      "side": 378,
      "groups": groups,
      "seconds": 0.5,
    }
  )
  c.optimizer.update({"lr": 1e-5, "b2": 0.95, "master": True})
  c.optimizer.schedule.update({"warmup": 200 / c.steps, "decay": "cosine"})


def _blocks(length: int) -> int:
  return -(-length // 128) * 128


def _rooms(c: ConfigDict, arg: ConfigDict) -> None:
  """A tiny model on rooms that are rendered inside the step."""
  from spatial_jax.data import text

  tokenizer = text.Tokenizer.load()
  frames, side, patch, pool, text_length = 4, 64, 8, 2, 192
  c.steps, c.batch_size = 2000, 16

  pad = tokenizer.token_id("<|video_pad|>")
  c.model = ConfigDict({"variant": "tiny", "image_token": pad})
  c.model.llm = ConfigDict({"vocab": tokenizer.vocab_size, "one_hot": True})
  c.model.vision = ConfigDict({"drop": arg.drop, "bins": 1.0})
  c.model.keep_positions = False

  tokens = frames * (side // patch // pool) ** 2
  c.data.source = "spatial_jax.world.dataset"
  c.data.length = tokens + 3 + text_length
  c.data.frames = frames
  c.data.world = ConfigDict(
    {
      "seed": 0,
      "rooms": 1_000_000,
      "frames": frames,
      "image_size": side,
      "patch_size": patch,
      "merge_size": pool,
      "visual_tokens": tokens,
      "text_length": text_length,
      "chunk": 48,
      "questions_per_room": QUESTIONS,
    }
  )
  c.data.render = ConfigDict({"depth": True})  # whole images

  c.optimizer.update({"lr": 1e-3, "b2": 0.98})
  c.evals.vsi = ConfigDict(
    {"name": "spatial_jax.evaluators.vsi", "every": 0, "split": "test"}
  )
