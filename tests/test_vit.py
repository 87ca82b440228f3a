# SPDX-License-Identifier: Apache-2.0
"""Image transformers equal the published code, whatever the image's size."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from ml_collections import FrozenConfigDict
from safetensors.numpy import load_file, save_file

from spatial_jax import hf, sharding, trees
from spatial_jax.models import molmo2_vit, vit, vit_keys
from spatial_jax.nn.resize import resize
from tests import manifests

GOLDEN = pathlib.Path(__file__).parent / "golden" / "vision"
TOLERANCE = 1e-4
TINY = {"width": 32, "layers": 3, "heads": 4, "mlp": 64, "patch": 4}
CLIP = {
  "class_token": True,
  "class_position": True,
  "patch_bias": False,
  "pre_norm": True,
  "activation": "quick_gelu",
  "eps": 1e-5,
  "final_norm": "kept",
}
DINO = {"class_token": True, "class_position": True, "layer_scale": True}


def worst(got, want):
  """Largest difference relative to the largest number that is wanted."""
  got, want = np.asarray(got), np.asarray(want)
  assert got.shape == want.shape, (got.shape, want.shape)
  return np.max(np.abs(got - want)) / np.max(np.abs(want))


def abstract(model, *inputs):
  if not inputs:
    return shapes_of(model)
  init = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs))
  return init["params"]


@functools.cache
def shapes_of(model):
  return abstract(model, np.zeros((1, model.image, model.image, 3), "f"))


# These programs run once: compiling them quickly counts.
jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@functools.partial(jit, static_argnums=0)
def run(model, params, *inputs):
  return model.apply({"params": params}, *inputs)


def images_of(*shape):
  return np.random.default_rng(3).normal(size=(*shape, 3)).astype("f")


def random_params(model, *inputs, dtype=np.float32):
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(dtype), abstract(model, *inputs)
  )


# --------------------------------------------------------------------------
# Recorded outputs of the code that the systems' towers come from.

SIGLIP_TINY = {"width": 32, "layers": 2, "heads": 2, "mlp": 119, "patch": 8}
RECORDED = {
  # 43 pixels are five patches and a rest, resampled to 4 x 4 afterwards.
  "cambrian_siglip": (vit_keys.TIMM, {**SIGLIP_TINY, "image": 43}),
  "cambrian_clip": (
    hf.nest(vit_keys.CLIP, "vision_model.", ""),
    {
      **CLIP,
      "width": 24,
      "layers": 3,
      "heads": 3,
      "mlp": 48,
      "patch": 8,
      "image": 32,
      "output_layer": -2,
    },
  ),
  "cambrian_dinov2": (
    vit_keys.DINOV2_SWIGLU,
    {
      **DINO,
      "width": 32,
      "layers": 2,
      "heads": 2,
      "mlp": 88,
      "patch": 8,
      "image": 56,
      "gated": True,
      "resample": "offset",
    },
  ),
  "openvla_dinov2": (
    vit_keys.TIMM,
    {
      "width": 16,
      "layers": 4,
      "heads": 2,
      "mlp": 64,
      "patch": 14,
      "image": 56,
      "class_token": True,
      "registers": 4,
      "layer_scale": True,
      "final_norm": "kept",
      "output_layer": -2,
    },
  ),
  "openvla_siglip": (
    vit_keys.TIMM,
    {
      "width": 12,
      "layers": 5,
      "heads": 2,
      "mlp": 44,
      "patch": 14,
      "image": 56,
      "final_norm": "kept",
      "output_layer": -2,
    },
  ),
  "internvit": (
    vit_keys.INTERNVIT,
    {
      **DINO,
      "width": 32,
      "layers": 2,
      "heads": 2,
      "mlp": 64,
      "patch": 14,
      "image": 56,
      "final_norm": "none",
    },
  ),
}


def recorded(name, folder):
  """Inputs and outputs of a recording; its weights go to a folder."""
  if name.startswith("cambrian"):
    return of_cambrian(("siglip", "clip", "dinov2").index(name[9:]), folder)
  groups = {"weights": {}, "inputs": {}, "outputs": {}}
  for key, value in load_file(GOLDEN / f"{name}.safetensors").items():
    group, key = key.split("/", 1)
    groups[group][key] = value
  save_file(groups["weights"], folder / "model.safetensors")
  return groups["inputs"], groups["outputs"]


def of_cambrian(number, folder):
  """One of the towers in the case of the whole model."""
  case = GOLDEN.parent / "cambrian" / "full_infer"
  weights = load_file(case / "weights.safetensors")
  weights = manifests.below(weights, f"towers.{number}.")
  save_file(weights, folder / "model.safetensors")
  inputs = load_file(case / "inputs.safetensors")
  outputs = load_file(case / "outputs.safetensors")
  return (
    {"pixels": inputs[f"pixels_{number}"]},
    {"tokens": outputs[f"tower_{number}_tokens"]},
  )


@pytest.mark.parametrize("name", RECORDED)
def test_outputs_equal_those_recorded_from_each_system(name, tmp_path):
  table, sizes = RECORDED[name]
  inputs, want = recorded(name, tmp_path)
  model = vit.Model(**sizes)
  params = hf.load(table, tmp_path, abstract(model), ignore=vit_keys.IGNORE)
  tokens, out = run(model, params, inputs["pixels"].transpose(0, 2, 3, 1))
  if name in ("cambrian_siglip", "cambrian_dinov2"):
    side = int(tokens.shape[1] ** 0.5)
    tokens = tokens.reshape(len(tokens), side, side, -1)
    tokens = resize(tokens, (4, 4)).reshape(len(tokens), 16, -1)
  if "tokens" in want:
    assert worst(tokens, want["tokens"]) <= TOLERANCE
  else:
    assert worst(out["vit/tokens"], want["all_tokens"]) <= TOLERANCE


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


def molmo2(layers=4, image=12):
  sizes = {"width": 16, "heads": 2, "mlp": 24, "patch": 2}
  tower = {**molmo2_vit.VIT, **sizes, "layers": layers, "image": image}
  return molmo2_vit.Model(
    vit=FrozenConfigDict(tower),
    read=(layers - 1, layers - 3),
    width=16,
    heads=2,
    mlp=28,
    out_width=20,
  )


def unpatchify(patches, patch):
  """[F h*w p*p*3] to square images [F height width 3]."""
  F, count, _ = patches.shape
  h = int(count**0.5)
  x = patches.reshape(F, h, h, patch, patch, 3).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(F, h * patch, h * patch, 3)


def test_molmo2_equals_its_recording_block_by_block(tmp_path):
  inputs, want = recorded("molmo2", tmp_path)
  model = molmo2()
  images = unpatchify(inputs["patches"], 2)[None]
  pooling = inputs["pooling"][None].astype(np.int32)
  params = hf.load(molmo2_vit.KEYS, tmp_path, abstract(model, images, pooling))
  merged, out = run(model, params, images, pooling)
  assert worst(out["vit/embedded"], want["vit_hidden_0"]) <= TOLERANCE
  for i in range(4):
    got = out["vit/blocks"][i]
    assert worst(got, want[f"vit_hidden_{i + 1}"]) <= TOLERANCE
  assert np.all(out["vit/valid_mask"])
  assert worst(merged[0], want["merged"]) <= TOLERANCE


# --------------------------------------------------------------------------
# Live parity with transformers on random tiny models.


def live():
  for package in ("torch", "transformers"):
    if importlib.util.find_spec(package) is None:
      pytest.skip(f"{package} is not installed: only recordings are compared")
  import torch
  import transformers

  return torch, transformers


_COMMON = {
  "hidden_size": 32,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "patch_size": 4,
  "image_size": 16,
}
_INNER = {**_COMMON, "intermediate_size": 64}
_RATIO = {**_COMMON, "mlp_ratio": 2}
# Family: class and config of transformers, table, our arguments, and whether a
# table for other image sizes has to be asked for.
LIVE = {
  "clip": ("CLIPVision", _INNER, vit_keys.CLIP, CLIP, True),
  "siglip": (
    "SiglipVision",
    _INNER,
    vit_keys.SIGLIP,
    {"activation": "gelu_tanh", "pool": True},
    True,
  ),
  "janus": ("JanusVision", _RATIO, vit_keys.JANUS, {}, True),
  "dinov2": ("Dinov2", _RATIO, vit_keys.DINOV2, DINO, False),
  "dinov2_swiglu": (
    "Dinov2",
    {**_RATIO, "use_swiglu_ffn": True},
    vit_keys.DINOV2_SWIGLU,
    {**DINO, "gated": True, "mlp": 48},
    False,
  ),
  "dinov2_registers": (
    "Dinov2WithRegisters",
    {**_RATIO, "num_register_tokens": 3},
    vit_keys.DINOV2,
    {**DINO, "registers": 3, "resample": "antialias"},
    False,
  ),
  "internvl": (
    "InternVLVision",
    {**_INNER, "attention_bias": True},
    vit_keys.INTERNVL,
    {**DINO, "final_norm": "none"},
    False,
  ),
}


def randomize(torch, model):
  """No parameter is zero or one, so that a wrong place shows."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, p in model.named_parameters():
      is_norm = p.ndim == 1 and "norm" in name and name.endswith("weight")
      p.normal_(0, 0.2, generator=generator)
      p += 1.0 if is_norm else 0.0
  return model.eval()


@functools.cache
def reference(family):
  torch, transformers = live()
  name, config, *_ = LIVE[family]
  config = getattr(transformers, f"{name}Config")(
    **config, attn_implementation="eager"
  )
  return randomize(torch, getattr(transformers, f"{name}Model")(config))


def ours(family, **more):
  return vit.Model(**{**TINY, "image": 16, **LIVE[family][3], **more})


def prefixed(table):
  """transformers writes some towers as parts of a larger model."""
  return hf.nest(table, ("vision_model.", ""), "")


@pytest.fixture(scope="module", params=LIVE)
def published(request, tmp_path_factory):
  """A family, its model in transformers and the folder which that wrote."""
  model = reference(request.param)
  folder = tmp_path_factory.mktemp(request.param)
  model.save_pretrained(folder)
  return request.param, model, folder


def compute(family, model, images):
  torch, _ = live()
  more = {"interpolate_pos_encoding": True} if LIVE[family][4] else {}
  with torch.no_grad():
    pixels = torch.tensor(images.transpose(0, 3, 1, 2))
    return model(pixels, output_hidden_states=True, **more)


@functools.partial(jit, static_argnums=0)
def embed(model, params, images):
  """What the first block reads; the compiler leaves the blocks out."""
  return model.apply({"params": params}, images)[1]["vit/embedded"]


def parameters(family, folder):
  return hf.load(
    prefixed(LIVE[family][2]),
    folder,
    abstract(ours(family)),
    ignore=("embeddings.mask_token",),
  )


@pytest.mark.filterwarnings("ignore")
def test_outputs_equal_those_of_transformers(published):
  family, theirs, folder = published
  model = ours(family)
  params = parameters(family, folder)
  # Neither square nor of the size that the table of positions has.
  images = images_of(2, 28, 20)
  want = compute(family, theirs, images)
  tokens, out = run(model, params, images)
  hidden = [x.numpy() for x in want.hidden_states]
  report = {
    "tokens": worst(out["vit/tokens"], want.last_hidden_state),
    "embedded": worst(out["vit/embedded"], hidden[0]),
    **{
      f"block {i}": worst(block, hidden[i + 1])
      for i, block in enumerate(out["vit/blocks"])
    },
  }
  if model.pool:
    report["pooled"] = worst(out["vit/pooled"], want.pooler_output)
  np.testing.assert_array_equal(tokens, out["vit/tokens"][:, model.prefix :])
  print(family, {name: f"{value:.1e}" for name, value in report.items()})
  assert all(value <= TOLERANCE for value in report.values()), report


# The table's own size, a non-square one of as many patches, and a smaller one
# whose rest of pixels is lost.
@pytest.mark.parametrize("size", [(16, 16), (8, 32), (13, 10)])
@pytest.mark.filterwarnings("ignore")
def test_positions_of_other_sizes_equal_those_of_transformers(size, published):
  family, theirs, folder = published
  if family in ("janus", "dinov2_swiglu"):
    pytest.skip("these two read images as siglip and dinov2 do")
  images = images_of(1, *size)
  want = compute(family, theirs, images).hidden_states[0]
  got = embed(ours(family), parameters(family, folder), images)
  assert worst(got, want) <= TOLERANCE


@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_what_we_write(published, tmp_path):
  family, theirs, folder = published
  table = prefixed(LIVE[family][2])
  model = ours(family)
  ignore = ("embeddings.mask_token",)
  params = hf.load(table, folder, abstract(model), ignore=ignore)
  written = load_file(folder / "model.safetensors")
  release = int(not any(name.startswith("vision_model.") for name in written))
  hf.save(table, params, tmp_path, release=release)
  theirs.config.save_pretrained(tmp_path)
  got = load_file(tmp_path / "model.safetensors")
  assert written.keys() - got.keys() <= {"embeddings.mask_token"}
  for name, value in got.items():
    np.testing.assert_array_equal(value, written[name], strict=True)
  again, info = type(theirs).from_pretrained(
    tmp_path, output_loading_info=True, attn_implementation="eager"
  )
  assert set(info["missing_keys"]) <= {"embeddings.mask_token"}
  assert not info["unexpected_keys"] and not info["mismatched_keys"]
  images = images_of(1, 16, 16)
  want = compute(family, theirs, images).last_hidden_state.numpy()
  got = compute(family, again.eval(), images).last_hidden_state.numpy()
  np.testing.assert_array_equal(got, want)


@pytest.mark.filterwarnings("ignore")
def test_molmo2_equals_that_of_transformers(tmp_path):
  torch, transformers = live()
  theirs = transformers.Molmo2Model(
    transformers.Molmo2Config(
      vision_config={
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "image_size": [14, 14],
        "patch_size": 2,
      },
      adapter_config={
        "vision_feature_layer": [4, 2],
        "hidden_size": 16,
        "intermediate_size": 28,
        "text_hidden_size": 20,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
      },
      text_config={
        "hidden_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "vocab_size": 8,
        "additional_vocab_size": 8,
        "intermediate_size": 16,
      },
      attn_implementation="eager",
    )
  )
  randomize(torch, theirs)
  vision = {
    name: value.detach().numpy()
    for name, value in theirs.state_dict().items()
    if not name.startswith("language_model")
  }
  save_file(vision, tmp_path / "model.safetensors")
  rng = np.random.default_rng(2)
  images = rng.normal(size=(1, 3, 14, 14, 3)).astype("f")
  # Two of three patches, any of all frames, in any order; one empty token.
  pooling = rng.integers(0, 3 * 49, (1, 11, 9)).astype(np.int32)
  pooling[rng.random(pooling.shape) < 0.3] = -1
  pooling[0, 4] = -1
  model = molmo2(layers=5, image=14)
  params = hf.load(molmo2_vit.KEYS, tmp_path, abstract(model, images, pooling))
  merged, out = run(model, params, images, pooling)
  patches = images[0].reshape(3, 7, 2, 7, 2, 3).transpose(0, 1, 3, 2, 4, 5)
  with torch.no_grad():
    tower = theirs.vision_tower(
      torch.tensor(patches.reshape(3, 49, 12)), output_hidden_states=True
    )
    features = torch.cat([tower.hidden_states[i + 1] for i in (4, 2)], -1)
    want = theirs.multi_modal_projector(
      features, torch.tensor(pooling[0]).long()
    ).last_hidden_state.numpy()
  assert worst(out["vit/features"][0], features.reshape(147, 32)) <= TOLERANCE
  valid = np.asarray(out["vit/valid_mask"][0])
  assert not valid[4] and np.sum(~valid) == 1
  assert worst(np.asarray(merged[0])[valid], want) <= TOLERANCE
  assert not np.any(merged[0, 4])


# --------------------------------------------------------------------------
# Published checkpoints.

# System, start of the checkpoint's name, prefix, table, variant, overrides.
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
  entries = hf.plan(table, tensors, shapes, ignore=ignore)
  assert {entry.path for entry in entries} == set(trees.flatten(shapes))
  if overrides == _POOL:  # and without the head that no system uses
    hf.plan(table, tensors, full_size(variant), ignore=vit_keys.IGNORE)


@pytest.mark.parametrize("size", ["4b", "8b"])
def test_the_table_fits_molmo2_in_both_namings(size):
  model = molmo2_vit.Model(**molmo2_vit.VARIANTS[size])
  images = np.zeros((1, 1, 378, 378, 3), np.float32)
  shapes = abstract(model, images, np.zeros((1, 81, 9), np.int32))
  for naming in ("names in", "transformers"):
    tensors = tensors_of("stts", f"allenai/Molmo2-{size.upper()} ({naming}", "")
    parts = ("vision_backbone.", "vision_tower.", "multi_modal_projector.")
    tensors = {
      name: shape
      for name, shape in manifests.below(tensors, "model.").items()
      if name.startswith(parts)
    }
    entries = hf.plan(molmo2_vit.KEYS, tensors, shapes)
    assert {entry.path for entry in entries} == set(trees.flatten(shapes))


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
@pytest.mark.parametrize("release", [0, 1])
def test_molmo2_is_saved_and_loaded_without_losing_a_bit(
  release, dtype, tmp_path
):
  inputs, _ = recorded("molmo2", tmp_path)
  model = molmo2()
  images = unpatchify(inputs["patches"], 2)[None]
  pooling = inputs["pooling"][None].astype(np.int32)
  params = random_params(model, images, pooling, dtype=dtype)
  folder = tmp_path / "again"
  hf.save(molmo2_vit.KEYS, params, folder, release=release)
  loaded = hf.load(molmo2_vit.KEYS, folder, params)
  for a, b in zip(
    jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True
  ):
    np.testing.assert_array_equal(
      np.asarray(a).view(np.uint8), b.view(np.uint8)
    )
  if release:  # the recording has these names
    want = load_file(tmp_path / "model.safetensors")
    got = load_file(folder / "model.safetensors")
    assert {k: v.shape for k, v in got.items()} == {
      k: v.shape for k, v in want.items()
    }


# --------------------------------------------------------------------------
# Properties.


def tiny(**more):
  return vit.Model(**{**TINY, "image": 16, **DINO, "registers": 2, **more})


def test_blocks_after_the_output_layer_are_kept_but_not_computed():
  full, cut = tiny(final_norm="kept"), tiny(final_norm="kept", output_layer=-2)
  params, images = random_params(full), images_of(1, 16, 16)
  assert trees.diff(abstract(cut), params) == ""
  _, want = run(full, params, images)
  _, got = run(cut, params, images)
  assert got["vit/blocks"].shape[0] == 2
  np.testing.assert_allclose(
    got["vit/blocks"], want["vit/blocks"][:2], rtol=1e-5, atol=1e-5
  )
  np.testing.assert_array_equal(got["vit/tokens"], got["vit/blocks"][-1])

  def total(params):
    return jnp.sum(cut.apply({"params": params}, images)[0] ** 2)

  grads = jit(jax.grad(total))(params)
  kernel = grads["blocks"]["attention"]["query"]["kernel"]
  assert np.any(kernel[:2]) and not np.any(kernel[2])
  assert not np.any(grads["norm"]["scale"])


def test_read_blocks_equal_those_of_the_stack():
  model = tiny(read=(2, 0))
  params, images = random_params(model), images_of(2, 16, 16)
  _, out = run(model, params, images)
  np.testing.assert_array_equal(out["vit/read"][0], out["vit/blocks"][2])
  np.testing.assert_array_equal(out["vit/read"][1], out["vit/blocks"][0])


def test_intermediates_cost_no_memory_where_they_are_not_used():
  def temporaries(layers):
    model = tiny(layers=layers, read=(1,))
    images = np.zeros((4, 64, 64, 3), np.float32)
    params = abstract(model, images)

    def forward(params, images):
      tokens, out = model.apply({"params": params}, images)
      return tokens, out["vit/read"]

    compiled = jax.jit(forward).lower(params, images).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  # The residual stream is [4 259 32] float32: 133 kB a block.
  assert temporaries(24) - temporaries(4) < 1.5 * 4 * 259 * 32 * 4


def test_pixels_beyond_the_last_whole_patch_do_not_matter():
  model = tiny()
  params, images = random_params(model), images_of(1, 19, 18)
  tokens, _ = run(model, params, images)
  cropped, _ = run(model, params, images[:, :16, :16])
  np.testing.assert_array_equal(tokens, cropped)


def test_an_image_does_not_see_the_others_of_its_batch():
  model = tiny()
  params, images = random_params(model), images_of(2, 16, 16)
  before, _ = run(model, params, images)
  images[1] += 1
  after, _ = run(model, params, images)
  np.testing.assert_array_equal(before[0], after[0])
  assert np.all(np.any(before[1] != after[1], axis=-1))


def test_recomputing_and_bfloat16_keep_the_numbers():
  params, images = random_params(tiny()), images_of(1, 16, 16)
  params = jax.tree.map(lambda x: x * np.float32(0.2), params)

  def gradient(model):
    def total(params):
      tokens, _ = model.apply({"params": params}, images)
      return jnp.mean(tokens.astype(jnp.float32) ** 2)

    return jit(jax.grad(total))(params)

  want = gradient(tiny())
  got = gradient(tiny(remat="full"))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  exact, _ = run(tiny(), params, images)
  tokens, out = run(tiny(dtype="bfloat16"), params, images)
  assert tokens.dtype == out["vit/blocks"].dtype == "bfloat16"
  assert worst(np.asarray(tokens, np.float32), exact) < 0.05


@pytest.mark.parametrize(
  ("more", "size", "message"),
  [
    ({"output_layer": 0}, 16, "output_layer=0 is none of -1 to -3"),
    ({"output_layer": -4}, 16, "output_layer=-4 is none of -1 to -3"),
    ({"read": (3,)}, 16, "asks for blocks that are not computed"),
    ({"resample": "nearest"}, 16, "resample='nearest' is unknown"),
    ({"activation": "swish"}, 16, "activation 'swish' is unknown"),
    ({"final_norm": "maybe"}, 16, "final_norm='maybe' is unknown"),
    ({}, 3, "images of 3 x 3 pixels hold no patch of 4 x 4"),
  ],
)
def test_wrong_arguments_say_what_is_expected(more, size, message):
  with pytest.raises(ValueError, match=message):
    abstract(tiny(**more), images_of(1, size, size))
