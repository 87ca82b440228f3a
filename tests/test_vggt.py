# SPDX-License-Identifier: Apache-2.0
"""VGGT: checkpoints, symmetries, precision, tracks, poses and photos."""

import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from safetensors.numpy import load_file

from spatial_jax import hf, models, sharding, trees
from spatial_jax.data import vggt_images
from spatial_jax.geometry import camera, pose
from spatial_jax.models import vggt, vggt_track
from spatial_jax.nn import attention as attentions
from spatial_jax.nn import rope
from tests import manifests

# As many as the published file holds, without the token that is never read.
COUNT = 1_256_537_516 - 1024
WEIGHTS = pathlib.Path(__file__).parent / "golden/vggt/tiny_rect"
WEIGHTS = WEIGHTS / "weights.safetensors"
QUERIES = np.array([[[3.0, 5.0], [20.5, 11.25], [27.0, 0.0]]], np.float32)


def make(variant="tiny", **overrides):
  config = {"model_name": "vggt", "model": {"variant": variant, **overrides}}
  return models.build(ConfigDict(config))[0]


def images(frames=3, height=28, width=42, seed=0):
  rng = np.random.default_rng(seed)
  return rng.uniform(size=(1, frames, height, width, 3)).astype(np.float32)


@functools.cache
def shapes_of(variant):
  model = make(variant)
  init = functools.partial(model.init, jax.random.key(0))
  side = 16 * model.patch  # large enough for the tracker's pyramid
  return jax.eval_shape(init, np.zeros((1, 1, side, side, 3), "f4"))["params"]


@functools.cache
def tiny_params():
  """Random numbers for all parameters, of the sizes of the tiny variant."""
  shapes = shapes_of("tiny")
  return jax.device_get(hf.load(vggt.KEYS, WEIGHTS, shapes, ignore=vggt.IGNORE))


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, *inputs):
  return model.apply({"params": params}, *inputs)


def run(frames, queries=None, **overrides):
  model = make(**overrides)
  names = model.head_names
  skipped = {
    "camera": ("camera",),
    "depth": ("depth",),
    "points": ("points",),
    "track": ("track", "track_features"),
  }
  left = [part for n in vggt.HEADS if n not in names for part in skipped[n]]
  params = {k: v for k, v in tiny_params().items() if k not in left}
  return jax.device_get(apply(model, params, frames, queries))


def worst(got, want):
  got, want = (np.asarray(x, np.float64) for x in (got, want))
  return np.max(np.abs(got - want)) / np.max(np.abs(want))


@pytest.mark.parametrize(
  ("system", "prefix"),
  [
    ("vggt", ""),
    ("spatial_mllm", "vggt."),
    ("spatial_mllm", "spatial_encoder.vggt_model."),
  ],
)
def test_the_table_fits_published_manifests_within_a_second(system, prefix):
  parts = (
    manifests.below(tensors, prefix)
    for tensors in manifests.read(system).values()
  )
  tensors = next(part for part in parts if "aggregator.camera_token" in part)
  shapes = shapes_of("1b")
  before = time.process_time()
  entries = hf.plan(vggt.KEYS, tensors, shapes, ignore=vggt.IGNORE)
  assert time.process_time() - before < 1
  assert {entry.path for entry in entries} == set(trees.flatten(shapes))
  assert trees.count(shapes) == COUNT
  names = {name for entry in entries for name in entry.names}
  assert tensors.keys() - names == set(vggt.IGNORE)
  # Who needs the tokens alone leaves the heads out.
  alone = {"aggregator": shapes["aggregator"]}
  heads = ("camera_head.", "depth_head.", "point_head.", "track_head.")
  hf.plan(vggt.KEYS, tensors, alone, ignore=(*vggt.IGNORE, *heads))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_saving_gives_published_names_and_shapes_and_loading_the_bits(
  dtype, tmp_path
):
  params = jax.tree.map(lambda x: x.astype(dtype), tiny_params())
  hf.save(vggt.KEYS, params, tmp_path)
  tensors = load_file(tmp_path / "model.safetensors")
  published = manifests.read("vggt")["facebook/VGGT-1B"]
  assert tensors.keys() <= published.keys()
  # Sizes differ, but what has no size of its own is as published.
  for name, tensor in tensors.items():
    assert tensor.ndim == len(published[name]), name
  assert tensors["camera_head.empty_pose_tokens"].shape == (1, 1, 9)
  loaded = hf.load(vggt.KEYS, tmp_path, params)
  assert trees.diff(loaded, params) == ""
  for got, want in zip(
    jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True
  ):
    np.testing.assert_array_equal(
      np.asarray(got).view(np.uint8), want.view(np.uint8)
    )


@pytest.mark.parametrize("variant", vggt.VARIANTS)
def test_every_parameter_has_a_place_on_a_mesh(variant):
  shapes = shapes_of(variant)
  mesh = sharding.mesh(fsdp=4, tensor=2)
  placed = trees.flatten(sharding.parameters(shapes, mesh))
  held = sum(
    np.prod(placed[name].shard_shape(leaf.shape))
    for name, leaf in trees.flatten(shapes).items()
  )
  if variant == "1b":
    assert held < COUNT / 8 * 1.5


def test_frames_after_the_first_may_come_in_any_order():
  frames = images(4)
  order, other = [0, 3, 1, 2], [1, 0, 2, 3]
  rows = np.concatenate([frames, frames[:, order], frames[:, other]])
  made, _ = run(rows, head_names=("camera", "depth"))
  for name, array in made.items():
    want, got, _ = array[-1] if name == "pose_encodings" else array
    assert worst(got, want[order]) < 1e-5, name
  want, _, got = made["depth"]
  assert worst(got, want[other]) > 1e-3


def test_chunks_of_frames_change_no_number():
  frames = images(5)
  heads = ("depth",)
  want, _ = run(frames, head_names=heads)
  got, _ = run(frames, head_names=heads, frame_chunk=2)
  for name, array in want.items():
    assert worst(got[name], array) < 1e-6, name


def test_only_the_layers_that_are_read_are_kept():
  frames = images(2)
  _, every = run(frames, head_names=(), keep=(0, 1, 2, 3))
  np.testing.assert_array_equal(
    every["geometry/tokens"], every["geometry/layers"][3]
  )
  names = ("width", "depth", "heads", "vit_depth", "vit_heads", "image_size")
  sizes = {name: vggt.VARIANTS["tiny"][name] for name in names}
  aggregator = vggt.Aggregator(**sizes, keep=(0, 2))
  some = apply(aggregator, tiny_params()["aggregator"], frames)
  assert some.shape[0] == 2
  assert worst(some, every["geometry/layers"][[0, 2]]) < 1e-6


def test_bfloat16_rounds_what_its_mode_says():
  frames = images(2)
  _, want = run(frames, head_names=())
  for precision, dtype, limit in (
    ("autocast", np.float32, 0.05),
    ("pure_bf16", ml_dtypes.bfloat16, 0.1),
  ):
    kwargs = {"dtype": "bfloat16", "precision": precision}
    _, got = run(frames, head_names=(), **kwargs)
    assert got["geometry/tokens"].dtype == dtype
    error = worst(got["geometry/tokens"], want["geometry/tokens"])
    assert 1e-4 < error < limit
    # Heads see float32 and answer in it.
    model = make(head_names=("camera", "depth"), **kwargs)
    made, _ = jax.eval_shape(model.apply, {"params": tiny_params()}, frames)
    assert {array.dtype for array in made.values()} == {np.dtype("f4")}


def test_recomputing_blocks_changes_no_gradient():
  frames = images(2, 28, 28)
  sizes = {"width": 8, "depth": 2, "heads": 2, "vit_depth": 2, "vit_heads": 2}
  model = vggt.Aggregator(**sizes, image_size=28, keep=(0, 1))
  shapes = jax.eval_shape(model.init, jax.random.key(0), frames)["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f4"), shapes)

  def gradient(remat):
    def loss(params):
      kept = model.clone(remat=remat).apply({"params": params}, frames)
      return (kept**2).mean()

    return trees.flatten(jax.device_get(jax.jit(jax.grad(loss))(params)))

  want, got = gradient("none"), gradient("full")
  largest = max(np.max(np.abs(leaf)) for leaf in want.values())
  for name, leaf in got.items():
    assert np.any(want[name]), name
    np.testing.assert_allclose(leaf, want[name], atol=1e-6 * largest)


def test_a_mesh_changes_no_number():
  rows = [images(2), images(2, seed=1)]
  want = [run(row, head_names=())[1]["geometry/tokens"][0] for row in rows]
  params = {"aggregator": tiny_params()["aggregator"]}
  mesh = sharding.mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
  with jax.set_mesh(mesh):
    split = np.concatenate(rows)
    split = jax.device_put(split, sharding.batch_sharding(mesh))
    placed = jax.device_put(params, sharding.parameters(params, mesh))
    _, got = apply(make(head_names=()), placed, split)
  query = placed["aggregator"]["blocks"]["frame"]["attention"]["query"]
  assert not query["kernel"].sharding.is_fully_replicated
  assert worst(got["geometry/tokens"], want) < 1e-5


def test_shapes_and_names_that_do_not_fit_say_so():
  params = tiny_params()
  for frames, overrides, message in (
    (images(1, 28, 30), {}, "multiples of the patch size 14"),
    (images(1), {"precision": "half"}, "precision='half' is unknown"),
    (images(1), {"head_names": ("point",)}, r"head_names has \['point'\]"),
    (images(1), {"keep": (7,)}, "a model of depth 4 lacks"),
    (images(1), {"track_levels": 9}, "fewer track_levels"),
  ):
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(
        make(**overrides).apply, {"params": params}, frames, QUERIES
      )


def test_long_rows_attend_in_parts_with_the_same_result(monkeypatch):
  rng = np.random.default_rng(0)
  q, k, v = rng.normal(size=(3, 2, 7, 2, 4)).astype(np.float32)

  def total(q, k, v):
    y = attentions.unmasked(q, k, v)
    return (y**2).sum(), y

  both = jax.grad(total, (0, 1, 2), has_aux=True)
  want = jax.jit(both)(q, k, v)
  monkeypatch.setattr(attentions, "_MOST_SCORES", 2 * 2 * 3 * 7)
  lowered = jax.jit(lambda *x: both(*x)).lower(q, k, v)
  # Three parts of three queries; the last one is two short.
  assert "2x2x3x7xf32" in lowered.as_text()
  assert "2x2x7x7xf32" not in lowered.as_text()
  got = lowered.compile()(q, k, v)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_axial_rotation_knows_only_differences_of_positions():
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

  def product(a, b):
    a, b = (
      rope.rotate_axial(x, rope.axial(np.array([at]), 16, 100.0))
      for x, at in ((q, a), (k, b))
    )
    return float((a * b).sum())

  assert product((3, 5), (1, 9)) == pytest.approx(product((13, 7), (11, 11)))
  assert product((3, 5), (1, 9)) != pytest.approx(product((5, 3), (9, 1)))
  # The first half of a head follows the row alone, and (0, 0) turns nothing.
  y = rope.rotate_axial(q, rope.axial(np.array([(0, 4)]), 16, 100.0))
  np.testing.assert_array_equal(y[..., :8], q[..., :8])
  assert np.all(np.abs(y - q)[..., 8:12] > 1e-4)


def test_a_point_is_correlated_with_the_map_around_it():
  rng = np.random.default_rng(0)
  grid = rng.normal(size=(1, 2, 6, 7, 8)).astype(np.float32)
  features = rng.normal(size=(1, 2, 3, 8)).astype(np.float32)
  at = rng.uniform(-2, 8, size=(1, 2, 3, 2)).astype(np.float32)
  got = jax.jit(vggt_track.correlate, static_argnums=3)(features, grid, at, 2)
  whole = np.einsum("bfyxc,bfnc->bfnyx", grid, features) / 8**0.5

  def value(n, f, x, y):
    total = 0.0
    for column in (int(np.floor(x)), int(np.floor(x)) + 1):
      for row in (int(np.floor(y)), int(np.floor(y)) + 1):
        if 0 <= column < 7 and 0 <= row < 6:
          share = (1 - abs(x - column)) * (1 - abs(y - row))
          total += share * whole[0, f, n, row, column]
    return total

  want = [
    [
      [
        value(n, f, at[0, f, n, 0] + i, at[0, f, n, 1] + j)
        for i in range(-2, 3)
        for j in range(-2, 3)
      ]
      for n in range(3)
    ]
    for f in range(2)
  ]
  np.testing.assert_allclose(got[0], want, atol=1e-5)


def test_samples_between_pixels_are_mixed_and_beyond_the_border_repeat():
  grid = np.arange(12.0, dtype=np.float32).reshape(1, 3, 4, 1)
  at = np.array([[[1.0, 2.0], [0.5, 1.25], [-3.0, 9.0]]], np.float32)
  got = vggt_track.sample(grid, at)[0, :, 0]
  np.testing.assert_allclose(got, [9.0, 5.5, 8.0])


def random_rotations(count):
  q = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)
  q /= np.linalg.norm(q, axis=-1, keepdims=True)
  return q


def test_poses_survive_encoding_and_decoding():
  q = random_rotations(200)
  # Nearly half turns about each axis: where one divisor is not enough.
  turns = np.eye(4, dtype=np.float32) + np.float32(1e-4)
  q = np.concatenate([q, turns, 3 * q[:5]])
  rng = np.random.default_rng(1)
  encoding = np.concatenate(
    [rng.normal(size=(len(q), 3)), q, rng.uniform(0.3, 2, (len(q), 2))], 1
  ).astype(np.float32)
  cameras, intrinsics = pose.decode(encoding, 30, 40)
  np.testing.assert_allclose(
    np.swapaxes(cameras[:, :3, :3], 1, 2) @ cameras[:, :3, :3],
    np.broadcast_to(np.eye(3), (len(q), 3, 3)),
    atol=1e-6,
  )
  again = pose.encode(cameras, intrinsics, 30, 40)
  unit = q / np.linalg.norm(q, axis=-1, keepdims=True)
  unit = np.where(unit[:, 3:] < 0, -unit, unit)
  np.testing.assert_allclose(again[:, 3:7], unit, atol=2e-6)
  np.testing.assert_allclose(again[:, :3], encoding[:, :3])
  np.testing.assert_allclose(again[:, 7:], encoding[:, 7:], rtol=1e-5)
  jitted = jax.jit(pose.encode, static_argnums=(2, 3))
  np.testing.assert_allclose(
    jitted(cameras, intrinsics, 30, 40), again, atol=1e-6
  )


def test_a_quarter_turn_about_y_looks_to_the_side():
  half = 0.5**0.5
  encoding = np.array([[0, 0, 2, 0, half, 0, half, 1, 1]], np.float32)
  cameras, _ = pose.decode(encoding, 10, 10)
  point = camera.transform(cameras, np.array([[[0, 0, 1]]], np.float32))
  np.testing.assert_allclose(point[0, 0], [1, 0, 2], atol=1e-6)


def test_the_gradient_of_an_encoding_is_finite_where_roots_are_zero():
  def total(rotation):
    return pose.matrix_to_quaternion(rotation).sum()

  gradient = jax.jit(jax.grad(total))(jnp.diag(jnp.array([1.0, -1.0, -1.0])))
  assert np.all(np.isfinite(gradient))


def test_points_are_where_their_pixels_look():
  encoding = np.array([[0.1, -0.2, 0.3, 0.1, 0.2, 0.3, 0.9, 1.0, 1.2]], "f4")
  cameras, intrinsics = pose.decode(encoding, 6, 8)
  depth = np.random.default_rng(0).uniform(1, 3, (1, 6, 8)).astype("f4")
  points = pose.unproject(depth, intrinsics, cameras).reshape(1, -1, 3)
  worlds = camera.inverse(cameras)
  pixels, got = camera.project(points, intrinsics, worlds)
  # Whole numbers, unlike the library's own pixel centres.
  rows, columns = np.mgrid[:6, :8]
  want = np.stack([columns, rows], -1).reshape(1, -1, 2)
  np.testing.assert_allclose(pixels, want, atol=1e-4)
  np.testing.assert_allclose(got.reshape(depth.shape), depth, rtol=1e-5)


def test_photos_of_all_kinds_become_frames(tmp_path):
  clear = np.zeros((40, 60, 4), np.uint8)
  Image.fromarray(clear).save(tmp_path / "clear.png")
  grey = Image.new("L", (30, 60), 128)
  frames = vggt_images.frames([tmp_path / "clear.png", grey], side=56)
  assert frames.shape == (2, 56, 56, 3) and frames.dtype == np.float32
  np.testing.assert_array_equal(frames[0], 1.0)  # transparent is white
  np.testing.assert_allclose(frames[1], 128 / 255)  # cut, not filled
  padded = vggt_images.frames([grey], "pad", side=56)[0]
  np.testing.assert_array_equal(padded[:, :14], 1.0)
  np.testing.assert_allclose(padded[:, 14:42], 128 / 255)


def test_unusable_photos_say_what_to_do():
  for image, message in (
    (np.zeros((4, 4, 3)), "expected uint8"),
    (Image.new("RGB", (600, 2)), "crop it first"),
  ):
    with pytest.raises(ValueError, match=message):
      vggt_images.frames([image], side=56)
  with pytest.raises(ValueError, match="at least one"):
    vggt_images.frames([])
  with pytest.raises(ValueError, match="mode='fit' is unknown"):
    vggt_images.frames([Image.new("RGB", (9, 9))], "fit")
