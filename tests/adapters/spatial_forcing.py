# SPDX-License-Identifier: Apache-2.0
"""Spatial Forcing: its loss alone, and within OpenVLA-OFT, pi0 and pi0.5."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import FrozenConfigDict
from safetensors.numpy import load_file

from spatial_jax import hf
from spatial_jax.models import forcing, llm, openvla_oft, pi0, vit
from spatial_jax.models.vggt_heads import uv_embed
from spatial_jax.nn.attention import packed_mask


def read(folder, name):
  return load_file(folder / f"{name}.safetensors")


def shapes(model, *args, **kwargs):
  """Abstract parameters."""
  init = functools.partial(model.init, jax.random.key(0))
  return jax.eval_shape(lambda: init(*args, **kwargs))["params"]


def published(table, grads, want, release=0):
  """Gradients under the names of the tensors, those that a case has."""
  return {
    f"grad.{tensor.name}": tensor.make()
    for tensor in hf.tensors(table, grads, release=release)
    if f"grad.{tensor.name}" in want
  }


def grids(features, grid, special):
  """The teacher's patches [B V y x E]."""
  return features[:, :, special:].reshape(*features.shape[:2], *grid, -1)


# --- the loss alone ---------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _aligned(model, params, hidden, features, mask):
  def loss(params, hidden):
    return model.apply({"params": params}, hidden, features, mask)

  grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
  (value, out), grads = grad(params, hidden)
  plain = forcing.targets(features, hidden.shape[2:4], 0.0)
  return value, out, plain, grads


def align(folder, config):
  inputs, want = read(folder, "inputs"), read(folder, "outputs")
  B, V = config["batch"], config["views"]
  side, grid = config["tokens_per_side"], config["vggt_grid_hw"]
  model = forcing.Align(
    layer=1,
    width=2 * config["vggt_embed_dim"],
    norm=config["use_vlm_norm"],
    positions=config["pe_ratio"] if config["use_vggt_pe"] else 0.0,
  )
  features = grids(inputs["vggt_features"], grid, config["vggt_prefix_tokens"])
  hidden = inputs["vision_hidden"].reshape(B, V, side, side, -1)
  mask = None
  if "image_masks" in inputs:
    mask = forcing.token_mask(inputs["image_padding_mask"], (side, side))
    mask = mask & inputs["image_masks"][..., None, None]
  params = hf.load(
    forcing.KEYS,
    folder / "weights.safetensors",
    shapes(model, hidden, features),
  )
  value, out, plain, grads = jax.device_get(
    _aligned(model, params, hidden, features, mask)
  )
  flat = want["target"].shape
  got = {
    "loss": value,
    "pos_embed_unscaled": uv_embed(*grid, flat[-1], grid[1] / grid[0]),
    "projected": out["align/projected"],
    "target": out["align/target"],
    "target_without_pe": plain.reshape(flat),
    "grad.vision_hidden": grads[1].reshape(want["grad.vision_hidden"].shape),
    **published(forcing.KEYS, grads[0], want),
  }
  if mask is not None:
    got["align_mask"] = np.asarray(mask, np.int32).reshape(B, -1)
    want["align_mask"] = want["align_mask"].astype(np.int32)
  return {name: np.asarray(x) for name, x in got.items()}, want


def resize(folder, config):
  images = np.moveaxis(read(folder, "inputs")["images"], 2, -1)
  make = functools.partial(forcing.teacher_images, side=config["target"])
  made = np.moveaxis(np.asarray(jax.jit(make)(images)), -1, 2)
  return {
    "sampled": made[..., config["rows"], :],
    "mean": made.mean((-2, -1), dtype=np.float64),
    "std": made.std((-2, -1), ddof=1, dtype=np.float64),
  }, read(folder, "outputs")


# --- OpenVLA-OFT ------------------------------------------------------------


def with_deltas(deltas, run):
  """`run`, with something added to the residual stream after each block.

  The gradient of it at zero is that of the hidden states.
  """

  def edit(call, args, kwargs, context):
    is_model = isinstance(context.module, llm.Model)
    if is_model and context.method_name == "__call__":
      inject = jax.tree_util.Partial(jnp.add, deltas)
      kwargs = {**kwargs, "inject": inject}
    return call(*args, **kwargs)

  with nn.intercept_methods(edit):
    return run()


def tower(variant, sizes):
  """Of timm's arguments."""
  width = sizes["embed_dim"]
  return {
    **vit.VARIANTS[variant],
    "width": width,
    "layers": sizes["depth"],
    "heads": sizes["num_heads"],
    "mlp": int(width * sizes.get("mlp_ratio", 4.0)),
    "patch": sizes["patch_size"],
    "image": sizes["img_size"],
    "registers": sizes.get("reg_tokens", 0),
  }


def oft_model(config):
  sizes = config["llama"]
  return openvla_oft.Model(
    **FrozenConfigDict(
      {
        "dino": tower("openvla-dinov2", config["timm"]["dino"]),
        "siglip": tower("openvla-siglip", config["timm"]["siglip"]),
        "llm": {
          **openvla_oft.VARIANTS["7b"]["llm"],
          "vocab": sizes["vocab"],
          "width": sizes["hidden"],
          "layers": sizes["layers"],
          "heads": sizes["heads"],
          "kv_heads": sizes["heads"],
          "mlp": sizes["intermediate"],
          "eps": sizes["rms_norm_eps"],
          "theta": sizes["rope_theta"],
        },
        "chunk": config["chunk"],
        "actions": config["action_dim"],
        "state": config["proprio_dim"] if config["use_proprio"] else 0,
        "align_from": config["boi_ids"],
        "align": {
          "layer": config["vla_layers_align"],
          "width": 2 * config["vggt_embed_dim"],
          "weight": config["align_loss_coeff"],
          "positions": 0.1 if config["use_vggt_pe"] else 0.0,
          "norm": config.get("use_vlm_norm", True),
        },
      }
    )
  )


@functools.partial(jax.jit, static_argnums=0)
def _oft(model, params, deltas, batch):
  def loss(params, deltas):
    return with_deltas(deltas, lambda: openvla_oft.loss(model, params, batch))

  grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
  return grad(params, deltas)


def oft(folder, config):
  inputs, want = read(folder, "inputs"), dict(read(folder, "outputs"))
  model = oft_model(config)
  pixels = inputs["pixel_values"]  # B 6V height width
  pixels = pixels.reshape(len(pixels), -1, 6, *pixels.shape[2:])
  valid = inputs["attention_mask"] > 0
  batch = {
    "tokens": inputs["input_ids"].astype(np.int32),
    "tokens_mask": valid,
    # The words of actions lie behind all others.
    "slots": inputs["labels"] > config["action_token_begin_idx"],
    "images": np.moveaxis(pixels, 2, -1),
    "actions": inputs["actions"],
    "teacher_features": grids(
      inputs["vggt_features"],
      config["vggt_grid"],
      config["vggt_prefix_tokens"],
    ),
  }
  if config["use_proprio"]:
    batch["state"] = inputs["proprio"]
  params = hf.load(
    openvla_oft.KEYS,
    folder / "weights.safetensors",
    shapes(model, **openvla_oft.arguments(batch)),
    ignore=openvla_oft.IGNORE,
  )
  deltas = np.zeros((model.llm["layers"], *want["hidden_0"].shape), np.float32)
  (total, (metrics, out)), grads = jax.device_get(
    _oft(model, params, deltas, batch)
  )
  B, V = batch["images"].shape[:2]
  first = {  # of each row's first view
    name: out[f"{name}/tokens"].reshape(
      B, V, -1, out[f"{name}/tokens"].shape[-1]
    )
    for name in ("dino", "siglip")
  }
  layer, start = model.align["layer"], model.align_from
  hidden = [out["inputs"], *out["llm/blocks"][:-1], out["llm/hidden"]]
  got = {
    "total_loss": total,
    "l1_loss": metrics["l1"],
    "align_loss": metrics["align"],
    "pred_actions": out["actions"],
    "action_hidden": out["actions/hidden"],
    "align_projected": out["align/projected"],
    "vggt_target": out["align/target"],
    "projector_features": out["visual/tokens"],
    "vision_hidden": hidden[layer][:, start:][
      :, : want["vision_hidden"].shape[1]
    ],
    "dino_patches_img0": first["dino"][:, 0],
    "siglip_patches_img0": first["siglip"][:, 0],
    "fused_patches": np.concatenate(
      [first["dino"], first["siglip"]], axis=-1
    ).reshape(want["fused_patches"].shape),
    "grad.hidden_layer": grads[1][layer - 1],
    **published(openvla_oft.KEYS, grads[0], want, release=1),
  }
  # What padded tokens say is never read.
  ones = np.ones((B, hidden[0].shape[1] - valid.shape[1]), bool)
  real = np.concatenate([valid[:, :1], ones, valid[:, 1:]], axis=1)
  for number, states in enumerate(hidden):
    name = f"hidden_{number}"
    got[name] = states * real[..., None]
    want[name] = want[name] * real[..., None]
  return {name: np.asarray(x) for name, x in got.items()}, want


# --- pi0 and pi0.5 ----------------------------------------------------------


def pi0_model(config):
  tower = config["vit"]

  def decoder(variant, sizes, **more):
    return {
      **llm.VARIANTS[variant],
      "width": sizes["width"],
      "layers": sizes["depth"],
      "heads": sizes["num_heads"],
      "kv_heads": sizes["num_kv_heads"],
      "head_dim": sizes["head_dim"],
      "mlp": sizes["mlp_dim"],
      "eps": config["rms_eps"],
      "theta": config["rope_theta"],
      **more,
    }

  return pi0.Model(
    **FrozenConfigDict(
      {
        "vit": {
          **vit.VARIANTS["siglip-so400m-14-224"],
          "width": tower["hidden_size"],
          "layers": tower["num_hidden_layers"],
          "heads": tower["num_attention_heads"],
          "mlp": tower["intermediate_size"],
          "patch": tower["patch_size"],
          "image": tower["image_size"],
          "eps": tower["layer_norm_eps"],
        },
        "llm": decoder("gemma-2b", config["paligemma"], vocab=config["vocab"]),
        "expert": decoder(
          "gemma-300m", config["action_expert"], adaptive=config["pi05"]
        ),
        "chunk": config["action_horizon"],
        "actions": config["action_dim"],
        "align": {
          "layer": config["vla_layers_align"],
          "width": 2 * config["vggt_embed_dim"],
          "weight": config["align_loss_coeff"],
          "positions": 0.1 if config.get("use_vggt_pe", True) else 0.0,
          "norm": config.get("use_vlm_norm", True),
        },
      }
    )
  )


@functools.partial(jax.jit, static_argnums=(0, 3))
def _pi0(model, params, batch, steps):
  grad = jax.value_and_grad(
    lambda params: pi0.loss(model, params, batch), has_aux=True
  )
  kwargs = pi0.arguments(batch)
  del kwargs["noisy"], kwargs["time"]
  sampled = model.apply(
    {"params": params},
    **kwargs,
    noise=batch["noise"],
    steps=steps,
    method="sample",
  )
  return grad(params), sampled


def flow(folder, config):
  inputs, want = read(folder, "inputs"), dict(read(folder, "outputs"))
  model = pi0_model(config)
  special = config.get("vggt_prefix_tokens", 5)
  batch = {
    "images": np.moveaxis(inputs["images"], 2, -1),
    "images_mask": inputs["image_masks"],
    "pixels_mask": inputs["image_padding_mask"],
    "tokens": inputs["tokens"].astype(np.int32),
    "tokens_mask": inputs["token_masks"],
    "state": inputs["state"],
    "actions": inputs["actions"],
    "noise": inputs["noise"],
    "time": inputs["time"],
    "teacher_features": grids(
      inputs["vggt_features"], config["vggt_grid"], special
    ),
  }
  params = hf.load(
    pi0.KEYS,
    folder / "weights.safetensors",
    shapes(model, **pi0.arguments(batch)),
    ignore=pi0.IGNORE,
  )
  ((total, (metrics, out)), grads), sampled = jax.device_get(
    _pi0(model, params, batch, config["num_steps"])
  )
  segments, groups = out["segments"], out["groups"]
  mask = packed_mask(segments, segments, mutual=(groups, groups))
  first = out["vit/connected"].shape[1] // config["views"]
  got = {
    "total_loss": total,
    "action_loss": metrics["flow"],
    "align_loss": metrics["align"],
    "v_t": out["velocity"],
    "sampled_actions": sampled,
    "time_embedding": out["time"],
    "image_embeds_0": out["vit/connected"][:, :first],
    "position_ids": np.cumsum(segments, axis=1) - 1,
    "attn_allowed": np.asarray(mask, np.int32),
    **published(pi0.KEYS, grads, want, release=2),
  }
  want["attn_allowed"] = want["attn_allowed"].astype(np.int32)
  # The expert's positions are those of the whole row.
  np.testing.assert_array_equal(
    got["position_ids"][:, -out["positions"].shape[1] :], out["positions"]
  )
  P = out["inputs"].shape[1]
  # What masked tokens say is never read.
  real = (segments > 0)[..., None]
  for name, stream, at in (
    ("prefix", "llm", slice(0, P)),
    ("suffix", "expert", slice(P, None)),
  ):
    start = out["inputs" if name == "prefix" else "expert/inputs"]
    rest = out[f"{stream}/blocks"][:-1], out[f"{stream}/hidden"]
    for number, states in enumerate((start, *rest[0], rest[1])):
      key = f"{name}_hidden_{number}"
      got[key], want[key] = states * real[:, at], want[key] * real[:, at]
  return {name: np.asarray(x) for name, x in got.items()}, want


ADAPTERS = {
  ("spatial_forcing", "pi0"): flow,
  ("spatial_forcing", "openvla_oft"): oft,
  ("spatial_forcing", "align"): align,
  ("spatial_forcing", "vggt_resize"): resize,
}
