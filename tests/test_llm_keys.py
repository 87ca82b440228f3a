# SPDX-License-Identifier: Apache-2.0
"""Decoders and readers of images fit the published checkpoints."""

import functools
import re
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from spatial_jax import hf, models, sharding, trees
from spatial_jax.models import janus, llm, llm_variants, paligemma
from tests import manifests

TOKENS = np.zeros((1, 8), np.int32)
MOLMO2 = (*llm_variants.MOLMO2, *llm_variants.MOLMO2_RELEASED)


def row(system, checkpoint, variant, body="model.", head="", **more):
  return pytest.param(
    system, checkpoint, variant, body, head, more, id=checkpoint[:40]
  )


LANGUAGE = ("language_model.model.", "language_model.")
PI0 = "paligemma_with_expert."
TRUNK = f"{PI0}paligemma.model.language_model.", f"{PI0}paligemma."
EXPERT = f"{PI0}gemma_expert.model.", None  # its head is never used
ECHO = "model.language_model."
DECODERS = (
  row("cambrian", "nyu-visionx/cambrian-8b", "llama3-8b"),
  row("cambrian", "nyu-visionx/cambrian-13b", "vicuna-13b"),
  row("cambrian", "nyu-visionx/cambrian-34b", "yi-34b"),
  row("llava_3d", "ChaimZhu/LLaVA-3D-7B", "vicuna-7b"),
  row("loc3r_vlm", "lmms-lab/LLaVA-Video-7B-Qwen2", "qwen2-7b"),
  row("skeleton_llm", "SkeletonLLM", "qwen2.5-7b", *LANGUAGE, vocab=151674),
  row("spatial_lm", "SpatialLM1.0-Qwen-0.5B", "qwen2.5-0.5b"),
  row("spatial_lm", "SpatialLM1.1-Qwen-0.5B", "qwen2.5-0.5b"),
  row("spatial_lm", "SpatialLM1.0-Llama-1B", "llama3.2-1b"),
  row("spatial_lm", "SpatialLM1.1-Llama-1B", "llama3.2-1b"),
  row(
    "spatial_forcing",
    "openvla/openvla-7b",
    "llama2-7b",
    *LANGUAGE,
    vocab=32064,
  ),
  row("spatial_forcing", "pi0_base", "gemma-2b", *TRUNK, vocab=257152),
  row("spatial_forcing", "pi05_base", "gemma-2b", *TRUNK, vocab=257152),
  row("spatial_forcing", "pi0_base", "gemma-300m", *EXPERT),
  row("spatial_forcing", "pi05_base", "gemma-300m", *EXPERT, adaptive=True),
  row("three_d_llava", "3D-LLaVA-7B merged", "vicuna-7b", vocab=32001),
  row("echogen", "Janus-Pro-1B (deepseek", "deepseek-1.3b", *LANGUAGE),
  row("echogen", "Janus-Pro-1B (transformers", "deepseek-1.3b", ECHO),
  row("echogen", "Janus-Pro-7B (deepseek", "deepseek-7b", *LANGUAGE),
  row("echogen", "Janus-Pro-7B (transformers", "deepseek-7b", ECHO),
  row("stts", "Molmo2-4B (names", "molmo2-4b", "model.transformer."),
  row("stts", "Molmo2-4B (transformers", "molmo2-4b", ECHO),
  row("stts", "Molmo2-8B (names", "molmo2-8b", "model.transformer."),
  row("stts", "Molmo2-8B (transformers", "molmo2-8b", ECHO),
  row("spatial_mllm", "v1.1-Instruct-135K", "qwen2.5-3b"),
  row("spatial_mllm", "subset-sft", "qwen2.5-3b"),
  row("vilasr", "ViLaSR", "qwen2.5-7b"),
)


def checkpoint_of(system, name):
  """Tensors of the only checkpoint with this in its name."""
  found = [v for k, v in manifests.read(system).items() if name in k]
  assert len(found) == 1, (system, name)
  return found[0]


@functools.cache
def decoder_shapes(variant, **more):
  model = llm.Model(**{**llm.VARIANTS[variant], **more})
  width = model.width
  given = {}
  if not model.vocab:
    given["embeddings"] = jnp.zeros((1, 8, width))
  if model.adaptive:
    given["condition"] = jnp.zeros((1, width))
  init = functools.partial(model.init, jax.random.key(0))
  return jax.eval_shape(lambda x: init(TOKENS, TOKENS, TOKENS, **x), given)[
    "params"
  ]


def planned(table, tensors, shapes, **kwargs):
  """The plan, which may take a second of this process."""
  start = time.process_time()
  entries = hf.plan(table, tensors, shapes, **kwargs)
  assert time.process_time() - start < 1
  assert {entry.path for entry in entries} == set(trees.flatten(shapes))


@pytest.mark.parametrize(
  ("system", "checkpoint", "variant", "body", "head", "more"), DECODERS
)
def test_a_decoder_fits_its_part_of_a_published_checkpoint(
  system, checkpoint, variant, body, head, more
):
  tensors = checkpoint_of(system, checkpoint)
  # Below a prefix, and beside other parts of a system.
  names = r"(embed_tokens|layers|norm|wte|blocks|ln_f)\."
  mine = re.compile(re.escape(body) + names)
  part = {name: shape for name, shape in tensors.items() if mine.match(name)}
  if head is not None and f"{head}lm_head.weight" in tensors:
    part[f"{head}lm_head.weight"] = tensors[f"{head}lm_head.weight"]
  table = MOLMO2 if variant.startswith("molmo2") else llm.KEYS
  keys = llm_variants.keys(body, head or "", path="", table=table)
  planned(keys, part, decoder_shapes(variant, **more))


@functools.cache
def whole_shapes(name, **more):
  config = ConfigDict({"model_name": name, "model": more, "batch_size": 1})
  config.data = {"length": 1200, "images": 2}
  model, mod = models.build(config)
  if name == "qwen2_5_vl":
    config.data.layout = {
      "patches": 64,
      "frames": 1,
      "frame_patches": 64,
      "windows": 4,
    }
  init = functools.partial(model.init, jax.random.key(0))
  shapes = jax.eval_shape(
    lambda x: init(**mod.arguments(x)), mod.INPUTS(config)
  )
  return shapes["params"], mod


@pytest.mark.parametrize(
  ("system", "checkpoint", "model", "more"),
  [
    ("spatial_forcing", "pi0_base", "paligemma", {"variant": "pi0"}),
    ("spatial_forcing", "pi05_base", "paligemma", {"variant": "pi0"}),
    ("echogen", "Janus-Pro-1B (deepseek", "janus", {"variant": "1b"}),
    ("echogen", "Janus-Pro-1B (transformers", "janus", {"variant": "1b"}),
    (
      "echogen",
      "Janus-Pro-7B (deepseek",
      "janus",
      {"variant": "7b", "image_token": 1},
    ),
    (
      "echogen",
      "Janus-Pro-7B (transformers",
      "janus",
      {"variant": "7b", "image_token": 1},
    ),
    ("vilasr", "ViLaSR", "qwen2_5_vl", {"variant": "7b"}),
  ],
)
def test_a_reader_of_images_fits_a_published_checkpoint(
  system, checkpoint, model, more
):
  shapes, mod = whole_shapes(model, **more)
  tensors = checkpoint_of(system, checkpoint)
  planned(mod.KEYS, tensors, shapes, ignore=mod.IGNORE)


def test_a_lost_tensor_is_named_as_its_checkpoint_would():
  shapes, mod = whole_shapes("janus", variant="1b")
  tensors = dict(checkpoint_of("echogen", "Janus-Pro-1B (deepseek"))
  lost = (
    "vision_model.vision_tower.blocks.0.attn.qkv.weight",
    "aligner.layers.0.bias",
    "language_model.model.layers.3.mlp.up_proj.weight",
  )
  for name in lost:
    del tensors[name]
  with pytest.raises(ValueError, match=r"\(3 problems\)") as error:
    hf.plan(mod.KEYS, tensors, shapes, ignore=mod.IGNORE)
  for name in lost:
    assert f"missing: {name} " in str(error.value)


def test_published_files_of_paligemma_have_other_prefixes():
  shapes, mod = whole_shapes("paligemma", variant="3b-224")
  entries = hf.plan(
    mod.KEYS, names_of(mod.KEYS, shapes, release=1), shapes, ignore=mod.IGNORE
  )
  names = {name for entry in entries for name in entry.names}
  assert "language_model.model.layers.17.mlp.up_proj.weight" in names
  assert "vision_tower.vision_model.post_layernorm.bias" in names
  assert "multi_modal_projector.linear.weight" in names


def names_of(table, shapes, release):
  """Names -> shapes that `hf.save` would write, without data."""
  tensors = {}
  for names, path, *_ in table:
    leaf = trees.flatten(shapes).get(path) if isinstance(path, str) else None
    if leaf is None:
      continue
    name = names if isinstance(names, str) else names[release]
    shape = leaf.shape[1:] if "{i}" in name else leaf.shape
    if path.endswith("kernel"):
      shape = (shape[-1], shape[-2], *shape[:-2])
    for i in range(leaf.shape[0] if "{i}" in name else 1):
      tensors[name.replace("{i}", str(i))] = shape
  return tensors


COUNTS = {
  "llama2-7b": 6_738_415_616,
  "llama3-8b": 8_030_261_248,
  "llama3.2-1b": 1_235_814_400,
  "llama3.2-3b": 3_212_749_824,
  "yi-34b": 34_388_917_248,
  "qwen2.5-0.5b": 494_032_768,
  "qwen2-7b": 7_615_616_512,
  "qwen3-0.6b": 596_049_920,
  "qwen3-1.7b": 1_720_574_976,
  "qwen3-4b": 4_022_468_096,
  "qwen3-8b": 8_190_735_360,
  "qwen3-14b": 14_768_307_200,
  "qwen3-32b": 32_762_123_264,
  "gemma-2b": 2_506_172_416,
}


@pytest.mark.parametrize("variant", llm.VARIANTS)
def test_every_variant_has_sharding_rules_and_its_published_size(variant):
  shapes = decoder_shapes(variant)
  assert trees.count(shapes) == COUNTS.get(variant, trees.count(shapes))
  specs = sharding.parameters(shapes, sharding.mesh(fsdp=4, tensor=2))
  held = sum(
    np.prod(spec.shard_shape(leaf.shape))
    for spec, leaf in zip(
      jax.tree.leaves(specs), jax.tree.leaves(shapes), strict=True
    )
  )
  assert held < trees.count(shapes) / 8 * 1.5


# --- round trips ------------------------------------------------------------

SMALL = {
  "vocab": 20,
  "width": 16,
  "layers": 2,
  "heads": 4,
  "kv_heads": 2,
  "mlp": 24,
}
VIT = {"width": 8, "layers": 2, "heads": 2, "mlp": 12, "patch": 2, "image": 4}


def small(variant, **more):
  return decoder_shapes(variant, **SMALL, **more)


def small_reader(mod):
  variant = next(iter(mod.VARIANTS.values()))
  model = mod.Model(
    vit=FrozenConfigDict({**variant["vit"], **VIT}),
    llm=FrozenConfigDict({**variant["llm"], **SMALL}),
    image_token=1,
  )
  images = np.zeros((1, 1, 4, 4, 3), np.float32)
  init = functools.partial(model.init, jax.random.key(0))
  return jax.eval_shape(lambda: init(TOKENS, TOKENS, TOKENS, images=images))[
    "params"
  ]


def expert(adaptive):
  more = {**SMALL, "vocab": 0, "adaptive": adaptive}
  return decoder_shapes("gemma-300m", **more)


whole = functools.partial(llm_variants.keys, path="")
TABLES = {
  "llama": (whole(), 0, lambda: small("llama3-8b")),
  "qwen2": (whole(), 0, lambda: small("qwen2-7b")),
  "qwen3": (whole(), 0, lambda: small("qwen3-4b")),
  "gemma": (whole(), 0, lambda: small("gemma-2b")),
  "pi0 expert": (whole(), 0, lambda: expert(False)),
  "pi0.5 expert": (whole(), 0, lambda: expert(True)),
  "molmo2": (
    whole(table=MOLMO2),
    0,
    lambda: small("molmo2-4b", new_vocab=6),
  ),
  "molmo2 as released": (
    whole("model.transformer.", table=llm_variants.MOLMO2_RELEASED),
    0,
    lambda: small("molmo2-4b", new_vocab=6),
  ),
  "paligemma": (paligemma.KEYS, 0, lambda: small_reader(paligemma)),
  "paligemma as published": (
    paligemma.KEYS,
    1,
    lambda: small_reader(paligemma),
  ),
  "paligemma in pi0": (paligemma.KEYS, 2, lambda: small_reader(paligemma)),
  "janus": (janus.TRANSFORMERS, 0, lambda: small_reader(janus)),
  "janus as released": (janus.DEEPSEEK, 0, lambda: small_reader(janus)),
}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", TABLES)
def test_save_then_load_returns_the_same_bits(name, dtype, tmp_path):
  table, release, shapes = TABLES[name]
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(dtype), shapes()
  )
  hf.save(table, params, tmp_path, release=release, shard_bytes=3000)
  # Both namings are read by the table that has both.
  both = (*table, *janus.KEYS) if "janus" in name else table
  loaded = trees.flatten(hf.load(both, tmp_path, params))
  assert loaded.keys() == trees.flatten(params).keys()
  for path, leaf in trees.flatten(params).items():
    got = np.asarray(loaded[path])
    assert got.dtype == leaf.dtype
    np.testing.assert_array_equal(got.view(np.uint8), leaf.view(np.uint8), path)
  again = tmp_path / "again"
  hf.save(
    table, trees.unflatten(loaded), again, release=release, shard_bytes=3000
  )
  for file in tmp_path.glob("*.safetensors"):
    assert file.read_bytes() == (again / file.name).read_bytes()
