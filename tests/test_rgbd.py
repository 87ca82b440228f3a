# SPDX-License-Identifier: Apache-2.0
"""Posed RGB-D frames: crops agree, folders are read, views line up."""

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import llava_3d_sft
from spatial_jax import fusion, report
from spatial_jax.data import rgbd
from spatial_jax.geometry import camera, ply
from spatial_jax.world import render, scene

# As the files have them: pixel centres at whole numbers.
INTRINSICS = (200.0, 200.0, 159.5, 119.5)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
  """Folder of two neighbouring views of a drawn room, depth in millimetres."""
  folder = tmp_path_factory.mktemp("room")
  shapes = scene.sample(0, "train", 0, **scene.SIMPLE)
  middle = np.array([*shapes["room_polygon"].mean(0), 0.8])
  corner = np.array([*shapes["room_polygon"][0], 1.5])
  eyes = [corner + (middle - corner) * t for t in (0.2, 0.3)]
  poses = np.stack([camera.look_at(eye, middle) for eye in eyes])
  k = np.array([[200, 0, 160], [0, 200, 120], [0, 0, 1]], np.float32)
  view = render.render(shapes, poses.astype(np.float32), k, 240, 320)
  for kind in ("color", "depth", "pose"):
    (folder / kind).mkdir()
  for i in range(2):
    color = (np.asarray(view["rgb"][i]) * 255).round().astype(np.uint8)
    depth = (np.asarray(view["depth"][i]) * 1000).round().astype(np.uint16)
    Image.fromarray(color).save(folder / f"color/{i}.png")
    Image.fromarray(depth).save(folder / f"depth/{i}.png")
    np.savetxt(folder / f"pose/{i}.txt", poses[i])
  return folder


def scan(folder, frames=3, size=(24, 32)):
  """An exported ScanNet scan of random pixels; returns its poses."""
  rng = np.random.default_rng(0)
  poses = []
  for kind in ("color", "depth", "pose", "intrinsic"):
    (folder / kind).mkdir(parents=True)
  for i in range(frames):
    name = str(9 + i)  # 9, 10, 11: numbers, not words
    color = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(color).save(folder / f"color/{name}.png")
    depth = rng.integers(500, 4000, size).astype(np.uint16)
    depth[0, 0], depth[0, 1] = 65535, 0
    Image.fromarray(depth).save(folder / f"depth/{name}.png")
    eye, target = np.array([[i, 0, 1], [5, 5, 0]], np.float64)
    poses.append(camera.look_at(eye, target))
    np.savetxt(folder / f"pose/{name}.txt", poses[-1])
  k = np.eye(4)
  k[:2, :3] = [[30, 0, 15.5], [0, 31, 11.5]]
  np.savetxt(folder / "intrinsic/intrinsic_depth.txt", k)
  return np.stack(poses)


def test_long_videos_are_strided_from_their_start_and_short_ones_repeat():
  assert rgbd.sample(7, 3) == [0, 2, 4]
  assert rgbd.sample(3, 3) == [0, 1, 2]
  assert rgbd.sample(3, 7) == [0, 1, 2, 0, 1, 2, 0]
  with pytest.raises(ValueError, match="at least one frame"):
    rgbd.sample(0, 3)


@pytest.mark.parametrize("size", [(30, 40), (40, 30), (20, 20)])
def test_a_pixel_keeps_its_place_through_resize_and_crop(size):
  height, width = size
  # Each pixel's "depth" is its number, so that the crop tells where it is from.
  raw = np.arange(height * width).reshape(size)
  side = 12
  k = np.array([[50, 0, 17], [0, 60, 12], [0, 0, 1]], np.float64)
  depth = rgbd.fit_depth(raw, side, 1)
  new = rgbd.to_centres(rgbd.fit_intrinsics(k, size, side))
  old = rgbd.to_centres(k)
  y, x = np.divmod(depth.astype(int), width)
  rows, columns = np.mgrid[:side, :side]
  ray = (
    (columns + 0.5 - new[0, 2]) / new[0, 0],
    (rows + 0.5 - new[1, 2]) / new[1, 1],
  )
  want = ((x + 0.5 - old[0, 2]) / old[0, 0], (y + 0.5 - old[1, 2]) / old[1, 1])
  # The published convention scales whole pixels, not their centres, and pixels
  # are the nearest ones: together less than one of the crop's.
  np.testing.assert_allclose(ray[0], want[0], atol=1 / new[0, 0])
  np.testing.assert_allclose(ray[1], want[1], atol=1 / new[1, 1])


def test_a_scan_is_read_in_the_order_of_its_numbers(tmp_path):
  poses = scan(tmp_path)
  frames = rgbd.read(tmp_path)
  assert [frame.image.stem for frame in frames] == ["9", "10", "11"]
  view = rgbd.load(frames, side=12)
  np.testing.assert_allclose(view["world_from_camera"], poses, atol=1e-6)
  assert view["images"].shape == (3, 12, 12, 3)
  assert view["depth"].shape == (3, 12, 12)
  assert view["depth"][view["depth"] > 0].min() >= 0.5
  assert view["depth"].max() < 4.1  # 65535 is none
  assert view["intrinsics"][0, 0, 0] == 15


def test_what_a_folder_lacks_is_named(room, tmp_path):
  with pytest.raises(ValueError, match=r"color/NAME\.png"):
    rgbd.read(tmp_path)
  scan(tmp_path)
  (tmp_path / "pose/10.txt").unlink()
  with pytest.raises(ValueError, match=r"no pose for the frames \['10'\]"):
    rgbd.read(tmp_path)
  with pytest.raises(ValueError, match="intrinsics"):
    rgbd.read(room)
  broken = tmp_path / "depth/9.png"
  broken.write_bytes(broken.read_bytes()[:40])
  with pytest.raises(ValueError, match="no readable depth map"):
    rgbd.open_depth(broken)


def test_the_names_of_7_scenes_are_known(tmp_path):
  scan(tmp_path / "scan", frames=2)
  for i, old in enumerate(("9", "10")):
    name = f"frame-{i:06d}"
    for kind, end in (("color", "png"), ("depth", "png"), ("pose", "txt")):
      path = tmp_path / f"scan/{kind}/{old}.{end}"
      path.rename(tmp_path / f"{name}.{kind}.{end}")
  np.savetxt(tmp_path / "camera-intrinsics.txt", np.eye(3))
  frames = rgbd.read(tmp_path)
  assert [f.depth.name for f in frames] == [
    "frame-000000.depth.png",
    "frame-000001.depth.png",
  ]


def test_view_fuses_a_room(room, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(fusion, "WIDTH", 320)
  config = llava_3d_sft.get_config(f"frames={room}")
  config.data.rgbd.intrinsics = INTRINSICS
  assert report.main(config, str(tmp_path)) == tmp_path / "view.png"
  said = capsys.readouterr().out
  assert "views    0 and    1: median" in said
  cloud = ply.read(tmp_path / "cloud.ply")
  tokens = ply.read(tmp_path / "voxels.ply")
  assert len(cloud["x"]) > 100_000 and 400 < len(tokens["x"]) < 900
  # A pixel has the colour of its patch: no more colours than patches.
  colors = np.stack([cloud[name] for name in ("red", "green", "blue")], 1)
  assert len(np.unique(colors, axis=0)) <= 2 * 24 * 24


def test_views_agree_to_under_5_cm_and_not_with_a_wrong_pose(room):
  view = rgbd.load(rgbd.read(room, INTRINSICS), side=112)
  cameras = [view[k] for k in ("depth", "intrinsics", "world_from_camera")]
  points = camera.unproject(*cameras)
  median, share = fusion.agreement(points, *cameras, 0, 1)
  assert median < 0.05 and share > 0.5
  cameras[2] = cameras[2].copy()
  cameras[2][1, :3, 3] += [0, 0, 0.3]  # 30 cm along the room
  points = camera.unproject(*cameras)
  assert fusion.agreement(points, *cameras, 0, 1)[0] > 0.05


def test_surfaces_tell_where_up_is():
  rng = np.random.default_rng(0)
  floor = rng.normal([0, 0, 1], 0.05, (500, 3))
  walls = rng.normal([0, 1, 0], 0.05, (300, 3))
  normals = np.concatenate([floor, walls])
  normals /= np.linalg.norm(normals, axis=1, keepdims=True)
  up = fusion.upward(normals, np.array([0.3, 0.2, 0.8]))
  np.testing.assert_allclose(up, [0, 0, 1], atol=0.02)


def test_a_config_without_frames_shows_rooms():
  assert "rgbd" not in llava_3d_sft.get_config("test").data
  assert isinstance(llava_3d_sft.get_config("stage=1"), ConfigDict)
