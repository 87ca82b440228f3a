# SPDX-License-Identifier: Apache-2.0
"""A small spatial VLM from random weights on rendered rooms, in minutes.

  python -m spatial_jax train --config=configs/demo.py:stage=vision --workdir=D
  python -m spatial_jax train --config=configs/demo.py --workdir=E \
    --config.init_from=D
  python -m spatial_jax train --config=configs/demo.py:blind --workdir=F
  python -m spatial_jax evaluate --config=configs/demo.py --workdir=E

`make demo` runs all of it on two CPU cores in 8 to 12 minutes and writes a
report: VSI macro 63 to 68 on rooms never seen, as numbers are rounded,
31.9 for the blind model. Options: `stage=vision|joint`, `blind` (the same
questions, no images), `layouts=FILE` (evaluate on real rooms in the VSI-Bench
meta format), `test`.
"""

from ml_collections import ConfigDict

from configs import common
from spatial_jax.data import text
from spatial_jax.world import scene

# Per room and pass; what doesn't fit in data.world.text_length is dropped.
QUESTIONS = {
  "object_counting": 2,
  "object_abs_distance": 3,
  "object_size_estimation": 2,
  "room_size_estimation": 1,
  "object_rel_distance": 3,
  "object_rel_direction_easy": 3,
  "object_rel_direction_medium": 3,
  "object_rel_direction_hard": 3,
  "route_planning": 3,
  "obj_appearance_order": 1,
  "camera_left_right": 1,
  "camera_front_behind": 1,
}
# Enough different things in a room to ask about.
SCENE = scene.SIMPLE | {
  "max_objects": 12,
  "max_primitives": 48,
  "objects": (6, 12),
  "distinct": (6, 8),
  "repeated": 0.3,
}
DENSE = {"category": 0.5, "point": 0.5, "room_point": 0.5, "align": 0.5}
# Token terms: (weight, after which block of the language model).
TOKENS = {
  "ground": (1.0, 2),
  "gather": (1.0, 3),
  "angle": (1.0, 4),
  "distance": (1.0, 4),
  "count": (0.5, 3),
  "first": (0.5, 3),
  "bearing": (0.5, 3),
  "number": (0.3, 5),
  "verify": (1.0, 5),
}


def get_config(arg: str = "") -> ConfigDict:
  arg = common.parse_arg(
    arg, stage="joint", blind=False, layouts="", test=False
  )
  if arg.stage not in ("vision", "joint"):
    raise ValueError(f"stage={arg.stage!r}: expected vision or joint")
  tokenizer = text.Tokenizer.load()
  c = common.defaults()
  c.model_name = "qwen2_5_vl"
  c.model.variant = "demo"
  c.model.image_token = tokenizer.token_id("<|image_pad|>")
  c.model.video_token = tokenizer.token_id("<|video_pad|>")
  # <vision> 64 tokens </vision> preamble, then the questions in chunks.
  prefix, chunk, chunks = 1 if arg.blind else 67, 48, 6
  c.model.llm = ConfigDict(
    {"vocab": tokenizer.vocab_size, "packing": (prefix, chunk)}
  )

  c.data.source = "spatial_jax.world.dataset"
  c.data.length = prefix + chunk * chunks
  c.data.world = ConfigDict(
    {
      "seed": 0,
      "rooms": 1_000_000,
      "frames": 4,
      "image_size": 64,
      "patch_size": 8,
      "merge_size": 2,
      "text_length": chunk * chunks,
      "chunk": chunk,
      "questions_per_room": QUESTIONS,
      "scene": SCENE,
      "blind": arg.blind,
      "layouts_path": arg.layouts,
      # Real rooms are few: look at each from several places.
      "draws": 6 if arg.layouts else 1,
    }
  )
  if not arg.blind:
    c.data.render = ConfigDict({"dense": True, "shadows": False})
    c.auxiliary = ConfigDict(DENSE)
    if arg.stage == "vision":
      c.auxiliary.answer = 0.0
    else:
      c.auxiliary.update(TOKENS)
      # The vision stage has trained all but the heads of the token terms.
      c.init_new = (f"aux/({'|'.join(TOKENS)})/.*",)
      c.optimizer.lr_mult = (("vit/.*", 0.3), (".*", 1.0))
    c.init.match_query_key = (2, 1.8, 32, 1.5)

  c.optimizer.update(
    {"name": "muon", "lr": 0.02, "b2": 0.98, "weight_decay": 0.01}
  )
  c.optimizer.schedule.update(
    {"constant": 0.15, "decay": "linear", "final": 0.02}
  )
  c.batch_size = 16 if arg.stage == "vision" else 8
  # The blind model's loss stays where it is after 60 steps.
  c.steps = 340 if arg.stage == "vision" else 120 if arg.blind else 730
  c.checkpoint.every = 10_000
  c.evals.vsi = ConfigDict(
    {"name": "spatial_jax.evaluators.vsi", "every": 0, "split": "test"}
  )
  if arg.test:
    c.steps, c.batch_size, c.optimizer.muon.iterations = 2, 8, 1
    c.model.vit = ConfigDict({"width": 24, "heads": 1, "mlp": 32, "layers": 1})
    c.model.vit.out_width = 32
    c.model.llm.update({"width": 32, "heads": 1, "kv_heads": 1, "mlp": 32})
    c.model.llm.layers = 5  # the deepest token term reads the fifth block
    c.data.world.rooms = 16
    c.evals.vsi.rooms = 8
  return c
