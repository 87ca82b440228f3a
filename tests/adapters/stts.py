# SPDX-License-Identifier: Apache-2.0
"""Molmo2, and STTS's scoring, pruning and packing, as in their references."""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict
from safetensors.numpy import load_file

from spatial_jax import hf
from spatial_jax.models import llm, molmo2, molmo2_vit, stts, stts_vit
from spatial_jax.nn import packing, pruning


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


def packed(folder, config):
  inputs = load_file(folder / "inputs.safetensors")
  want = load_file(folder / "outputs.safetensors")
  x, kept = inputs["x"], inputs["valid_mask"]
  plan = jax.jit(packing.pack)(kept[None])
  places, frame, refilled, y = _bins(plan, kept, x)
  mask = (frame[:, :, None] == frame[:, None]) & (frame > 0)[:, None]
  there = kept | refilled
  return {
    "packed": y,
    "new_locs": np.where(there[..., None], places, 0),
    "attn_mask": mask,
    "refill_mask": refilled,
  }, {**want, "new_locs": np.where(there[..., None], want["new_locs"], 0)}


def _bins(plan, kept, x):
  """A plan of one row as the reference tells it, and patches in its bins.

  (bin, slot) of each patch, frame of each slot in the bins that are used, and
  which patches are computed though they were dropped. If just one frame has
  nothing left, the reference makes one more bin, -1, and fills it with all of
  this frame; what is computed there is thrown away.
  """
  P = kept.shape[1]
  target = np.asarray(plan.target[0])
  places = np.stack([target // P, target % P], axis=-1).astype(np.int32)
  places[target < 0] = 0
  count = int(plan.count[0])
  frame = np.asarray(plan.frame[0, :count])
  refilled = np.array(plan.refilled_mask[0])
  y = packing.pick(x[None], plan.source, plan.target)
  y = np.asarray(y)[0, :count]
  empty = np.flatnonzero(~kept.any(axis=1))
  if len(empty) == 1:
    places[empty] = np.stack([np.full(P, -1), np.arange(P)], axis=-1)
    frame = np.concatenate([frame, np.repeat(empty[:, None] + 1, P, axis=1)])
    refilled[empty] = True
    y = np.concatenate([y, x[empty]])
  return places, frame, refilled, y


def _backbone():
  """The table of the vision part, as the training code names its tensors."""
  start = "vision_backbone."
  rows = [
    (((row[0],) if isinstance(row[0], str) else row[0]), *row[1:])
    for row in molmo2_vit.KEYS
  ]
  return (
    *(
      (
        tuple(n.removeprefix(start) for n in names if n.startswith(start)),
        *rest,
      )
      for names, *rest in rows
    ),
    *hf.nest(stts.SCORER_KEYS, _SCORER, "scorer/"),
  )


_SCORER = "image_vit.transformer.temporal_token_scorer."


def vision(config):
  """The vision part of a case's sizes."""
  h, patch = config["grid"][0], config["patch_size"]
  return stts_vit.Model(
    vit=FrozenConfigDict(
      {
        **molmo2_vit.VIT,
        "width": config["D"],
        "layers": config["vit_layers_built"],
        "heads": config["heads"],
        "mlp": config["mlp_dim"],
        "patch": patch,
        "image": h * patch,
        "eps": config["norm_eps"],
      }
    ),
    read=tuple(config["resolved_vit_layers"]),
    width=config["D"],
    heads=config["heads"],
    mlp=config["projector_hidden"],
    out_width=config["d_model"],
    drop=config["topk"],
    after=config["prune_at"],
    pool=config["pool"][0],
    least=config["rescale_bias_min"],
  )


def _videos(inputs, frames):
  """Number of each frame's video."""
  numbers = []
  kinds = inputs["multimodal_type"][0]
  for i, (count, kind) in enumerate(
    zip(inputs["num_images"][0], kinds, strict=True)
  ):
    numbers += [i + 1 if kind == 2 else 0] * int(count)
  return np.array([numbers + [-1] * (frames - len(numbers))], np.int32)


def vit_scorer(folder, config):
  inputs = load_file(folder / "inputs.safetensors")
  want = load_file(folder / "outputs.safetensors")
  module, table = vision(config), _backbone()
  images = _images(inputs["images"][0], config["patch_size"])[None]
  videos = _videos(inputs, images.shape[1])
  pooling = inputs["pooled_patches_idx"].astype(np.int32)
  slots = len(inputs["loss_proj"])

  def apply(params):
    return module.apply({"params": params}, images, pooling, videos, slots)

  def loss(params):
    features, _, out = apply(params)
    aux = config["sim_reg_loss_coefficient"] * out["prune/temporal"]
    value = jnp.mean(features[0] * inputs["loss_proj"]) * 10 + aux
    return value, (aux, out)

  shapes = jax.eval_shape(
    lambda: module.init(jax.random.key(0), images, pooling, videos, slots)
  )
  params = hf.load(table, folder / "weights.safetensors", shapes["params"])
  (value, (aux, out)), gradient = jax.jit(
    jax.value_and_grad(loss, has_aux=True)
  )(params)
  kept = np.asarray(out["prune/kept"][0])
  places, frame, refilled, packed_input = _bins(
    out["prune/packing"], kept, np.asarray(out["vit/biased"][0])
  )
  visible = np.sum(frame[:, :, None] == frame[:, None], axis=-1)
  groups = module.groups(images.shape[2])
  info = pruning.describe(videos, len(groups), config["topk"])
  prunable = np.asarray(info.prunable_mask[0])
  got = {
    "block_at_score": out["vit/scored"][0],
    "pooled_for_scorer": out["prune/pooled"][0],
    "scores": out["prune/scores"][0],
    "attn_bias": out["prune/bias"][0],
    "valid_mask": kept,
    "prunable_frame_mask": prunable,
    "prunable_group_keep": kept[prunable][:, groups[:, 0]].reshape(-1),
    "refill_mask": refilled,
    "refill_ratio": np.float32(refilled.sum() / kept.sum()),
    "packed_frames": np.asarray(len(frame)),
    "new_locs": places,
    "pack_segment_sizes": np.where(frame > 0, visible, 0).astype(np.int32),
    "packed_input": packed_input,
    "selected_vit_features": out["vit/features"].reshape(*kept.shape, -1),
    "features": out["vit/merged"][0],
    "aux_loss": aux,
    "loss": value,
  }
  for tensor in hf.tensors(table, gradient):
    name = tensor.name.replace(_SCORER, "scorer.")
    got[f"grad.{name}"] = tensor.make()
  return {name: np.asarray(x) for name, x in got.items()}, want


ADAPTERS = {
  ("stts", "molmo2_tiny"): molmo2_tiny,
  ("stts", "packing"): packed,
  ("stts", "vit_scorer"): vit_scorer,
}
TOLERANCES = {
  ("stts", "vit_scorer"): (
    # What a bias adds to all keys alike changes nothing: both are rounding.
    (r"grad\.scorer\.patch_token_pooler\.wk\.bias", 1e-6),
    # A difference of larger numbers; the case's own limit for outputs.
    ("loss", 2e-5),
  )
}
