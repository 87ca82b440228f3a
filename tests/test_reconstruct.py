# SPDX-License-Identifier: Apache-2.0
"""Photos to cameras and clouds: files, pictures, the whole command."""

import json
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from configs import vggt_world
from spatial_jax import __main__ as cli
from spatial_jax import clouds, models, reconstruct
from spatial_jax.data import vggt_images, video
from spatial_jax.geometry import camera, ply

# --- PLY --------------------------------------------------------------------


def test_ply_bytes_are_a_header_and_packed_records(tmp_path):
  path = tmp_path / "a.ply"
  points = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
  colors = np.array([[255, 0, 7], [1, 2, 3]], np.uint8)
  ply.write(path, points, colors, {"confidence": np.array([0.5, 2.0])})
  head, _, body = path.read_bytes().partition(b"end_header\n")
  assert head.decode().splitlines() == [
    "ply",
    "format binary_little_endian 1.0",
    "element vertex 2",
    "property float x",
    "property float y",
    "property float z",
    "property uchar red",
    "property uchar green",
    "property uchar blue",
    "property float confidence",
  ]
  first = np.array([1, 2, 3], "<f4").tobytes() + bytes([255, 0, 7])
  assert len(body) == 2 * 19
  assert body[:19] == first + np.array([0.5], "<f4").tobytes()


def test_ply_reads_back_what_it_wrote(tmp_path):
  path = tmp_path / "a.ply"
  points = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
  ply.write(path, points, comments=("metres",))
  got = ply.read(path)
  np.testing.assert_array_equal(np.stack([got[k] for k in "xyz"], -1), points)


def test_ply_of_other_programs_in_text_and_with_faces(tmp_path):
  path = tmp_path / "a.ply"
  path.write_text(
    "ply\nformat ascii 1.0\nelement vertex 2\nproperty double x\n"
    "property uchar red\nelement face 1\nproperty list uchar int vertex_index\n"
    "end_header\n1.5 9\n-2 255\n3 0 1 1\n"
  )
  got = ply.read(path)
  assert got["x"].tolist() == [1.5, -2] and got["red"].tolist() == [9, 255]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"solid cube", "no PLY file"),
    (
      b"ply\nformat binary_little_endian 1.0\nelement vertex 9\n"
      b"property float x\nend_header\n1234",
      "cut short: 4 bytes of vertices, its header promises 36",
    ),
    (
      b"ply\nformat binary_little_endian 1.0\nelement vertex 9\n"
      b"property list uchar int x\nend_header\n",
      "vertex property of type 'list'",
    ),
    (b"ply\nformat zip 1.0\nend_header\n", "unknown PLY format 'zip'"),
  ],
)
def test_bad_ply_files_are_one_clear_error(tmp_path, content, message):
  path = tmp_path / "a.ply"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message):
    ply.read(path)


# --- clouds -----------------------------------------------------------------


def slanted(height=20, width=30):
  """Depth of a plane seen at a grazing angle, and its rays' intrinsics."""
  k = camera.intrinsics(height, width, 90.0)
  ray = camera.rays(k, height, width)
  # The plane x + z = 4: z = 4 / (1 + ray_x).
  return 4 / (1.2 + ray[..., 0]), k


def test_a_slanted_plane_has_no_edges_but_a_step_has():
  depth, _ = slanted()
  assert depth.max() > 4 * depth.min()
  assert not clouds.edges(depth).any()
  depth[:, 15:] *= 3
  found = clouds.edges(depth)
  assert found[:, 14:16].any(1).all()
  assert not found[:, :13].any() and not found[:, 17:].any()


def test_normals_point_to_the_camera_that_saw_the_surface():
  depth, k = slanted()
  poses = np.eye(4)[None]
  points = camera.unproject(depth, k.astype(np.float64), poses[0])[None]
  images = np.zeros((1, *depth.shape, 3), np.uint8)
  cloud = clouds.fuse(points, images, poses)
  want = -np.array([1, 0, 1.2]) / np.hypot(1, 1.2)
  np.testing.assert_allclose(
    cloud.normals, np.broadcast_to(want, cloud.normals.shape), atol=1e-4
  )


def test_the_viewpoint_shows_all_points_and_cameras():
  rng = np.random.default_rng(0)
  points = rng.normal(size=(2000, 3)) * [3, 1, 2]
  heading = np.linspace(-0.5, 0.5, 5)
  poses = camera.from_heading(rng.normal(size=(5, 3)), heading, 0 * heading)
  pose, k = clouds.viewpoint(points, poses, 72, 128)
  shown = np.concatenate([points, poses[:, :3, 3]])
  pixel, depth = camera.project(shown, k, pose)
  inside = (depth > 0) & (pixel > 0).all(-1) & (pixel < [128, 72]).all(-1)
  assert inside.mean() > 0.95 and inside[-5:].all()
  # From above: what is higher in the world is higher in the picture.
  high, _ = camera.project(np.array([[0.0, 0, 0], [0, 0, 0.1]]), k, pose)
  assert high[1, 1] < high[0, 1]


def wall(depth, color, facing):
  y, x = np.mgrid[-1:1:40j, -1:1:40j]
  points = np.stack([x, y, np.full_like(x, depth)], -1).reshape(-1, 3)
  count = len(points)
  return clouds.Cloud(
    points.astype(np.float32),
    np.tile(np.uint8(color), (count, 1)),
    np.tile(np.float32([0, 0, facing]), (count, 1)),
    np.full(count, 0.06, np.float32),
  )


def test_what_is_nearer_hides_what_is_behind_and_backs_are_not_drawn():
  k = camera.intrinsics(32, 32, 40.0)
  red, blue = (200, 0, 0), (0, 0, 200)

  def middle(*walls):
    cloud = clouds.Cloud(*(np.concatenate(x) for x in zip(*walls, strict=True)))
    return clouds.draw(cloud, np.eye(4), k, 32, 32)[16, 16]

  assert middle(wall(4, red, -1), wall(6, blue, -1)).argmax() == 0
  assert middle(wall(6, blue, -1), wall(4, red, -1)).argmax() == 0
  # Seen from behind, the near one is as if it weren't there.
  assert middle(wall(4, red, 1), wall(6, blue, -1)).argmax() == 2
  assert (middle(wall(4, red, 1)) == 255).all()


# --- images and videos ------------------------------------------------------


def photos(folder, count=3, size=(64, 48)):
  """Pictures of a textured plane, and their file names."""
  folder.mkdir()
  rng = np.random.default_rng(0)
  big = rng.integers(0, 255, (size[1], size[0] + count, 3), np.uint8)
  for i in range(count):
    image = Image.fromarray(big[:, i : i + size[0]])
    image.save(folder / f"photo_{i}.png")
  return folder


def test_frames_are_spread_evenly():
  assert video.spread(10, 0) == list(range(10))
  assert video.spread(3, 9) == [0, 1, 2]
  assert video.spread(101, 3) == [0, 50, 100]


def test_a_gif_gives_the_frames_asked_for(tmp_path):
  shades = [Image.new("RGB", (8, 8), (20 * i, 0, 0)) for i in range(11)]
  path = str(tmp_path / "a.gif")
  shades[0].save(path, save_all=True, append_images=shades[1:])
  got = video.read(path, 3)
  assert [i for i, _ in got] == [0, 5, 10]
  for i, image in got:
    assert image.shape == (8, 8, 3) and abs(int(image[0, 0, 0]) - 20 * i) <= 4


def test_a_video_without_a_reader_says_what_to_install(tmp_path, monkeypatch):
  for name in ("av", "cv2", "imageio", "imageio.v3"):
    monkeypatch.setitem(sys.modules, name, None)
  path = tmp_path / "a.mp4"
  path.write_bytes(b"0")
  with pytest.raises(ValueError, match="pip install av"):
    video.read(str(path), 4)


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (50, 31), (40, 200)])
def test_places_of_images_agree_with_their_pixels(size):
  # An image whose colours are its coordinates.
  wide, tall = size
  y, x = np.mgrid[:tall, :wide]
  pixels = np.stack([x, y, 0 * x], -1).astype(np.uint8)
  other = np.zeros((30, 40, 3), np.uint8)
  frames = vggt_images.frames([pixels, other], side=56, patch=14)
  height = frames.shape[1]
  place, _ = reconstruct.placement([size, (40, 30)], height, 56, 14)
  rows = slice(place["top"], place["bottom"])
  assert not place["top"] or (frames[0, : place["top"]] == 1).all()
  got = 255 * frames[0, rows]
  at_x = (np.arange(56) + 0.5) * place["x_scale"] - 0.5
  at_y = np.arange(place["top"], place["bottom"]) + 0.5
  at_y = at_y * place["y_scale"] + place["y_offset"] - 0.5
  middle = slice(14, -14)
  np.testing.assert_allclose(got[5, middle, 0], at_x[middle], atol=1.0)
  np.testing.assert_allclose(got[6:-6, 20, 1], at_y[6:-6], atol=1.0)


# --- the command ------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """Exported weights of the recipe's tiny model."""
  config = vggt_world.get_config("test")
  model, _ = models.build(config)
  example = np.zeros((1, 2, 16, 16, 3), np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), example)["params"]
  numbers = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: numbers.normal(0, 0.1, x.shape).astype(x.dtype), shapes
  )
  folder = tmp_path_factory.mktemp("weights")
  reconstruct.save(config, params, folder)
  return config, params, folder


def test_exported_weights_load_bit_by_bit(weights):
  _, params, folder = weights
  model, got, size = reconstruct.load(str(folder), "", "float32")
  assert size == 16 and model.patch == 8
  jax.tree.map(np.testing.assert_array_equal, got, params)


def test_photos_become_cameras_depth_a_cloud_and_a_picture(weights, tmp_path):
  *_, folder = weights
  out = tmp_path / "out"
  argv = [
    "reconstruct",
    f"--images={photos(tmp_path / 'photos')}",
    f"--checkpoint={folder}",
    f"--workdir={out}",
    "--size=32",
  ]
  assert cli.main(argv) == 0
  table = json.loads((out / "cameras.json").read_text())
  assert [f["image"] for f in table["frames"]] == [
    f"photo_{i}.png" for i in range(3)
  ]
  arrays = np.load(out / "cameras.npz")
  depth = np.load(out / "depth.npz")
  assert depth["depth"].shape == depth["confidence"].shape == (3, 24, 32)
  # Intrinsics of the photo are those of its frame at twice the size.
  k = np.array(table["frames"][0]["intrinsics"])
  half = arrays["intrinsics"][0] * [[2], [2], [1]]
  np.testing.assert_allclose(k, half, atol=1e-3)
  for i, frame in enumerate(table["frames"]):
    pose = np.array(frame["world_from_camera"])
    np.testing.assert_allclose(pose, arrays["world_from_camera"][i], atol=1e-6)
    np.testing.assert_allclose(
      pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-5
    )
  # The cloud's points are those of the depth maps.
  cloud = ply.read(out / "points.ply")
  count = len(cloud["x"])
  assert 0 < count <= 0.8 * depth["depth"].size + 1
  every = camera.unproject(
    depth["depth"], arrays["intrinsics"], arrays["world_from_camera"]
  ).reshape(-1, 3)
  first = np.array([cloud[k][0] for k in "xyz"])
  assert np.abs(every - first).max(-1).min() < 1e-5
  with Image.open(out / "reconstruction.png") as picture:
    assert picture.size[0] > 1000 and picture.size[1] > 700


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--images=nothing/*.jpg"], "neither a folder, a video nor a pattern"),
    (["--size=30"], "--size=30 is no multiple of the model's patch, 8"),
    (["--checkpoint="], "--checkpoint is missing"),
    (["--checkpoint=nowhere"], "nowhere"),
    (["--drop=1.5"], r"--drop=1.5 lies in [0, 1)"),
    (["--frams=3"], "--help lists the options"),
  ],
)
def test_a_wrong_call_is_one_clear_line(
  words, message, weights, tmp_path, capsys
):
  argv = [
    f"--images={photos(tmp_path / 'photos', 1)}",
    f"--checkpoint={weights[2]}",
    f"--workdir={tmp_path / 'out'}",
    *words,
  ]
  assert cli.main(["reconstruct", *argv]) in (1, 2)
  error = capsys.readouterr().err
  assert message in error
  assert error.startswith("error: ") and error.count("\n") == 1


def test_a_damaged_photo_is_named(weights, tmp_path, capsys):
  folder = photos(tmp_path / "photos")
  (folder / "photo_1.png").write_bytes(b"no image")
  argv = [f"--images={folder}", f"--checkpoint={weights[2]}", "--workdir=x"]
  assert cli.main(["reconstruct", *argv]) == 1
  assert "photo_1.png is no readable image" in capsys.readouterr().err


def test_exported_tensors_have_the_published_names(weights):
  with safe_open(weights[2] / "model.safetensors", "numpy") as file:
    names = set(file.keys())
  assert "aggregator.frame_blocks.0.attn.qkv.weight" in names
  assert "camera_head.pose_branch.fc2.bias" in names
