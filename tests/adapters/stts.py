# SPDX-License-Identifier: Apache-2.0
"""Molmo2 from a video's patches to logits, as its reference computes it."""

import jax
import numpy as np
from ml_collections import FrozenConfigDict
from safetensors.numpy import load_file

from spatial_jax import hf
from spatial_jax.models import llm, molmo2, molmo2_vit


def _vit(sizes):
  return {
    **molmo2_vit.VIT,
    "width": sizes["hidden_size"],
    "layers": sizes["num_hidden_layers"],
    "heads": sizes["num_attention_heads"],
    "mlp": sizes["intermediate_size"],
    "patch": sizes["patch_size"],
    "image": sizes["image_size"][0],
    "eps": sizes["layer_norm_eps"],
  }


def _llm(sizes):
  return {
    **llm.VARIANTS["molmo2-8b"],
    "vocab": sizes["vocab_size"],
    "new_vocab": sizes["additional_vocab_size"],
    "width": sizes["hidden_size"],
    "layers": sizes["num_hidden_layers"],
    "heads": sizes["num_attention_heads"],
    "kv_heads": sizes["num_key_value_heads"],
    "head_dim": sizes["head_dim"],
    "mlp": sizes["intermediate_size"],
    "theta": sizes["rope_parameters"]["rope_theta"],
    "eps": sizes["rms_norm_eps"],
  }


def model(sizes):
  """Molmo2 of the sizes of a config.json of transformers."""
  adapter, vit = sizes["adapter_config"], _vit(sizes["vision_config"])
  layers = adapter["vision_feature_layer"]
  vision = {
    "vit": vit,
    "read": tuple(layer % vit["layers"] for layer in layers),
    "width": adapter["hidden_size"],
    "heads": adapter["num_attention_heads"],
    "mlp": adapter["intermediate_size"],
    "out_width": adapter["text_hidden_size"],
  }
  return molmo2.Model(
    vision=FrozenConfigDict(vision),
    llm=FrozenConfigDict(_llm(sizes["text_config"])),
    image_token=sizes["image_patch_id"],
  )


def _images(patches, patch):
  """Square frames of rows of flattened (y, x, channel) patches."""
  F, count, _ = patches.shape
  h = int(count**0.5)
  x = patches.reshape(F, h, h, patch, patch, 3).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(F, h * patch, h * patch, 3)


def _rows(images, pooling, counts, patches):
  """Frames and pooled patches of each row, which follow each other."""
  frames, tokens, start = [], [], 0
  for count in counts:
    row, start = pooling[start : start + count], start + count
    used = row[row >= 0] // patches
    first, last = (used.min(), used.max() + 1) if count else (0, 0)
    frames.append(images[first:last])
    tokens.append(np.where(row < 0, -1, row - first * patches))

  def stack(parts, fill):
    most = max(map(len, parts))
    return np.stack(
      [
        np.pad(
          part,
          [(0, most - len(part))] + [(0, 0)] * (part.ndim - 1),
          constant_values=fill,
        )
        for part in parts
      ]
    )

  return stack(frames, 0), stack(tokens, -1).astype(np.int32)


def molmo2_tiny(folder, config):
  inputs = load_file(folder / "inputs.safetensors")
  sizes = config["cfg"]
  molmo = model(sizes)
  tokens = inputs["input_ids"].astype(np.int32)
  valid = inputs["attention_mask"].astype(np.int32)
  patches = inputs["pixel_values_videos"]
  images, pooling = _rows(
    _images(patches, sizes["vision_config"]["patch_size"]),
    inputs["video_token_pooling"],
    np.sum(tokens == sizes["image_patch_id"], axis=1),
    patches.shape[1],
  )
  batch = {
    "tokens": tokens,
    "positions": np.maximum(np.cumsum(valid, axis=1) - 1, 0).astype(np.int32),
    "segments": valid,
    "mutual": inputs["mm_token_type_ids"].astype(np.int32),
    "images": images,
    "pooling": pooling,
  }
  shapes = jax.eval_shape(lambda: molmo.init(jax.random.key(0), **batch))
  params = hf.load(
    molmo2.KEYS, folder / "weights.safetensors", shapes["params"]
  )
  logits, out = jax.jit(molmo.apply)({"params": params}, **batch)
  blocks = out["llm/blocks"]
  got = {
    "logits": logits,
    "image_hidden_states": out["vit/merged"][out["vit/valid_mask"]],
    "hidden_0": out["llm/inputs"],
    **{f"hidden_{i + 1}": block for i, block in enumerate(blocks)},
    f"hidden_{len(blocks)}": out["llm/hidden"],
    "vit_hidden_0": out["vit/embedded"],
    **{
      f"vit_hidden_{i + 1}": block for i, block in enumerate(out["vit/blocks"])
    },
  }
  want = load_file(folder / "outputs.safetensors")
  for outputs in (got, want):  # what stands at padding has no meaning
    for name in outputs:
      if name.startswith(("hidden_", "logits")):
        outputs[name] = outputs[name] * valid[..., None]
  return {name: np.asarray(value) for name, value in got.items()}, want


ADAPTERS = {("stts", "molmo2_tiny"): molmo2_tiny}
