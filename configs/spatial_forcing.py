# SPDX-License-Identifier: Apache-2.0
"""Spatial Forcing: action models whose image tokens learn what VGGT sees.

  CONFIG=configs/spatial_forcing.py
  python -m spatial_jax train --config=$CONFIG --workdir=D \
    --config.init_from=OPENVLA --config.init_parts.teacher=VGGT
  python -m spatial_jax train --config=$CONFIG:policy=pi0 --workdir=D \
    --config.init_from=PI0 --config.init_parts.teacher=VGGT

OPENVLA is a folder with openvla/openvla-7b, PI0 one with openpi's pi0_base or
pi05_base as safetensors, VGGT one with facebook/VGGT-1B.

`policy=openvla_oft` trains adapters of rank 32 on all linear layers, and whole
what is new: the head, the embedding of the state, the aligned projector. Its
batches of 64 are for 8 H100. The published runs go on at a tenth of the rate
after 100,000 steps: start a second run from the first with a lower
--config.optimizer.lr. `policy=pi0` and `policy=pi05` train all but the teacher.
`force=false` is the same recipe without alignment and teacher.

The data are demonstrations on rendered rooms (`world.reaching`); for others set
config.data.source to a module of yours whose rows have the names in the model's
INPUTS. `test` is two steps of a tiny model with a tiny teacher.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common

POLICIES = ("openvla_oft", "pi0", "pi05")


def get_config(arg: str = "") -> ConfigDict:
  arg = common.parse_arg(arg, policy="openvla_oft", force=True, test=False)
  if arg.policy not in POLICIES:
    raise ValueError(
      f"policy={arg.policy!r}: expected one of {', '.join(POLICIES)}"
    )
  c = common.defaults()
  is_oft = arg.policy == "openvla_oft"
  c.model_name = "openvla_oft" if is_oft else "pi0"
  c.model = ConfigDict({"dtype": "bfloat16", "remat": "products"})
  c.init_parts = ConfigDict({"teacher": ""})
  (_oft if is_oft else _pi0)(c, arg)
  if arg.force:
    c.model.align = ConfigDict({"layer": 24 if is_oft else 12})
    c.model.teacher = ConfigDict({"dtype": "bfloat16"})
  _rooms(c, is_oft, arg.test)
  if arg.test:
    _tiny(c)
  return c


def _oft(c: ConfigDict, arg: ConfigDict) -> None:
  c.model.variant = "tiny" if arg.test else "7b"
  c.steps, c.batch_size = 150_005, 64
  c.init_new = ("(action_head|proprio|align)/.*",)
  # The published adapters leave the head of the decoder out.
  c.lora.update({"scale": 0.5, "start": "gaussian"})
  c.lora.ranks = (
    ("llm/head", 0),
    ("(dino|siglip|projector|llm)/.*", 32),
    (".*", 0),
  )
  c.optimizer.update({"lr": 5e-4, "b2": 0.999, "weight_decay": 0.01})
  c.optimizer.clip = 0.0
  c.optimizer.decay = ((".*", True),)
  c.optimizer.freeze = (
    (".*/lora_[ab]", False),
    ("(action_head|proprio|align)/.*", False),
    (".*", True),
  )
  c.optimizer.schedule.update({"warmup": 0.0, "decay": "none"})
  if not arg.force:
    c.init_new = ("(action_head|proprio)/.*",)


def _pi0(c: ConfigDict, arg: ConfigDict) -> None:
  c.model.variant = arg.policy + ("-tiny" if arg.test else "")
  c.steps, c.batch_size = 20_000, 16
  c.init_new = ("align/.*",) if arg.force else ()
  # openpi's decay of 30,000 steps, of which this is the first part.
  c.optimizer.update({"lr": 2.5e-5, "weight_decay": 1e-10})
  c.optimizer.decay = ((".*", True),)
  c.optimizer.freeze = (("teacher/.*", True), (".*", False))
  c.optimizer.schedule.update({"warmup": 0.05, "final": 0.1})
  if not arg.force:
    c.optimizer.freeze = ((".*", False),)


def _rooms(c: ConfigDict, is_oft: bool, is_tiny: bool) -> None:
  from spatial_jax.data import images

  side, chunk = (64 if is_tiny else 224), (8 if is_oft else 50)
  numbers = (7, 8) if is_oft else (32, 32)
  c.data.source = "spatial_jax.world.reaching"
  c.data.views = 2
  c.data.length = 32 + is_oft * (chunk * numbers[0] + 1)
  c.data.reaching = ConfigDict(
    {
      "chunk": chunk,
      "actions": numbers[0],
      "state": numbers[1],
      "has_slots": is_oft,
    }
  )
  c.data.world = ConfigDict(
    {
      "seed": 0,
      "rooms": 1_000_000,
      "frames": c.data.views,
      "image_size": side,
      "patch_size": 8 if is_tiny else 14,
      "merge_size": 1,
      "text_length": 48,
      "chunk": 48,
      "questions_per_room": {},
    }
  )
  half = (images.HALF, images.HALF)
  dino = (images.IMAGENET_MEAN, images.IMAGENET_STD)
  c.data.render = ConfigDict(
    {
      "module": "world.reaching_view",
      "depth": True,
      "statistics": (dino, half) if is_oft else (half,),
    }
  )


def _tiny(c: ConfigDict) -> None:
  """Two steps on what the world's tokenizer reads."""
  from spatial_jax.data import text
  from spatial_jax.models import vggt

  c.steps, c.batch_size = 2, 8
  c.data.world.rooms = 16
  c.model.update({"dtype": "float32", "remat": "none"})
  c.model.llm = ConfigDict({"vocab": text.Tokenizer.load().vocab_size})
  if "align" in c.model:
    tiny = vggt.VARIANTS["tiny"]
    teacher = {name: tiny[name] for name in ("width", "heads", "vit_heads")}
    shallow = {"depth": 1, "vit_depth": 1, "keep": (0,), "image_size": 56}
    c.model.teacher = ConfigDict({**teacher, **shallow})
    c.model.align = ConfigDict({"layer": 1, "width": 2 * tiny["width"]})
  if c.lora.ranks:
    c.lora.ranks = (("llm/blocks/attention/.*", 2), (".*", 0))
