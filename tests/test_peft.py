# SPDX-License-Identifier: Apache-2.0
"""Adapters as PEFT's files: names, bits, settings; PEFT itself where it is."""

import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from spatial_jax import hf, lora, models, peft, trees
from spatial_jax.models import llm, qwen2_5_vl
from tests import manifests

KEYS = qwen2_5_vl.KEYS
# Three linear layers that are published as one.
FUSED = (
  (
    "blocks.{i}.qkv.weight",
    tuple(f"blocks/{n}/kernel" for n in ("query", "key", "value")),
  ),
)


@functools.cache
def shapes():
  """Parameters of the tiny variant."""
  model = models.qwen2_5_vl.Model(**qwen2_5_vl.VARIANTS["tiny"])
  tokens = np.zeros((1, 16), np.int32)
  batch = {
    "tokens": tokens,
    "segments": tokens,
    "positions": np.zeros((1, 3, 16), np.int32),
    "patches": np.zeros((1, 64, 96), np.float32),
  }
  model = model.clone(grid=(1, 8, 8))
  init = functools.partial(model.init, jax.random.key(0))
  return jax.eval_shape(lambda: init(**qwen2_5_vl.arguments(batch)))["params"]


def adapted(dtype=np.float32, *, scale=2.0, rank=4, layers="llm/blocks"):
  """Random parameters with random adapters on some linear layers."""
  rng = np.random.default_rng(0)

  def draw(*shape):
    return rng.normal(size=shape).astype(dtype)

  leaves = {k: draw(*x.shape) for k, x in trees.flatten(shapes()).items()}
  for name, x in trees.flatten(shapes()).items():
    if name.startswith(layers) and name.endswith("/kernel"):
      *lead, D, E = x.shape
      layer = name.removesuffix("/kernel")
      leaves[f"{layer}/lora_a"] = draw(*lead, D, rank)
      leaves[f"{layer}/lora_b"] = draw(*lead, rank, E)
      leaves[f"{layer}/lora_scale"] = np.full(lead, scale, np.float32)
  return trees.unflatten(leaves)


def assert_same_bits(got, want):
  assert trees.diff(got, want) == ""
  want = trees.flatten(want)
  for name, x in trees.flatten(got).items():
    x, y = np.asarray(x), np.asarray(want[name])
    assert x.tobytes() == y.tobytes(), name


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("layers", ["llm/blocks", "vit/blocks", "llm/head"])
def test_saving_and_loading_adapters_loses_no_bit(dtype, layers, tmp_path):
  params = adapted(dtype, layers=layers, scale=1.5)
  peft.save(KEYS, params, tmp_path, base="somewhere")
  got = peft.load(KEYS, tmp_path, shapes(), dtype=dtype)
  assert_same_bits(got, lora.adapters(params))
  again = tmp_path / "again"
  peft.save(KEYS, lora.attach(params, got), again, base="somewhere")
  for name in ("adapter_model.safetensors", "adapter_config.json"):
    assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("release", [0, 1])
def test_names_and_products_are_those_of_the_torch_layers(release, tmp_path):
  params = adapted()
  peft.save(KEYS, params, tmp_path / "adapter", release=release)
  hf.save(KEYS, params, tmp_path, drop=(lora.LEAVES,), release=release)
  base = load_file(tmp_path / "model.safetensors")
  tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
  assert len(tensors) == 2 * 7 * 3
  merged = lora.merge(jax.tree.map(jnp.asarray, params))
  hf.save(KEYS, merged, tmp_path / "merged", release=release)
  want = load_file(tmp_path / "merged/model.safetensors")
  part = ("", "language_model.")[release]
  x = np.random.default_rng(1).normal(size=(3, 96)).astype(np.float32)
  for i in range(3):
    name = f"model.{part}layers.{i}.mlp.down_proj"
    a = tensors[f"base_model.model.{name}.lora_A.weight"]
    b = tensors[f"base_model.model.{name}.lora_B.weight"]
    assert a.shape == (4, 96) and b.shape == (64, 4)
    # lora_B(lora_A(x)) * alpha / r, as torch's Linear multiplies.
    got = x @ base[f"{name}.weight"].T + 2.0 * x @ a.T @ b.T
    np.testing.assert_allclose(
      got, x @ want[f"{name}.weight"].T, rtol=1e-4, atol=1e-4
    )


def test_settings_tell_ranks_and_alphas_apart(tmp_path):
  small = adapted(layers="llm/blocks/attention", scale=0.5, rank=2)
  params = lora.attach(adapted(scale=2.0, rank=4), lora.adapters(small))
  scale = np.array([0.5, 4 / 3, 0.5], np.float32)  # by layer
  params["llm"]["blocks"]["attention"]["query"]["lora_scale"] = scale
  peft.save(KEYS, params, tmp_path)
  settings = json.loads((tmp_path / "adapter_config.json").read_text())
  assert settings["peft_type"] == "LORA" and settings["bias"] == "none"
  assert (settings["r"], settings["lora_alpha"]) == (2, 1)
  alpha = settings["alpha_pattern"]["model.layers.1.self_attn.q_proj"]
  assert alpha == pytest.approx(8 / 3)
  assert settings["rank_pattern"]["model.layers.2.mlp.up_proj"] == 4
  got = peft.load(KEYS, tmp_path, shapes())
  query = got["llm"]["blocks"]["attention"]["query"]
  np.testing.assert_array_equal(query["lora_scale"], scale)
  up = got["llm"]["blocks"]["mlp"]["up"]
  np.testing.assert_array_equal(up["lora_scale"], np.full(3, 2.0))
  assert up["lora_a"].shape == (3, 64, 4)


def test_rank_stabilised_scales_are_understood(tmp_path):
  peft.save(KEYS, adapted(), tmp_path)
  file = tmp_path / "adapter_config.json"
  settings = json.loads(file.read_text()) | {"use_rslora": True}
  file.write_text(json.dumps(settings))
  got = trees.flatten(peft.load(KEYS, tmp_path, shapes()))
  scales = {float(x[0]) for k, x in got.items() if k.endswith("lora_scale")}
  assert scales == {4.0}  # alpha 8 / sqrt(4)


def fused(names, *, same_a):
  rng = np.random.default_rng(2)
  leaves, a = {}, rng.normal(size=(2, 8, 3)).astype(np.float32)
  for name, width in (("query", 6), ("key", 4), ("value", 4)):
    leaves[f"blocks/{name}/kernel"] = np.zeros((2, 8, width), np.float32)
    if name in names:
      own = a if same_a else rng.normal(size=a.shape).astype(np.float32)
      leaves[f"blocks/{name}/lora_a"] = own
      b = rng.normal(size=(2, 3, width)).astype(np.float32)
      leaves[f"blocks/{name}/lora_b"] = b
      leaves[f"blocks/{name}/lora_scale"] = np.full(2, 0.5, np.float32)
  return trees.unflatten(leaves)


@pytest.mark.parametrize(
  ("names", "same_a", "rank"),
  [
    (("query", "key", "value"), True, 3),
    (("query", "key", "value"), False, 9),
    (("query", "value"), False, 6),
  ],
)
def test_layers_that_share_a_tensor_share_its_adapter(
  names, same_a, rank, tmp_path
):
  params = fused(names, same_a=same_a)
  peft.save(FUSED, params, tmp_path)
  tensors = load_file(tmp_path / "adapter_model.safetensors")
  assert {k: x.shape for k, x in tensors.items()} == {
    f"base_model.model.blocks.{i}.qkv.lora_{half}.weight": shape
    for i in range(2)
    for half, shape in (("A", (rank, 8)), ("B", (14, rank)))
  }
  got = lora.attach(params, peft.load(FUSED, tmp_path, params))
  if same_a:
    assert_same_bits(got, params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    lora.merge(jax.tree.map(jnp.asarray, got)),
    lora.merge(jax.tree.map(jnp.asarray, params)),
  )


def test_the_published_adapter_of_3d_llava_fits_vicuna(tmp_path):
  (tensors,) = (
    x for name, x in manifests.read("three_d_llava").items() if "r=32" in name
  )
  assert len(tensors) == 448
  model = llm.Model(**llm.VARIANTS["vicuna-7b"])
  tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  params = jax.eval_shape(
    model.init,
    jax.random.key(0),
    tokens,
    jax.ShapeDtypeStruct((1, 3, 4), jnp.int32),
    tokens,
  )["params"]
  leaves = {}
  for name, x in trees.flatten(params).items():
    if "blocks" in name and name.endswith("/kernel"):
      layer, (L, D, E) = name.removesuffix("/kernel"), x.shape
      for half, shape in (("a", (L, D, 32)), ("b", (L, 32, E))):
        leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
        leaves[f"{layer}/lora_{half}/kernel"] = leaf
  table = peft.keys(hf.nest(llm.KEYS, "model.", ""))
  entries = hf.plan(table, tensors, trees.unflatten(leaves))
  assert sum(len(entry.names) for entry in entries) == 448


def test_adapters_that_do_not_fit_say_what_is_wrong(tmp_path):
  peft.save(KEYS, adapted(), tmp_path)
  file, settings = (
    tmp_path / "adapter_model.safetensors",
    tmp_path / "adapter_config.json",
  )
  tensors = load_file(file)
  up = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
  broken = dict(tensors)
  del broken[up]
  broken["base_model.model.lm_head.weight"] = np.ones((2, 2), np.float32)
  save_file(broken, file)
  with pytest.raises(ValueError) as error:
    peft.load(KEYS, tmp_path, shapes())
  assert f"missing: {up}" in str(error.value)
  assert "unused: base_model.model.lm_head.weight" in str(error.value)
  text = settings.read_text()
  for change, message in (
    ({"peft_type": "IA3"}, "holds a IA3 adapter; only LoRA is read"),
    ({"use_dora": True}, "holds a DoRA adapter; only LoRA is read"),
  ):
    settings.write_text(json.dumps(json.loads(text) | change))
    with pytest.raises(ValueError, match=message):
      peft.load(KEYS, tmp_path, shapes())
  settings.write_text("[]")
  with pytest.raises(ValueError, match="no readable adapter configuration"):
    peft.load(KEYS, tmp_path, shapes())
  settings.write_text(text)
  file.rename(tmp_path / "adapter_model.bin")
  with pytest.raises(ValueError, match="pickled PyTorch weights"):
    peft.load(KEYS, tmp_path, shapes())
  with pytest.raises(ValueError, match="no adapters to save"):
    peft.save(KEYS, lora.merge(jax.tree.map(jnp.asarray, adapted())), tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_peft_loads_and_saves_the_same_adapters(tmp_path):
  for package in ("torch", "transformers", "peft"):
    if importlib.util.find_spec(package) is None:
      pytest.skip(f"{package} is not installed: files are checked without it")
  import torch
  from peft import PeftModel

  from tests.test_qwen2_5_vl import make

  published = make.reference()
  published.save_pretrained(tmp_path / "base")
  params = hf.load(KEYS, tmp_path / "base", shapes())
  params = lora.attach(params, lora.adapters(adapted()))
  peft.save(KEYS, params, tmp_path / "ours", release=1)
  wrapped = PeftModel.from_pretrained(published, tmp_path / "ours")
  tokens = np.arange(1, 13)[None]
  with torch.no_grad():
    ids = torch.tensor(tokens)
    want = wrapped(input_ids=ids).logits.numpy()
    wrapped.save_pretrained(tmp_path / "theirs")
    merged = wrapped.merge_and_unload().state_dict()
  arguments = {
    "tokens": jnp.asarray(tokens, jnp.int32),
    "positions": jnp.tile(jnp.arange(12)[None, None], (1, 3, 1)),
    "segments": jnp.ones((1, 12), jnp.int32),
  }
  model = qwen2_5_vl.Model(**qwen2_5_vl.VARIANTS["tiny"])
  got, _ = model.apply({"params": params}, **arguments)
  assert np.max(np.abs(got - want)) <= 1e-4 * np.max(np.abs(want))
  back = peft.load(KEYS, tmp_path / "theirs", shapes())
  assert_same_bits(back, lora.adapters(jax.tree.map(jnp.asarray, params)))
  hf.save(KEYS, lora.merge(params), tmp_path / "merged", release=1)
  for name, x in load_file(tmp_path / "merged/model.safetensors").items():
    np.testing.assert_allclose(x, merged[name].numpy(), rtol=1e-4, atol=1e-5)
