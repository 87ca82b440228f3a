# SPDX-License-Identifier: Apache-2.0
"""Trains Molmo2 with STTS's scorer and pruned videos, on rendered rooms.

  python -m spatial_jax train --workdir=runs/stts \
    --config=configs/stts_sft.py:drop=0.5

A tiny model from scratch: 2000 steps of 16 rooms, seen in 4 frames of 64 x 64
pixels. The ViT drops `drop` of the 64 tokens of each room, so that the decoder
reads rows of 227 instead of 259 tokens at 0.5; `drop=0.0` is the same model
that sees all. `--config.model.keep_positions=True` leaves the tokens left where
they were; `--config.model.vision.bins=0.625` computes the ViT's last blocks on
5 frames for every 8.

Learning rates are the published ones relative to the decoder's: the scorer's is
10 times, the ViT's and connector's half of it. The published run fine-tunes
Molmo2-4B at 1e-5, with 200 of 6250 steps of warm-up and batches of 64 pairs of
videos of 64 frames. `test` is two steps.
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
  from spatial_jax.data import text

  arg = common.parse_arg(arg, drop=0.5, test=False)
  if not 0 <= arg.drop < 1:
    raise ValueError(f"drop={arg.drop}: expected a share from 0 to below 1")
  tokenizer = text.Tokenizer.load()
  c = common.defaults()
  frames, side, patch, pool, text_length = 4, 64, 8, 2, 192
  c.steps, c.batch_size = 2000, 16

  c.model_name = "stts"
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
  c.optimizer.lr_mult = (
    (r"vision/scorer/.*", 10.0),
    (r"vision/.*", 0.5),
    (r".*", 1.0),
  )
  c.evals.vsi = ConfigDict(
    {"name": "spatial_jax.evaluators.vsi", "every": 0, "split": "test"}
  )
  if arg.test:
    c.steps, c.batch_size = 2, 8
    c.data.world.rooms = 16
    c.evals.vsi.rooms = 8
  return c
