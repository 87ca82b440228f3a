# SPDX-License-Identifier: Apache-2.0
"""Cambrian-1 in its two stages: the aggregator alone, then the decoder as well.

  CONFIG=configs/cambrian.py:variant=8b,images=P,tokenizer=L
  python -m spatial_jax train --config=$CONFIG,stage=1,data=F --workdir=D \
    --config.init_from=L --config.init_parts.siglip=S --config.init_parts...
  python -m spatial_jax train --config=$CONFIG,stage=2,data=G --workdir=E \
    --config.init_from=D

F and G are JSONL files of conversations with at most one image (the published
ones have 2.5 and 7 million), P the folder of the images, L that of the language
model (Llama-3-8B-Instruct, Vicuna-1.5-13B, Nous-Hermes-2-Yi-34B). A part is a
published tower; see `models.cambrian.PART_KEYS`. Stage 2 may also start from a
published nyu-visionx/cambrian-* and the towers.

Without `data`, the stage trains on rendered rooms of the world, several images
a row. The published runs took less than 4 days on a TPU v4-512. Options:
`variant=8b|13b|34b`, `stage=1|2`, `data`, `images`, `tokenizer`, `test`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common
from spatial_jax.world import scene

# Template and index of the image among the tokens of a prompt.
PROMPTS = {
  "8b": ("llama_3", 91),
  "13b": ("vicuna_v1", 35),
  "34b": ("chatml_direct", 87),
  "tiny": ("chatml_direct", 8),
}
TOWERS = ("siglip", "clip", "dinov2", "convnext")
QUESTIONS = {
  "object_counting": 2,
  "object_abs_distance": 2,
  "object_rel_distance": 2,
  "camera_left_right": 2,
  "camera_front_behind": 2,
}


def get_config(arg: str = "") -> ConfigDict:
  arg = common.parse_arg(
    arg, variant="8b", stage=1, data="", images="", tokenizer="", test=False
  )
  if arg.stage not in (1, 2) or arg.variant not in PROMPTS:
    raise ValueError(
      f"stage={arg.stage}, variant={arg.variant!r}: expected stage 1 or 2 and "
      f"one of {', '.join(PROMPTS)}"
    )
  variant = "tiny" if arg.test else arg.variant
  c = common.defaults()
  c.model_name = "cambrian"
  c.model = ConfigDict(
    {
      "variant": variant,
      "dtype": "bfloat16",
      "remat": "full",
      # Its few layers aren't computed twice: 0.4 GiB an image, of a chip's 96.
      # "full" where memory is short.
      "sva": {"remat": "none"},
      "loss_tokens": 4096,
    }
  )
  if arg.data:
    _conversations(c, arg, variant)
  else:
    _rooms(c, variant)

  c.init_parts = ConfigDict({name: "" for name in TOWERS})
  is_large = variant == "34b"
  c.batch_size = 1024 if is_large else 512
  c.optimizer.update({"b2": 0.999, "weight_decay": 0.0})
  if arg.stage == 1:
    c.steps = 2_500_000 // c.batch_size
    c.optimizer.lr = 1e-3
    c.optimizer.lr_mult = (
      ("sva/(project.*|newline)/.*", 1.0),
      (".*", 0.1),
    )
    c.optimizer.freeze = (("sva/.*", False), (".*", True))
    c.optimizer.schedule.warmup = 0.06
    c.init_new = ("sva/.*",)
  else:
    c.steps = 7_000_000 // c.batch_size
    c.optimizer.lr = 2e-5 if is_large else 4e-5
    frozen = f"({'|'.join(TOWERS)})/.*"
    c.optimizer.freeze = ((frozen, True), (".*", False))
  if arg.test:  # four towers take too long to compile
    c.steps, c.batch_size = 2, 8
    c.model.update({"dtype": "float32", "remat": "none", "loss_tokens": 0})
    c.model.sva = ConfigDict({"groups": (4,), "depth": 1, "layers": 1})
    c.model.llm.layers = 3
  return c


def _conversations(c: ConfigDict, arg: ConfigDict, variant: str) -> None:
  from spatial_jax import models

  model, _ = models.build(c)
  towers = zip(model.towers, model.pixels, model.sides, strict=True)
  template, image_position = PROMPTS[variant]
  c.data.source = "spatial_jax.data.cambrian"
  c.data.files = ConfigDict({"train": arg.data})
  c.data.length = 2048
  c.data.dialogues = ConfigDict(
    {
      "images": arg.images,
      "tokenizer": arg.tokenizer,
      "template": template,
      "side": model.sva.get("side", 24),
      "towers": tuple(towers),
      "image_position": image_position,
    }
  )


def _rooms(c: ConfigDict, variant: str) -> None:
  from spatial_jax.data import text
  from spatial_jax.models import cambrian

  tokenizer = text.Tokenizer.load()
  c.model.image_token = tokenizer.token_id("<|video_pad|>")
  c.model.llm = ConfigDict({"vocab": tokenizer.vocab_size})
  side = cambrian.VARIANTS[variant]["sva"].get("side", 24)
  frames, image = 2, 16 * side
  visual = frames * side * (side + 1)
  # Fills the row to whole tiles of a TPU, 1408 tokens for 8b.
  text_length = 192 + -(visual + 3 + 192) % 64
  c.data.source = "spatial_jax.world.dataset"
  c.data.length = visual + 3 + text_length
  c.data.world = ConfigDict(
    {
      "seed": 0,
      "rooms": 1_000_000,
      "frames": frames,
      "image_size": image,
      "patch_size": image // side,
      "merge_size": 1,
      "visual_tokens": visual,
      "text_length": text_length,
      "chunk": text_length,
      "questions_per_room": QUESTIONS,
      "scene": scene.SIMPLE,
    }
  )
  c.data.render = ConfigDict({"depth": True})
  c.evals.vsi = ConfigDict(
    {"name": "spatial_jax.evaluators.vsi", "every": 0, "rooms": 8}
  )
