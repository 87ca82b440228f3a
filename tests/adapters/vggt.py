# SPDX-License-Identifier: Apache-2.0
"""VGGT: the whole model and its intermediates, poses, photos, tables."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from spatial_jax import hf, trees
from spatial_jax.data import vggt_images
from spatial_jax.geometry import camera, pose
from spatial_jax.models import dino, vggt, vggt_heads, vggt_track
from spatial_jax.nn import rope
from spatial_jax.nn.layers import Dense, LayerNorm

# Attributes of `vggt.Model` and what a case calls them.
SIZES = {
  "width": "embed_dim",
  "depth": "depth",
  "heads": "num_heads",
  "mlp_ratio": "mlp_ratio",
  "patch": "patch_size",
  "image_size": "img_size",
  "registers": "num_register_tokens",
  "theta": "rope_freq",
  "vit_depth": "dino_depth",
  "vit_heads": "dino_num_heads",
  "camera_depth": "camera_trunk_depth",
  "camera_heads": "camera_num_heads",
  "dpt_layers": "dpt_layers",
  "dpt_features": "dpt_features",
  "dpt_channels": "dpt_out_channels",
  "track_features": "track_features",
  "track_hidden": "track_hidden",
  "track_levels": "track_corr_levels",
  "track_radius": "track_corr_radius",
  "track_depth": "track_depth",
  "track_iterations": "track_iters",
}


def build(config, **overrides):
  sizes = {ours: config[theirs] for ours, theirs in SIZES.items()}
  sizes["keep"] = range(config["depth"])
  sizes = {**sizes, **overrides}
  return vggt.Model(
    **{
      k: tuple(v) if isinstance(v, list | range) else v
      for k, v in sizes.items()
    }
  )


def abstract(model, images):
  """Shapes of the parameters."""
  init = functools.partial(model.init, jax.random.key(0))
  return jax.eval_shape(init, images)["params"]


def channels_first(maps):
  return jnp.moveaxis(maps, -1, -3)


@functools.partial(jax.jit, static_argnums=0)
def _full(model, params, images, queries, starts):
  (made, out), state = model.apply(
    {"params": params},
    images,
    queries,
    capture_intermediates=True,
    mutable=["intermediates"],
  )
  seen = trees.flatten(state["intermediates"])
  seen = {k.removesuffix("/__call__/0"): v for k, v in seen.items()}
  B, F, height, width, _ = images.shape
  C = model.width
  layers = out["geometry/layers"]
  P = layers.shape[3]
  vit = "aggregator/vit"
  table = params["aggregator"]["vit"]["position"]["embedding"]
  grid = height // model.patch, width // model.patch
  got = {
    "dino.pos_embed_interpolated": dino.resize_positions(table, grid),
    "dino.block0": seen[f"{vit}/blocks"][0].reshape(B * F, -1, C),
    "dino.x_norm_patchtokens": seen[vit].reshape(B * F, -1, C),
    "aggregator.frame_block0": layers[0, ..., :C].reshape(B * F, P, C),
    "aggregator.frame_block0.attn": seen["aggregator/blocks/frame/attention"][
      0
    ].reshape(B * F, P, C),
    "aggregator.global_block0": layers[0, ..., C:].reshape(B, F * P, C),
    "depth": made["depth"][..., None],
    "depth_conf": made["depth_confidence"],
    "world_points": made["points"],
    "world_points_conf": made["points_confidence"],
    "depth.output_conv1": channels_first(seen["depth/features"]),
  }
  for i, layer in enumerate(layers):
    got[f"aggregator.layer{i}"] = layer
  for i, encoding in enumerate(made["pose_encodings"]):
    got[f"camera.pose_enc_iter{i}"] = encoding
  for i in range(4):
    fused = channels_first(seen[f"depth/fuse_{i}"])
    got[f"depth.refinenet{i + 1}"] = fused
  cameras, intrinsics = pose.decode(made["pose_encoding"], height, width)
  got["extrinsic"], got["intrinsic"] = cameras[..., :3, :], intrinsics
  got["unprojected_points"] = pose.unproject(made["depth"], intrinsics, cameras)
  if queries is not None:
    for i, track in enumerate(made["tracks"]):
      got[f"track.coords_iter{i}"] = track
    got["track.vis"] = made["visibility"]
    got["track.conf"] = made["track_confidence"]
    features = seen["track_features"]
    features = features.reshape(B, F, *features.shape[1:])
    got["track.feature_map"] = channels_first(features)
    forced = _track_from(model, params["track"], features, queries, starts)
    got |= {f"{name}.alone": array for name, array in forced.items()}
  return got


def _track_from(model, params, features, queries, starts):
  """What each iteration makes of the reference's coordinates before it.

  Rounding that one iteration does is many times larger after the next: only
  like this can the later ones be held to the same tolerance as all else.
  """
  norm = LayerNorm(1e-5)
  grid = norm.apply({"params": params["map_norm"]}, features)
  tracker = vggt_track.Tracker()
  refine = vggt_track.Refine(
    model.track_hidden,
    model.track_depth,
    tracker.heads,
    tracker.virtual,
    model.track_radius,
  )
  queries = queries / 2
  grids = vggt_track.pyramid(grid, model.track_levels)
  channels = 3 * grid.shape[4] + 4
  places = vggt_track.sample_positions(queries, grid.shape[2:4], channels)

  def step(seen, start):
    (_, seen), track = refine.apply(
      {"params": params["refine"]},
      (start / 2, seen),
      None,
      grids,
      queries,
      places,
    )
    return seen, 2 * track

  seen = vggt_track.sample(grid[:, 0], queries)
  seen = jnp.broadcast_to(seen[:, None], (*starts.shape[1:4], seen.shape[2]))
  seen, tracks = jax.lax.scan(step, seen, starts)
  got = {f"track.coords_iter{i}": track for i, track in enumerate(tracks)}
  for theirs, ours in (("vis", "visibility"), ("conf", "confidence")):
    logit = Dense(1).apply({"params": params[ours]}, seen)
    got[f"track.{theirs}"] = jax.nn.sigmoid(logit[..., 0])
  return got


def full(folder, config):
  inputs = load_file(folder / "inputs.safetensors")
  images = inputs["images"].transpose(0, 1, 3, 4, 2)
  model = build(config)
  params = hf.load(
    vggt.KEYS,
    folder / "weights.safetensors",
    abstract(model, images),
    ignore=vggt.IGNORE,
  )
  want = load_file(folder / "outputs.safetensors")
  queries, starts = inputs.get("query_points"), None
  if queries is not None:
    first = np.repeat(queries[:, None], images.shape[1], axis=1)
    count = model.track_iterations
    starts = [want[f"track.coords_iter{i}"] for i in range(count - 1)]
    starts = np.stack([first, *starts])
  got = jax.device_get(_full(model, params, images, queries, starts))
  for name in got:
    same = name.removesuffix(".alone")
    if same in want:
      want[name] = want[same]
  return got, want


def poses(folder, config):
  inputs = load_file(folder / "inputs.safetensors")
  want = load_file(folder / "outputs.safetensors")
  height, width = config["H"], config["W"]

  @jax.jit
  def run(encoding, depth, quarter):
    cameras, intrinsics = pose.decode(encoding, height, width)
    worlds = camera.inverse(cameras)
    points = pose.unproject(depth, quarter, cameras)
    first = points[0, 0].reshape(1, -1, 3)
    first = jnp.broadcast_to(first, (len(worlds[0]), *first.shape[1:]))
    local = camera.transform(cameras[0], first)
    pixels, _ = camera.project(first, quarter[0], worlds[0])
    return {
      "extrinsic": cameras[..., :3, :],
      "intrinsic": intrinsics,
      "pose_enc_roundtrip": pose.encode(cameras, intrinsics, height, width),
      "world_points": points,
      "cam_to_world_4x4_b0": worlds[0],
      "reprojected_cam_b0": local.swapaxes(1, 2),
      "reprojected_px_b0": pixels,
    }

  got = run(inputs["pose_enc"], inputs["depth"], inputs["intrinsic_quarter"])
  got = jax.device_get(got)
  # Points beside a camera are projected nowhere.
  is_far = np.abs(want["reprojected_cam_b0"][:, 2]) >= 0.05
  for arrays in (got, want):
    pixels = arrays["reprojected_px_b0"]
    arrays["reprojected_px_b0"] = np.where(is_far[..., None], pixels, 0)
  return got, want


def preprocess(folder, config):
  inputs = load_file(folder / "inputs.safetensors")
  want = load_file(folder / "outputs.safetensors")
  images = [inputs[f"image{i}"] for i in range(len(inputs))]
  step = config["subsample_stride"]
  got = {}

  def add(name, frames):
    pixels = np.round(255 * frames.transpose(0, 3, 1, 2)).astype(np.uint8)
    pixels = pixels[..., ::step, ::step]
    got[f"{name}_u8_sub"] = pixels if name.startswith("all") else pixels[0]
    got[f"{name}_mean"] = frames.mean((0, 1, 2), dtype=np.float64)
    F, height, width, _ = frames.shape
    got[f"{name}_shape"] = np.array([F, 3, height, width])
    if name in config["shapes"]:
      want[f"{name}_shape"] = np.array(config["shapes"][name])

  for mode in vggt_images.MODES:
    add(f"all_{mode}", vggt_images.frames(images, mode))
    for i, image in enumerate(images):
      add(f"image{i}_{mode}", vggt_images.frames([image], mode))
  sides = [n.removeprefix("square") for n in want if n.startswith("square")]
  for side in (int(side) for side in sides if side.isdecimal()):
    frames, where = vggt_images.squares(images, side)
    pixels = np.round(255 * frames.transpose(0, 3, 1, 2)).astype(np.uint8)
    got[f"square{side}"], got[f"square{side}_coords"] = pixels, where
  return got, want


def tables(folder, config):
  inputs = load_file(folder / "inputs.safetensors")
  positions = inputs["positions"][0].astype(np.int32)
  tokens = inputs["tokens"].swapaxes(1, 2)  # [B T N H]

  @functools.partial(jax.jit, static_argnums=1)
  def rotate(tokens, dtype):
    rotary = rope.axial(
      positions, config["head_dim"], config.get("rope_freq", 100.0), dtype
    )
    return rope.rotate_axial(tokens.astype(dtype), rotary).swapaxes(1, 2)

  got = {
    "rope_f32": np.asarray(rotate(tokens, "float32")),
    "rope_bf16": np.asarray(rotate(tokens, "bfloat16")),
  }
  for name in (name for name in config if name.startswith("uv")):
    sizes, number = config[name], name.removeprefix("uv")
    shape = sizes["height"], sizes["width"]
    aspect = sizes["aspect_ratio"]
    embed = vggt_heads.uv_embed(*shape, sizes["channels"], aspect)
    got[f"uv_embed{number}"] = np.asarray(embed)
    y, x = vggt_heads.uv_axes(*shape, aspect)
    got[f"uv_grid{number}"] = np.stack(np.meshgrid(x, y), axis=-1)
  return got, load_file(folder / "outputs.safetensors")


# As the cases say: from one iteration of the tracker to the next, rounding
# grows a hundredfold.
TOLERANCES = {
  ("vggt", "full"): (
    (r"track\.coords_iter[1-9]\d*", 2e-2),  # pixels
    (r"track\.(vis|conf)", 2e-3),
  )
}
ADAPTERS = {
  ("vggt", "full"): full,
  ("vggt", "pose"): poses,
  ("vggt", "preprocess"): preprocess,
  ("vggt", "rope_uv"): tables,
}
