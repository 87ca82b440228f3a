# SPDX-License-Identifier: Apache-2.0
"""The `reconstruct` command: photos or a video in, cameras and a cloud out.

  python -m spatial_jax reconstruct --images=FOLDER --checkpoint=WEIGHTS \
    --workdir=OUT

images -> VGGT -> cameras.json, cameras.npz, depth.npz, points.ply, and
reconstruction.png to look at. The world is the first camera's frame (x right,
y down, z forward); its unit is whatever the weights were trained to: VGGT's is
relative, about the mean distance of the scene.
"""

from __future__ import annotations

import argparse
import glob
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from spatial_jax.data import video
from spatial_jax.types import Array, Bool, Float

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
VIDEO_FRAMES = 16  # of a video, when --frames isn't given
SHOWN = 8  # frames in the picture
HEADS = ("camera", "depth", "points")  # the tracker isn't used
LEAST_FOV = 0.02  # radians; less is no camera, but weights that know nothing
ASSUMED_FOV = 1.0
PUBLISHED_SIZE = 518  # pixels that VGGT's published weights were trained at


class _Parser(argparse.ArgumentParser):
  def error(self, message):
    raise ValueError(f"reconstruct: {message}; --help lists the options")


def parser() -> argparse.ArgumentParser:
  out = _Parser(
    prog="python -m spatial_jax reconstruct",
    description="Cameras, depth and a coloured point cloud from images.",
    allow_abbrev=False,
  )
  add = out.add_argument
  add(
    "--images",
    required=True,
    help="a folder, a video, or a pattern in quotes such as 'scene/*.jpg'",
  )
  add(
    "--checkpoint",
    default="",
    help="a folder of safetensors (facebook/VGGT-1B, or exported here) or the "
    "workdir of a training run",
  )
  add("--workdir", required=True, help="folder for the results")
  add(
    "--frames",
    type=int,
    default=0,
    help="so many, evenly spread; all images, 16 of a video, if 0",
  )
  add("--size", type=int, default=0, help="width in pixels; the model's if 0")
  add(
    "--cloud",
    choices=("depth", "points"),
    default="depth",
    help="points from depth and cameras (the better ones), or from the point "
    "head",
  )
  add(
    "--drop",
    type=float,
    default=0.2,
    help="share of the points left out, the least certain ones",
  )
  add("--dtype", default="float32", help="what to compute in, or bfloat16")
  add(
    "--random",
    metavar="VARIANT",
    nargs="?",
    const="tiny",
    default="",
    help="try the command with random weights: the results mean nothing",
  )
  return out


# --- images -----------------------------------------------------------------


def find(images: str, frames: int) -> list[pathlib.Path]:
  """Image files of a folder or pattern, in the order of their names.

  Raises:
    FileNotFoundError: nothing is there.
  """
  path = pathlib.Path(images)
  if path.is_dir():
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES)
    # RGB-D folders keep the colour images and depth maps side by side.
    found = [p for p in found if ".depth" not in p.name] or found
    what = f"folder {images} holds no image ({', '.join(IMAGES)})"
  else:
    found = sorted(pathlib.Path(p) for p in glob.glob(images, recursive=True))
    found = [p for p in found if p.suffix.lower() in IMAGES]
    what = f"--images={images}: neither a folder, a video nor a pattern that "
    what += "finds images"
  if not found:
    raise FileNotFoundError(what)
  return [found[i] for i in video.spread(len(found), frames)]


def video_files(path: str, frames: int, folder: str) -> list[pathlib.Path]:
  """Evenly spread frames of a video, stored as PNG in a folder."""
  out = []
  for index, image in video.read(path, frames or VIDEO_FRAMES):
    out.append(pathlib.Path(folder, f"frame_{index:06d}.png"))
    Image.fromarray(image).save(out[-1])
  return out


def _upright(path: pathlib.Path) -> Image.Image:
  """A photo as it was held: cameras store the turn beside the pixels."""
  try:
    return ImageOps.exif_transpose(Image.open(path))
  except (OSError, UnidentifiedImageError) as error:
    raise ValueError(f"{path} is no readable image ({error})") from error


# --- the model --------------------------------------------------------------


def load(checkpoint: str, random: str, dtype: str) -> tuple[Any, Any, int]:
  """Model, parameters and image size of a checkpoint.

  Raises:
    ValueError: no checkpoint, or one of another model.
    FileNotFoundError: there is nothing at that path.
  """
  import jax
  import jax.numpy as jnp
  from ml_collections import ConfigDict

  from spatial_jax import checkpoint as checkpoints
  from spatial_jax import hf, hf_hub, models, system

  if not checkpoint and not random:
    raise ValueError(
      "--checkpoint is missing: give a folder with VGGT's weights "
      "(facebook/VGGT-1B), the workdir of a run of configs/vggt_world.py, or "
      "--random to try the command without any"
    )
  size, name = PUBLISHED_SIZE, "vggt"
  kwargs = {"variant": random or "1b", "head_names": HEADS}
  folder = None if random else pathlib.Path(hf_hub.locate(checkpoint))
  is_workdir = not random and checkpoints.is_workdir(checkpoint)
  if folder and (folder / "config.json").is_file():
    config = json.loads((folder / "config.json").read_text())
    if is_workdir:
      name, kwargs = config["model_name"], config["model"]
      size = config["data"].get("views", {}).get("image_size", size)
    elif "spatial_jax" in config:  # written by `save`
      own = config["spatial_jax"]
      name, kwargs, size = own["model_name"], own["model"], own["image_size"]
  if name != "vggt":
    raise ValueError(f"{checkpoint} holds a {name} model, expected vggt")
  model, mod = models.build(
    ConfigDict({"model_name": name, "model": {**kwargs, "dtype": dtype}})
  )
  side = model.image_size
  example = jnp.zeros((1, 2, side, side, 3))
  if random:
    params = jax.jit(model.init)(jax.random.key(0), example)["params"]
    return model, params, side
  shapes = jax.eval_shape(model.init, jax.random.key(0), example)["params"]
  if is_workdir:
    saves = checkpoints.Checkpointer(checkpoint, read_only=True)
    params, _ = saves.params(system.drop_auxiliary(shapes))
    saves.close()
  else:
    ignore = (*mod.IGNORE, "track_head.")
    params = hf.load(mod.KEYS, folder, shapes, ignore=ignore)
  return model, params, size


def save(config: Any, params: Any, folder: str | pathlib.Path) -> None:
  """Trained weights as a folder that `load` and `config.init_from` take.

  Tensors have VGGT's published names; config.json holds the model's sizes.
  """
  from spatial_jax import hf, models, system

  _, mod = models.build(config)
  hf.save(mod.KEYS, system.drop_auxiliary(params), folder)
  own = {
    "model_name": config.model_name,
    "model": config.model.to_dict(),
    "image_size": config.data.views.image_size,
  }
  text = json.dumps({"spatial_jax": own}, indent=2)
  pathlib.Path(folder, "config.json").write_text(text + "\n")


def predict(model: Any, params: Any, frames: np.ndarray) -> dict[str, Array]:
  """Cameras, depth and points of frames f32[F height width 3], on the host."""
  import jax

  from spatial_jax.geometry import camera, pose

  @jax.jit
  def run(params, images):
    return model.apply({"params": params}, images)[0]

  got = jax.device_get(run(params, frames[None]))
  got = {k: np.array(v, np.float32) for k, v in got.items()}
  height, width = frames.shape[1:3]
  encoding = got["pose_encoding"][0]
  lost = encoding[:, 7:] < LEAST_FOV
  if lost.any():
    print(
      f"warning: no field of view was found for {int(lost.any(1).sum())} of "
      f"{len(lost)} frames; {np.degrees(ASSUMED_FOV):.0f} degrees are assumed",
      file=sys.stderr,
    )
    encoding[:, 7:][lost] = ASSUMED_FOV
  back, intrinsics = pose.decode(encoding, height, width)
  world_from_camera = camera.inverse(back)
  depth = got["depth"][0]
  return {
    "world_from_camera": world_from_camera,
    "intrinsics": intrinsics,
    "depth": depth,
    "depth_confidence": got["depth_confidence"][0],
    "points": got["points"][0],
    "points_confidence": got["points_confidence"][0],
    # Of a whole image, the middle is its principal point: pixel centres lie at
    # +0.5 here.
    "unprojected": camera.unproject(depth, intrinsics, world_from_camera),
  }


# --- results ----------------------------------------------------------------


def placement(
  sizes: Sequence[tuple[int, int]], height: int, side: int, patch: int
) -> list[dict[str, float]]:
  """Where `vggt_images.frames` put images of (width, height) in their frames.

  Returns:
    per image, the affine map from a row or column of the frame to that of the
    image, image = scale * frame + offset, and the frame's rows that it fills.
  """
  out = []
  for wide, tall in sizes:
    resized = round(tall * (side / wide) / patch) * patch
    cut = max((resized - side) // 2, 0)
    shown = min(resized, side)
    top = (height - shown) // 2
    out.append(
      {
        "x_scale": wide / side,
        "y_scale": tall / resized,
        "y_offset": (cut - top) * tall / resized,
        "top": top,
        "bottom": top + shown,
      }
    )
  return out


def cameras(
  names: Sequence[str],
  sizes: Sequence[tuple[int, int]],
  places: Sequence[dict[str, float]],
  got: dict[str, Array],
) -> dict[str, Any]:
  """What cameras.json holds."""
  frames = []
  for i, (name, size, place) in enumerate(
    zip(names, sizes, places, strict=True)
  ):
    k = np.asarray(got["intrinsics"][i], np.float64)
    scale = np.array([[place["x_scale"]], [place["y_scale"]], [1.0]])
    original = k * scale
    original[1, 2] += place["y_offset"]
    frames.append(
      {
        "image": name,
        "width": size[0],
        "height": size[1],
        "intrinsics": original.round(4).tolist(),
        "world_from_camera": np.asarray(
          got["world_from_camera"][i], np.float64
        ).tolist(),
      }
    )
  return {
    "convention": "camera axes x right, y down, z forward; pixel centres at "
    "+0.5; the world is about the first camera's frame; unit relative",
    "frames": frames,
  }


def cloud_mask(
  got: dict[str, Array],
  places: Sequence[dict[str, float]],
  kind: str,
  drop: float,
) -> Bool[np.ndarray, "F h w"]:
  """Pixels of the cloud: of the image, sure enough, and not at an edge."""
  from spatial_jax import clouds

  depth = got["depth"]
  mask = np.isfinite(depth) & (depth > 0) & ~clouds.edges(depth)
  mask &= np.isfinite(got["points"]).all(-1)
  for i, place in enumerate(places):
    mask[i, : place["top"]] = False
    mask[i, place["bottom"] :] = False
  sure = got[f"{kind}_confidence"]
  if mask.any() and drop:
    mask &= sure >= np.quantile(sure[mask], drop)
  return mask


def picture(
  frames: Float[Array, "F h w 3"],
  got: dict[str, Array],
  cloud: Any,
  width: int = 1280,
) -> np.ndarray:
  """Frames and depth maps above the cloud with its cameras."""
  from spatial_jax import clouds, drawing

  shown = video.spread(len(frames), SHOWN)
  near, far = np.percentile(got["depth"][shown], [1, 99])
  view = clouds.viewpoint(cloud.points, got["world_from_camera"], 720, width)
  drawn = clouds.draw(
    cloud, *view, 720, width, cameras=got["world_from_camera"]
  )
  numbers = ", ".join(str(i + 1) for i in shown)
  depths = [drawing.draw_depth(d, near, far) for d in got["depth"][shown]]
  return clouds.stack(
    [
      (
        f"frames {numbers} of {len(frames)}",
        clouds.tiles(frames[shown], width),
      ),
      (
        f"depth, {near:.2f} (bright) to {far:.2f} (dark), relative unit",
        clouds.tiles(depths, width),
      ),
      (
        f"{len(cloud.points):,} points, and the cameras that saw them",
        drawn,
      ),
    ]
  )


def write(
  workdir: pathlib.Path,
  frames: np.ndarray,
  names: Sequence[str],
  sizes: Sequence[tuple[int, int]],
  got: dict[str, Array],
  *,
  patch: int,
  kind: str,
  drop: float,
) -> None:
  """All results into a folder."""
  from spatial_jax import clouds
  from spatial_jax.geometry import ply

  side = frames.shape[2]
  places = placement(sizes, frames.shape[1], side, patch)
  table = cameras(names, sizes, places, got)
  (workdir / "cameras.json").write_text(json.dumps(table, indent=1) + "\n")
  np.savez(
    workdir / "cameras.npz",
    world_from_camera=got["world_from_camera"],
    intrinsics=got["intrinsics"],  # in pixels of the depth maps
    names=np.array(names),
  )
  np.savez_compressed(
    workdir / "depth.npz",
    depth=got["depth"],
    confidence=got["depth_confidence"],
  )
  mask = cloud_mask(got, places, kind, drop)
  points = got["unprojected" if kind == "depth" else "points"]
  cloud = clouds.fuse(points, frames, got["world_from_camera"], mask)
  if not len(cloud.points):
    raise ValueError(
      "no point is left: all depths are at edges or not finite; give --drop=0, "
      "or look at depth.npz"
    )
  ply.write(
    workdir / "points.ply",
    cloud.points,
    cloud.colors,
    {"confidence": got[f"{kind}_confidence"][mask]},
    comments=("x right, y down, z forward in the first camera; no unit",),
  )
  Image.fromarray(picture(frames, got, cloud)).save(
    workdir / "reconstruction.png", optimize=True
  )


def command(argv: Sequence[str]) -> pathlib.Path:
  """Runs the command; returns the folder with the results."""
  args = parser().parse_args(argv)
  if args.frames < 0 or not 0 <= args.drop < 1:
    raise ValueError(
      f"reconstruct: --frames={args.frames} must not be negative, and "
      f"--drop={args.drop} lies in [0, 1)"
    )
  workdir = pathlib.Path(args.workdir)
  with tempfile.TemporaryDirectory() as folder:
    is_video = pathlib.Path(args.images).suffix.lower() in video.SUFFIXES
    if is_video and pathlib.Path(args.images).is_file():
      files = video_files(args.images, args.frames, folder)
    else:
      files = find(args.images, args.frames)
    from spatial_jax.data import vggt_images

    images = [vggt_images.opened(_upright(path)) for path in files]
  model, params, size = load(args.checkpoint, args.random, args.dtype)
  side = args.size or size
  if side % model.patch:
    raise ValueError(
      f"--size={side} is no multiple of the model's patch, {model.patch} pixels"
    )
  frames = vggt_images.frames(images, side=side, patch=model.patch)
  workdir.mkdir(parents=True, exist_ok=True)
  count, height, width = frames.shape[:3]
  print(f"{count} frames of {width} x {height} pixels ...", flush=True)
  began = time.perf_counter()
  got = predict(model, params, frames)
  seconds = time.perf_counter() - began
  write(
    workdir,
    frames,
    [path.name for path in files],
    [image.size for image in images],
    got,
    patch=model.patch,
    kind=args.cloud,
    drop=args.drop,
  )
  if args.random:
    print("random weights: these results mean nothing", file=sys.stderr)
  print(
    f"cameras, depth and points after {seconds:.1f} s (with compiling), in "
    f"{workdir}; look at {workdir / 'reconstruction.png'}"
  )
  return workdir
