# SPDX-License-Identifier: Apache-2.0
"""Tables of names fit the towers of all systems and lose no bit."""

import json
import math
import time

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from ml_collections import FrozenConfigDict
from safetensors.numpy import load_file

from spatial_jax import hf, sharding, trees
from spatial_jax.models import molmo2, vit, vit_keys
from tests import manifests
from tests.adapters import stts
from tests.towers import (
  CLIP,
  DINO,
  GOLDEN,
  RECORDED,
  TINY,
  abstract,
  random_params,
  recorded,
)


@pytest.mark.parametrize("name", RECORDED)
def test_loading_and_saving_a_recorded_checkpoint_keeps_every_bit(
  name, tmp_path
):
  table, sizes = RECORDED[name]
  recorded(name, tmp_path)
  want = load_file(tmp_path / "model.safetensors")
  model = vit.Model(**sizes, pool="attn_pool.latent" in want)
  params = hf.load(
    table, tmp_path, abstract(model), ignore=("embeddings.mask_token",)
  )
  release = int(name.startswith("openvla"))
  hf.save(table, params, tmp_path / "again", release=release)
  got = load_file(tmp_path / "again" / "model.safetensors")
  want.pop("embeddings.mask_token", None)
  assert got.keys() == want.keys()
  for key, value in want.items():
    np.testing.assert_array_equal(got[key], value, strict=True)


_POOL = {"pool": True}
TOWERS = [
  ("cambrian", "tower.siglip", "", "TIMM", "timm-siglip-so400m-14-384", _POOL),
  ("cambrian", "tower.clip", "vision_model.", "CLIP", "clip-l-14-336", {}),
  ("cambrian", "tower.dinov2", "", "DINOV2_SWIGLU", "dinov2-g-14", {}),
  (
    "llava_3d",
    "ChaimZhu",
    "model.vision_tower.vision_tower.vision_model.",
    "CLIP",
    "clip-l-14-336",
    {},
  ),
  (
    "spatial_forcing",
    "openvla",
    "vision_backbone.featurizer.",
    "TIMM",
    "openvla-dinov2",
    {},
  ),
  (
    "spatial_forcing",
    "openvla",
    "vision_backbone.fused_featurizer.",
    "TIMM",
    "openvla-siglip",
    _POOL,
  ),
  *(
    (
      "spatial_forcing",
      f"openpi PyTorch checkpoint {name}",
      "paligemma_with_expert.paligemma.model.vision_tower.vision_model.",
      "SIGLIP",
      "siglip-so400m-14-224",
      {},
    )
    for name in ("pi0_base", "pi05_base")
  ),
  *(
    row
    for size in ("1B", "7B")
    for row in (
      (
        "echogen",
        f"Janus-Pro-{size} (deepseek",
        "vision_model.vision_tower.",
        "TIMM",
        "janus-siglip-l-16-384",
        _POOL,
      ),
      (
        "echogen",
        f"Janus-Pro-{size} (transformers",
        "model.vision_model.",
        "JANUS",
        "janus-siglip-l-16-384",
        {},
      ),
    )
  ),
  (
    "skeleton_llm",
    "SkeletonLLM",
    "vision_model.",
    "INTERNVIT",
    "internvit-300m-448",
    {},
  ),
  (
    "loc3r_vlm",
    "lmms-lab",
    "model.vision_tower.vision_tower.vision_model.",
    "SIGLIP",
    "siglip-so400m-14-384",
    {"layers": 26, "final_norm": "kept"},  # the last block was cut off
  ),
]


def full_size(variant, overrides=()):
  return abstract(vit.Model(**{**vit.VARIANTS[variant], **dict(overrides)}))


def tensors_of(system, checkpoint, prefix):
  found = [
    tensors
    for name, tensors in manifests.read(system).items()
    if name.startswith(checkpoint)
  ]
  assert len(found) == 1
  return manifests.below(found[0], prefix)


@pytest.mark.parametrize(
  "tower", TOWERS, ids=lambda tower: f"{tower[0]}-{tower[1][-12:]}-{tower[4]}"
)
def test_tables_fit_the_towers_of_all_systems(tower):
  system, checkpoint, prefix, table, variant, overrides = tower
  tensors = tensors_of(system, checkpoint, prefix)
  table = getattr(vit_keys, table)
  shapes = full_size(variant, tuple(overrides.items()))
  ignore = ("embeddings.mask_token",)
  start = time.process_time()
  entries = hf.plan(table, tensors, shapes, ignore=ignore)
  assert time.process_time() - start < 1
  assert {entry.path for entry in entries} == set(trees.flatten(shapes))
  if overrides == _POOL:  # and without the head that no system uses
    hf.plan(table, tensors, full_size(variant), ignore=vit_keys.IGNORE)


@pytest.mark.parametrize("naming", ["names in", "transformers"])
@pytest.mark.parametrize("size", ["4b", "8b"])
def test_the_tables_fit_all_of_molmo2_in_both_namings(size, naming):
  tensors = tensors_of("stts", f"allenai/Molmo2-{size.upper()} ({naming}", "")
  kwargs = molmo2.VARIANTS[size]
  model = molmo2.Model(**FrozenConfigDict(kwargs))
  ids = np.zeros((1, 8), np.int32)
  shapes = abstract(
    model,
    *(ids, ids, ids, ids),
    np.zeros((1, 1, 378, 378, 3), np.float32),
    np.zeros((1, 81, 9), np.int32),
  )
  start = time.process_time()
  entries = hf.plan(molmo2.KEYS, tensors, shapes, ignore=molmo2.IGNORE)
  assert time.process_time() - start < 1
  assert {entry.path for entry in entries} == set(trees.flatten(shapes))
  if naming == "names in":
    hf.plan(molmo2.RELEASED, tensors, shapes)
  assert trees.count(shapes) == sum(map(math.prod, tensors.values()))


def test_every_parameter_of_every_variant_has_a_place_on_the_mesh():
  mesh = sharding.mesh(fsdp=4, tensor=2)
  for variant in vit.VARIANTS:
    shapes = full_size(variant)
    placed = trees.flatten(sharding.parameters(shapes, mesh))
    query = placed["blocks/attention/query/kernel"]
    assert query.spec == PartitionSpec(None, "fsdp", "tensor"), variant


ROUND_TRIPS = {
  "CLIP": CLIP,
  "SIGLIP": _POOL,
  "JANUS": {},
  "DINOV2": {**DINO, "registers": 2},
  "DINOV2_SWIGLU": {**DINO, "gated": True},
  "TIMM": {**DINO, **_POOL, "registers": 2},
  "INTERNVIT": {**DINO, "final_norm": "none"},
  "INTERNVL": {**DINO, "final_norm": "none"},
}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("naming", ROUND_TRIPS)
def test_save_then_load_returns_the_same_bits(naming, dtype, tmp_path):
  table = getattr(vit_keys, naming)
  model = vit.Model(**TINY, image=16, **ROUND_TRIPS[naming])
  params = random_params(model, dtype=dtype)
  hf.save(table, params, tmp_path, shard_bytes=9_000)
  assert len(list(tmp_path.glob("*.safetensors"))) > 2
  loaded = hf.load(table, tmp_path, params)
  assert trees.diff(loaded, params) == ""
  for a, b in zip(
    jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True
  ):
    np.testing.assert_array_equal(
      np.asarray(a).view(np.uint8), b.view(np.uint8)
    )


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_molmo2_is_saved_in_both_namings_without_losing_a_bit(dtype, tmp_path):
  case = GOLDEN.parent / "stts" / "molmo2_tiny"
  model = stts.model(json.loads((case / "config.json").read_text())["cfg"])
  side, ids = model.vision["vit"]["image"], np.zeros((1, 4), np.int32)
  shapes = abstract(
    model,
    *(ids, ids, ids, ids),
    np.zeros((1, 1, side, side, 3), np.float32),
    np.zeros((1, 1, 9), np.int32),
  )
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
  params = hf.load(molmo2.KEYS, case / "weights.safetensors", shapes)
  hf.save(molmo2.KEYS, params, tmp_path / "new")
  want = load_file(case / "weights.safetensors")
  got = load_file(tmp_path / "new" / "model.safetensors")
  assert got.keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_array_equal(got[name], value.astype(dtype), strict=True)
  hf.save(molmo2.RELEASED, params, tmp_path / "old", release=1)
  released = hf.Reader(tmp_path / "old").shapes
  assert "model.vision_backbone.image_pooling_2d.wq.weight" in released
  assert not any("language_model" in name for name in released)
  again = hf.load(molmo2.KEYS, tmp_path / "old", shapes)
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
    np.testing.assert_array_equal(a, b, strict=True)


def test_the_stacked_arrays_of_openpi_are_read(tmp_path):
  model = vit.Model(**TINY, image=16)
  params = random_params(model)
  arrays = {}
  for names, path, *_ in vit_keys.BIG_VISION:
    name = names if isinstance(names, str) else names[0]
    array = trees.flatten(params)[path]
    L, N, H = model.layers, model.heads, model.width // model.heads
    if name == "pos_embedding":
      array = array[None]
    elif "Attention" in name and "/out/" not in name:
      array = array.reshape(*array.shape[:-1], N, H)
    elif name.endswith("out/kernel"):
      array = array.reshape(L, N, H, -1)
    arrays[f"PaliGemma/img/{name}"] = array
  np.savez(tmp_path / "params.npz", **arrays)
  table = hf.nest(vit_keys.BIG_VISION, "PaliGemma/img/", "")
  loaded = hf.load(table, tmp_path / "params.npz", params)
  assert trees.diff(loaded, params) == ""
  for a, b in zip(
    jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True
  ):
    np.testing.assert_array_equal(a, b, strict=True)
