# SPDX-License-Identifier: Apache-2.0
"""One Qwen2.5-VL for both sides: sizes, weights, a batch, FLOPs. NumPy only.

A batch has `rows` rows of `length` tokens; the first tokens of a row are its
`images` of `side` x `side` pixels, the others are text with labels.
"""

from __future__ import annotations

import concurrent.futures
import json
import math
import os
import pathlib
from typing import Any

import numpy as np

IMAGE, VIDEO, START, END = 3, 4, 5, 6
FIRST = 8  # of the tokens that stand for words
WINDOW, PATCH, MERGE = 112, 14, 2

# As the library names them; `merge` and `patch` are the published ones.
SMALL = {
  "text": {
    "vocab": 16384,
    "width": 512,
    "layers": 12,
    "heads": 8,
    "kv_heads": 2,
    "mlp": 1408,
    "sections": (8, 12, 12),
    "tied": False,
  },
  "vision": {
    "width": 320,
    "layers": 12,
    "heads": 4,
    "mlp": 864,
    "out_width": 512,
    "full_layers": (2, 5, 8, 11),
  },
  "dtype": "float32",
  "rows": 2,
  "length": 512,
  "images": 2,
  "side": 224,
  "model": {"remat": "products"},
}
TOY = {
  **SMALL,
  "text": {
    **SMALL["text"],
    "vocab": 64,
    "width": 32,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
    "mlp": 32,
    "sections": (2, 3, 3),
  },
  "vision": {
    "width": 16,
    "layers": 2,
    "heads": 2,
    "mlp": 16,
    "out_width": 32,
    "full_layers": (1,),
  },
  "length": 32,
  "images": 1,
  "side": 112,
}


def model_options(case: dict) -> dict[str, Any]:
  """`config.model` of the library, for images in a static grid."""
  side = case["side"] // PATCH
  options = {
    "variant": "3b",
    "llm": {**case["text"], "dtype": case["dtype"]},
    "vit": {**case["vision"], "dtype": case["dtype"]},
    "dtype": case["dtype"],
    "image_token": IMAGE,
    "video_token": VIDEO,
    "grid": (case["images"], side, side) if case["images"] else None,
  }
  return {**options, **case.get("model", {})}


def published_config(case: dict) -> dict[str, Any]:
  """config.json of the same model for transformers."""
  text, vision = case["text"], case["vision"]
  return {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "text_config": {
      "model_type": "qwen2_5_vl_text",
      "vocab_size": text["vocab"],
      "hidden_size": text["width"],
      "intermediate_size": text["mlp"],
      "num_hidden_layers": text["layers"],
      "num_attention_heads": text["heads"],
      "num_key_value_heads": text["kv_heads"],
      "rms_norm_eps": 1e-6,
      "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": list(text["sections"]),
      },
      "bos_token_id": None,
      "eos_token_id": None,
      "pad_token_id": 0,
      "tie_word_embeddings": text["tied"],
    },
    "vision_config": {
      "model_type": "qwen2_5_vl",
      "depth": vision["layers"],
      "hidden_size": vision["width"],
      "intermediate_size": vision["mlp"],
      "num_heads": vision["heads"],
      "patch_size": PATCH,
      "temporal_patch_size": 2,
      "spatial_merge_size": MERGE,
      "window_size": WINDOW,
      "fullatt_block_indexes": list(vision["full_layers"]),
      "out_hidden_size": vision["out_width"],
      "tokens_per_second": 2,
    },
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "tie_word_embeddings": text["tied"],
  }


def draw(name: str, shape: tuple[int, ...], rng) -> np.ndarray:
  """Random numbers for a published tensor, of the size that training gives."""
  noise = rng.standard_normal(shape, np.float32)
  if "norm" in name or "ln_q" in name:
    return 1 + 0.1 * noise
  if name.endswith("bias"):
    return 0.1 * noise
  if "embed_tokens" in name:
    return noise
  return noise * np.float32(math.prod(shape[1:]) ** -0.5)


def write(folder: pathlib.Path, outputs: Any, case: dict) -> None:
  """Random weights in a file that both sides read; `outputs` are of `hf`."""
  import ml_dtypes
  from safetensors.numpy import save_file

  folder.mkdir(parents=True, exist_ok=True)
  dtype = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[case["dtype"]]
  outputs = list(outputs)
  seeds = np.random.SeedSequence(0).spawn(len(outputs))

  def make(output, seed):
    rng = np.random.default_rng(seed)
    return draw(output.name, output.shape, rng).astype(dtype)

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    made = pool.map(make, outputs, seeds)
    tensors = {o.name: x for o, x in zip(outputs, made, strict=True)}
  save_file(tensors, folder / "model.safetensors", {"format": "pt"})
  (folder / "config.json").write_text(json.dumps(published_config(case)))


def batch(case: dict) -> dict[str, np.ndarray]:
  """Rows as the library's pipeline yields them, and pixels as the processor."""
  from spatial_jax.data import positions

  rng = np.random.default_rng(1)
  B, T, side = case["rows"], case["length"], case["side"] // PATCH
  grids = [(1, side, side)] * case["images"]
  block = [START, *[IMAGE] * (side // MERGE) ** 2, END] * case["images"]
  if len(block) >= T:
    raise ValueError(f"{case['images']} images leave no room in {T} tokens")
  tokens = rng.integers(FIRST, case["text"]["vocab"], (B, T)).astype(np.int32)
  tokens[:, : len(block)] = block
  ids, _ = positions.mrope(
    tokens[0], grids, image_token=IMAGE, video_token=VIDEO
  )
  out = {
    "tokens": tokens,
    "positions": np.broadcast_to(ids, (B, *ids.shape)).astype(np.int32),
    "segments": np.ones((B, T), np.int32),
    "labels": np.roll(tokens, -1, axis=1),
    "loss_weight": _weight(case),
  }
  if case["images"]:
    size = B, case["images"] * side**2, 3 * 2 * PATCH**2
    out["patches"] = rng.standard_normal(size, np.float32)
  return out


def _weight(case):
  """1 for each token after which a word follows."""
  weight = np.ones((case["rows"], case["length"]), np.float32)
  block = ((case["side"] // PATCH // MERGE) ** 2 + 2) * case["images"]
  weight[:, : max(block - 1, 0)] = 0
  weight[:, -1] = 0
  return weight


def flops(case: dict, *, train: bool) -> float:
  """Of one step: causal attention counts half, recomputing not at all.

  Nor do logits of tokens without a label, which no loss needs.
  """
  text, vision = case["text"], case["vision"]
  B, T = case["rows"], case["length"]
  width, head = text["width"], text["width"] // text["heads"]
  linear = 2 * width**2 + 2 * width * text["kv_heads"] * head
  linear += 3 * width * text["mlp"]
  tokens = B * T
  labelled = float(np.sum(_weight(case)))
  total = 2 * tokens * text["layers"] * linear
  total += 2 * labelled * width * text["vocab"]
  total += text["layers"] * 2 * T * tokens * width
  if case["images"]:
    D, side = vision["width"], case["side"] // PATCH
    patches = B * case["images"] * side**2
    full = len(vision["full_layers"])
    linear = 4 * D**2 + 3 * D * vision["mlp"]
    merged = (4 * D) ** 2 + 4 * D * vision["out_width"]
    total += 2 * patches * (vision["layers"] * linear + 1176 * D + merged / 4)
    seen = full * side**2 + (vision["layers"] - full) * (WINDOW // PATCH) ** 2
    total += 4 * patches * seen * D
  return total * (3 if train else 1)
