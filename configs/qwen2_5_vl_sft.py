# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes Qwen2.5-VL on conversations about images.

  python -m spatial_jax train --workdir=runs/sft \
    --config=configs/qwen2_5_vl_sft.py:variant=3b,init=DIR,data=train.jsonl

`init` is a folder with the published weights and tokenizer.json, `data` a JSONL
file of LLaVA-style conversations (spatial_jax/data/sources.py), whose images
are found beside it or in `images`. The vision tower is frozen except for its
merger; `tune=all` trains everything. The 3B model with its optimizer needs
about 16 bytes a trained parameter over all devices: 50 GB, for instance 8 x
v5e.

`lora` trains adapters of rank 16 on all linear layers of the language model
and nothing else; the weights stay in bfloat16, 7.5 GB for the 3B model.
`--config.lora.ranks` and `--config.lora.scale` change them. The export command
merges what was trained into a folder like `init`.

`test` trains a tiny model on four made-up pictures.
"""

import atexit
import functools
import json
import pathlib
import shutil
import tempfile

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
  arg = common.parse_arg(
    arg,
    variant="3b",
    init="",
    data="",
    images="",
    tune="llm",
    lora=False,
    test=False,
  )
  if arg.tune not in ("llm", "all"):
    raise ValueError(f"tune={arg.tune!r}: expected llm or all")
  c = common.defaults()
  c.steps, c.batch_size = 2000, 16
  c.model_name = "qwen2_5_vl"
  c.model = ConfigDict(
    {
      "variant": arg.variant,
      "dtype": "bfloat16",
      "remat": "products",
      "loss_tokens": 4096,  # 152k logits each: never all at once
    }
  )
  c.init_from = arg.init

  c.data.source = "spatial_jax.data.sources"
  c.data.files = ConfigDict({"train": arg.data})
  c.data.conversations = ConfigDict(
    {"images": arg.images, "tokenizer": arg.init}
  )
  c.data.length = 2048
  # Room for the images of a row: about 1.6 million pixels, 8 images.
  c.data.layout = ConfigDict(
    {"patches": 8192, "frames": 8, "frame_patches": 4096, "windows": 256}
  )
  # side: merge groups in a window, 112 pixels / 14 / 2.
  c.data.vision = ConfigDict(
    {
      "patch": 14,
      "temporal_patch": 2,
      "merge": 2,
      "side": 4,
      "min_pixels": 56 * 56,
      "max_pixels": 28 * 28 * 1024,
    }
  )

  c.optimizer.update({"lr": 1e-5, "b2": 0.95, "weight_decay": 0.0})
  if arg.tune == "llm":
    c.optimizer.freeze = (
      ("vit/merger/.*", False),
      ("vit/.*", True),
      (".*", False),
    )
  if arg.lora:
    if arg.tune != "llm":
      raise ValueError("lora trains adapters only: leave tune out")
    c.lora.ranks = ((r"llm/blocks/.*", 16), (".*", 0))
    c.optimizer.update({"lr": 2e-4, "master": True})
    c.optimizer.freeze = ((".*/lora_[ab]", False), (".*", True))
  if arg.test:
    _tiny(c)
  if arg.test and not arg.data:
    c.data.files.train = str(_pictures() / "train.jsonl")
  return c


def _tiny(c: ConfigDict) -> None:
  """Two steps of a tiny model."""
  from spatial_jax.data import text

  tokenizer = text.Tokenizer.load()
  c.steps, c.batch_size = 2, 8
  c.model.update({"variant": "tiny", "dtype": "float32", "remat": "none"})
  c.model.image_token = tokenizer.token_id("<|image_pad|>")
  c.model.video_token = tokenizer.token_id("<|video_pad|>")
  c.model.llm = ConfigDict({"vocab": tokenizer.vocab_size})
  c.data.length = 128
  c.data.layout.update(
    {"patches": 64, "frames": 2, "frame_patches": 64, "windows": 8}
  )
  c.data.vision.update(
    {"patch": 4, "side": 2, "min_pixels": 16 * 16, "max_pixels": 32 * 32}
  )


@functools.cache
def _pictures() -> pathlib.Path:
  """A folder with four pictures of one colour each and a question on them.

  It is there until the process ends.
  """
  from PIL import Image

  folder = pathlib.Path(tempfile.mkdtemp(prefix="spatial_jax_"))
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  lines = []
  for i, color in enumerate(("red", "lime", "blue", "white")):
    image = Image.new("RGB", (16 + 8 * i, 24), color)
    image.save(folder / f"{color}.png")
    turns = [
      {"from": "human", "value": "<image>\nWhich color?"},
      {"from": "gpt", "value": color},
    ]
    lines.append(json.dumps({"image": f"{color}.png", "conversations": turns}))
  (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
  return folder
