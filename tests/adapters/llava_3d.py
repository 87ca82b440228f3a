# SPDX-License-Identifier: Apache-2.0
"""LLaVA-3D's geometry, pooling, processor, text and whole model."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict
from safetensors.numpy import load_file

from spatial_jax import hf
from spatial_jax.data import llava_3d as text
from spatial_jax.data import rgbd
from spatial_jax.data.sources import read_image
from spatial_jax.evaluators import answers
from spatial_jax.geometry.fps import farthest_points
from spatial_jax.geometry.patches import patch_points
from spatial_jax.models import llava_3d, llm, vit
from spatial_jax.nn.lift import Lift

IMAGE, POINT, IGNORED = -200, -300, -100
# Patches nearer to a voxel's border may lie in another one in other floats.
BORDER = 1e-4


def read(folder, name):
  path = folder / f"{name}.safetensors"
  return load_file(path) if path.exists() else {}


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, batch):
  return model.apply({"params": params}, **batch)


@functools.partial(jax.jit, static_argnums=0)
def loss(model, params, batch):
  return llava_3d.loss(model, params, batch)[0]


def shapes(model, batch):
  """Abstract parameters."""
  init = jax.eval_shape(lambda: model.init(jax.random.key(0), **batch))
  return init["params"]


def same(pairs):
  """1 where the library's value is the reference's."""
  return np.array([a == b for a, b in pairs], np.int32)


def equal(name, pairs):
  got = same(pairs)
  return {name: got}, {name: np.ones_like(got)}


# --- geometry ---------------------------------------------------------------


def settle(got, want, distance):
  """What the library gives, but the reference's where that is undecided."""
  return np.where(distance < BORDER, want, got).astype(want.dtype)


def geometry(folder, config):
  inputs, want = read(folder, "inputs"), read(folder, "outputs")
  grid = (config["grid_h"], config["grid_w"])
  cameras = (
    inputs["depths"],
    rgbd.to_centres(inputs["intrinsics"]),
    inputs["poses"],
  )
  features = np.moveaxis(inputs["features"], 2, -1)  # B V h w D
  model = Lift(
    capacity=int(np.prod(features.shape[1:4])),
    voxel_size=config["voxel_size"],
    keep_invalid=True,
  )
  batch = dict(
    zip(
      ("features", "depth", "intrinsics", "world_from_camera"),
      (features, *cameras),
      strict=True,
    )
  )
  prefix = "positional_embedding.position_embedding_head."
  table = hf.nest(llava_3d.EMBED_KEYS, prefix, "embed/")
  params = hf.load(table, folder / "weights.safetensors", shapes(model, batch))
  tokens, mask, out = apply(model, params, batch)
  # Every 8th pixel: the patches of an image that is a multiple of 8.
  height, width = (
    -inputs["depths"].shape[-2] % 8,
    -inputs["depths"].shape[-1] % 8,
  )
  wide = np.pad(inputs["depths"], ((0, 0), (0, 0), (0, height), (0, width)))
  sizes = wide.shape[-2] // 8, wide.shape[-1] // 8
  pixels, _ = jax.jit(patch_points, static_argnums=3)(wide, *cameras[1:], sizes)
  rounded, _ = jax.jit(
    functools.partial(patch_points, grid=grid, bfloat16=True)
  )(*cameras)
  got = {
    "patch_xyz": out["lift/points"],
    "pixel_xyz_sub8": pixels,
    "pos_embed": out["lift/embed"],
    "patch_3d": out["lift/patches"],
    "point_to_voxel": settle(
      out["lift/slot"],
      want["point_to_voxel"],
      want["min_distance_to_voxel_border"],
    ),
    "pooled": np.asarray(tokens)[np.asarray(mask)],
    "batch_offset": np.cumsum(out["lift/count"]),
    "patch_xyz_bf16_run": rounded,
  }
  return {name: np.asarray(x) for name, x in got.items()}, want


def fps(folder, config):
  inputs, want = read(folder, "inputs"), read(folder, "outputs")
  chosen = jax.jit(
    jax.vmap(
      functools.partial(
        farthest_points, count=config["K"], start=config["start_index"]
      )
    )
  )(inputs["xyz"])
  sampled = np.take_along_axis(
    inputs["features"], np.asarray(chosen)[..., None], axis=1
  )
  return {"indices": np.asarray(chosen), "sampled": sampled}, want


def photos(source, config, side):
  """Frames as the reference's processor gives them, and checks of these."""
  crop, scale = config["crop"], config["depth_scale"]
  camera = config["intrinsics_640x480"]
  frames = rgbd.read(source, [camera[k] for k in ("fx", "fy", "cx", "cy")])
  cameras = np.tile(np.eye(4), (len(frames), 1, 1))
  cameras[:, :3, :3] = [frame.intrinsics for frame in frames]
  view = rgbd.prepare(
    [read_image(frame.image) for frame in frames],
    [rgbd.open_depth(frame.depth) for frame in frames],
    [frame.world_from_camera for frame in frames],
    cameras,
    side=crop,
    depth_scale=scale,
  )
  shape = (len(frames), side, crop // side, side, crop // side, 3)
  means = view["images"].reshape(shape).mean((2, 4))
  return view, {
    "image_patch_means": means.transpose(0, 3, 1, 2),
    "depth_mm": np.round(view["depth"] * scale).astype(np.int64),
  }


def real_room(folder, config):
  want = read(folder, "outputs")
  view = {
    "depth": want["depth_mm"].astype(np.float32) / config["depth_scale"],
    "intrinsics": want["intrinsics"],
    "world_from_camera": want["poses"],
  }
  got = {}
  # The photos are not part of a case; where they are, all begins with them.
  names = (config["source"], "real/rgbd_room")
  folders = [p / n for p in folder.resolve().parents for n in names]
  if source := next((p for p in folders if p.is_dir()), None):
    view, got = photos(source, config, want["image_patch_means"].shape[-1])
    got |= {
      "intrinsics": view["intrinsics"],
      "poses": view["world_from_camera"],
    }
  model = Lift(
    capacity=want["point_to_voxel"].size,
    voxel_size=config["voxel_size"],
    keep_invalid=True,
  )
  h, w = want["patch_xyz"].shape[1:3]
  batch = {
    "features": np.zeros((1, len(view["depth"]), h, w, 2), np.float32),
    "depth": view["depth"][None],
    "intrinsics": rgbd.to_centres(view["intrinsics"])[None],
    "world_from_camera": view["world_from_camera"][None],
  }
  params = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), shapes(model, batch)
  )
  _, _, out = apply(model, params, batch)
  _, valid = patch_points(*(batch[k][0] for k in list(batch)[1:]), (h, w))
  got["patch_xyz"] = out["lift/points"][0]
  got["patch_depth_invalid"] = ~np.asarray(valid)
  got["point_to_voxel"] = settle(
    out["lift/slot"][0],
    want["point_to_voxel"],
    want["min_distance_to_voxel_border"],
  )
  return {name: np.asarray(x) for name, x in got.items()}, want


# --- processor and text -----------------------------------------------------


def processor(folder, config):
  inputs, want = read(folder, "inputs"), read(folder, "outputs")
  chosen = rgbd.sample(config["frames_in_scene"], config["num_frames"])
  width, height = config["depth_wh"]
  if config["dataset"] == "scannet":
    cameras = [inputs["intrinsic_depth"]] * len(chosen)
  else:
    width, height = config["rgb_wh"]
    shared = inputs["intrinsic_color"]
    cameras = [inputs.get(f"intrinsic_{i}", shared) for i in chosen]
  view = rgbd.prepare(
    [inputs[f"rgb_{i}"] for i in chosen],
    [inputs[f"depth_{i}"] for i in chosen],
    [inputs[f"pose_{i}"] for i in chosen],
    cameras,
    side=config["crop"],
    depth_scale=config["depth_scale"],
    camera_size=(height, width),
    axis_align=inputs["axis_align_matrix"],
  )
  return {
    "images": view["images"].transpose(0, 3, 1, 2),
    "depths": view["depth"],
    "poses": view["world_from_camera"],
    "intrinsics": view["intrinsics"],
  }, want


def prompts(folder, config):
  cases = json.loads((folder / "cases.json").read_text())
  assert set(cases) == {"llava_v1"}, "only the released template is here"
  rows = cases["llava_v1"]
  return equal("prompt", [(text.prompt(r["turns"]), r["prompt"]) for r in rows])


def answer_match(folder, config):
  got, want = {}, {}
  cases = json.loads((folder / "cases.json").read_text())
  pred = [answers.clean(case["pred"]) for case in cases]
  truths = [[answers.clean(gt) for gt in case["gts"]] for case in cases]
  pairs = {
    "clean_pred": zip(pred, (c["clean_pred"] for c in cases), strict=True),
    "clean_gts": zip(truths, (c["clean_gts"] for c in cases), strict=True),
  }
  for name, rows in pairs.items():
    got[name] = same(rows)
    want[name] = np.ones_like(got[name])
  for i, name in enumerate(("em", "em_refined")):
    got[name] = np.array(
      [answers.match(p, t)[i] for p, t in zip(pred, truths, strict=True)]
    )
    want[name] = np.array([case[name] for case in cases])
  return got, want


# --- the whole model --------------------------------------------------------


def sizes(config, weights):
  clip, decoder = config["clip"], config["llm"]
  mlp = next(
    x for name, x in weights.items() if name.endswith("mlp.fc1.weight")
  )
  return llava_3d.Model(
    **FrozenConfigDict(
      {
        "vit": {
          **vit.VARIANTS["clip-l-14-336"],
          "width": clip["dim"],
          "layers": clip["depth"],
          "heads": clip["heads"],
          "mlp": mlp.shape[0],
          "patch": clip["patch"],
          "image": clip["img"],
        },
        "llm": {
          **llm.VARIANTS["vicuna-7b"],
          "vocab": decoder["vocab_size"],
          "width": decoder["hidden_size"],
          "layers": decoder["num_hidden_layers"],
          "heads": decoder["num_attention_heads"],
          "kv_heads": decoder["num_key_value_heads"],
          "mlp": decoder["intermediate_size"],
          "eps": decoder["rms_norm_eps"],
          "theta": decoder.get("rope_theta", 1e4),
        },
        "lift": {"voxel_size": config["voxel_size"], "keep_invalid": True},
      }
    )
  )


def scenes(config, inputs):
  """Frames of every row; a 2D image is the first of them."""
  kinds = [sample["kind"] for sample in config["samples"]]
  B, F, side = len(kinds), config["num_frames"], config["clip"]["img"]
  views = {
    "images": np.zeros((B, F, side, side, 3), np.float32),
    "depth": np.zeros((B, F, side, side), np.float32),
    "intrinsics": np.tile(np.eye(3, dtype=np.float32), (B, F, 1, 1)),
    "world_from_camera": np.tile(np.eye(4, dtype=np.float32), (B, F, 1, 1)),
    "is_scene": np.array([kind == "video" for kind in kinds]),
  }
  for b in range(B):
    if f"images_{b}" in inputs:
      image = np.moveaxis(inputs[f"images_{b}"], -3, -1)
      views["images"][b, : F if image.ndim == 4 else 1] = image
  at = views["is_scene"]
  if at.any():
    views["depth"][at] = inputs["depths"]
    views["intrinsics"][at] = rgbd.to_centres(inputs["intrinsics"])
    views["world_from_camera"][at] = inputs["poses"]
  return views


def rows(config, inputs, slots):
  """Tokens with `slots` for each image, padded at the right."""
  out = {"tokens": [], "labels": []}
  for b in range(len(inputs["input_ids"])):
    valid = inputs["attention_mask"][b] > 0
    ids, labels = inputs["input_ids"][b][valid], inputs["labels"][b][valid]
    times = np.where(ids == IMAGE, slots, 1)
    ids, labels = np.repeat(ids, times), np.repeat(labels, times)
    labels = np.where((ids == IMAGE) | (ids == POINT), IGNORED, labels)
    out["tokens"].append(ids)
    out["labels"].append(labels)
  T = max(map(len, out["tokens"]))

  def pad(values, value):
    return np.stack(
      [np.pad(x, (0, T - len(x)), constant_values=value) for x in values]
    ).astype(np.int32)

  batch = {
    "tokens": pad(out["tokens"], 0),
    "labels": pad(out["labels"], IGNORED),
  }
  batch["segments"] = pad([np.ones_like(x) for x in out["tokens"]], 0)
  places = np.arange(T, dtype=np.int32)
  batch["positions"] = np.broadcast_to(places, (len(out["tokens"]), 3, T))
  clicks = inputs.get("clicks", np.zeros((0, 3), np.float32))
  counts = (inputs["input_ids"] == POINT).sum(1)
  batch["clicks"] = np.zeros((len(counts), max(1, counts.max()), 3), np.float32)
  start = 0
  for b, count in enumerate(counts):
    batch["clicks"][b, :count] = clicks[start : start + count]
    start += count
  return batch, counts


def full(folder, config):
  inputs, want = read(folder, "inputs"), dict(read(folder, "outputs"))
  model = sizes(config, read(folder, "weights"))
  views = scenes(config, inputs)
  side = config["clip"]["img"] // config["clip"]["patch"]
  slots = config["num_frames"] * side**2
  batch, counts = rows(config, inputs, slots)
  # Labels are those of the next token that is there.
  labels = batch.pop("labels")
  batch |= views
  params = hf.load(
    llava_3d.KEYS, folder / "weights.safetensors", shapes(model, batch)
  )
  logits, out = apply(model, params, batch)
  out = {name: np.asarray(x) for name, x in out.items() if x is not None}
  real = out["segments"] > 0
  mask = want["attention_mask"] > 0

  def join(x, fill=0):
    """Real tokens side by side, as the reference has them."""
    joined = np.full((*mask.shape, *x.shape[2:]), fill, x.dtype)
    for b, row in enumerate(real):
      joined[b, : row.sum()] = x[b, row]
    return joined

  compact = join(labels, IGNORED)
  following = np.full_like(labels, 0)
  weight = np.zeros(labels.shape, np.float32)
  for b, row in enumerate(real):
    after = np.append(compact[b, 1 : row.sum()], IGNORED)
    following[b, row] = np.maximum(after, 0)
    weight[b, row] = after != IGNORED
  scene = views["is_scene"]
  image = [sample["kind"] == "image" for sample in config["samples"]]
  tokens = out["vit/tokens"].reshape(
    len(scene), -1, side**2, config["clip"]["dim"]
  )
  clip = [name for name in want if name.startswith("clip_tokens_")]
  clip.sort(key=lambda name: int(name.rsplit("_", 1)[1]))
  want["clip_tokens"] = np.concatenate([want[name] for name in clip])
  got = {
    "clip_tokens": np.concatenate(
      [tokens[image, 0], tokens[scene].reshape(-1, *tokens.shape[2:])]
    ),
    "patch_xyz": out["lift/points"][scene],
    "pooled_video_features": out["lift/tokens"][scene][
      out["visual/mask"][scene]
    ],
    "batch_offset": np.cumsum(out["lift/count"][scene]),
    "click_embeds": np.concatenate(
      [x[:count] for x, count in zip(out["clicks"], counts, strict=True)]
    ),
    "inputs_embeds": join(out["inputs"]),
    "attention_mask": join(real.astype(np.int64)),
    "labels": compact,
    "logits": join(np.asarray(logits)),
    "loss": np.asarray(
      loss(model, params, {**batch, "labels": following, "loss_weight": weight})
    ),
  }
  for name in ("inputs_embeds", "logits"):  # at the mask's ones alone
    want[name] = np.where(mask[..., None], want[name], 0)
  return got, want


ADAPTERS = {
  ("llava_3d", "answer_match"): answer_match,
  ("llava_3d", "fps"): fps,
  ("llava_3d", "full"): full,
  ("llava_3d", "geometry"): geometry,
  ("llava_3d", "processor"): processor,
  ("llava_3d", "prompts"): prompts,
  ("llava_3d", "real_room"): real_room,
}
# Metres; the reference's own rounding is larger.
TOLERANCES = {("llava_3d", "geometry"): ((r"patch_xyz_bf16_run", 0.06),)}
