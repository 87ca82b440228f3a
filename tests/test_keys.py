# SPDX-License-Identifier: Apache-2.0
"""Key tables fit the published checkpoints; loading and saving lose no bit."""

import functools
import importlib.util
import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from spatial_jax import hf, models, trees
from spatial_jax.models import qwen2_5_vl

GOLDEN = pathlib.Path(__file__).parent / "golden"
# Parameters of the published checkpoints, as their files have them.
COUNTS = {
  "3b": 3_754_622_976,
  "7b": 8_292_166_656,
  "32b": 33_452_718_336,
  "72b": 73_410_777_344,
}


@functools.cache
def shapes_of(variant):
  model, mod = models.build(
    ConfigDict(
      {
        "model_name": "qwen2_5_vl",
        "model": {"variant": variant, "grid": (1, 8, 8)},
      }
    )
  )
  tokens = np.zeros((1, 16), np.int32)
  batch = {
    "tokens": tokens,
    "segments": tokens,
    "positions": np.zeros((1, 3, 16), np.int32),
    "patches": np.zeros((1, 64, 96 if variant == "tiny" else 1176), np.float32),
  }
  init = jax.eval_shape(
    lambda: model.init(jax.random.key(0), **mod.arguments(batch))
  )
  return init["params"]


def random_params(dtype, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(dtype), shapes_of("tiny")
  )


def rename(name):
  """transformers 4.51 -> 5."""
  if name.startswith("visual."):
    return f"model.{name}"
  return name.replace("model.", "model.language_model.", 1)


@pytest.mark.parametrize("variant", COUNTS)
def test_published_sizes_have_as_many_parameters_as_their_files(variant):
  assert trees.count(shapes_of(variant)) == COUNTS[variant]


@pytest.mark.parametrize("release", [4, 5])
def test_the_table_fits_the_published_3b_manifest(release):
  compact = json.loads((GOLDEN / "qwen2_5_vl" / "manifest_3b.json").read_text())
  tensors = {
    name.replace("{i}", str(i)): tuple(shape)
    for name, (shape, count) in compact.items()
    for i in range(count)
  }
  if release == 5:
    tensors = {rename(name): shape for name, shape in tensors.items()}
  shapes = shapes_of("3b")
  entries = hf.plan(qwen2_5_vl.KEYS, tensors, shapes)
  assert {entry.path for entry in entries} == set(trees.flatten(shapes))
  # Some files repeat the tied table as a head.
  tensors["lm_head.weight"] = (151936, 2048)
  hf.plan(qwen2_5_vl.KEYS, tensors, shapes)


@pytest.mark.parametrize("variant", ["7b", "32b", "72b"])
@pytest.mark.filterwarnings("ignore")
def test_the_table_fits_the_tensors_that_transformers_makes(variant):
  for package in ("torch", "transformers"):
    if importlib.util.find_spec(package) is None:
      pytest.skip(f"{package} is not installed, so no manifest can be made")
  import torch
  from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

  sizes = qwen2_5_vl.VARIANTS[variant]
  llm, vit = sizes["llm"], sizes["vit"]
  config = Qwen2_5_VLConfig(
    text_config={
      "vocab_size": llm["vocab"],
      "hidden_size": llm["width"],
      "intermediate_size": llm["mlp"],
      "num_hidden_layers": llm["layers"],
      "num_attention_heads": llm["heads"],
      "num_key_value_heads": llm["kv_heads"],
    },
    vision_config={
      "hidden_size": 1280,
      "intermediate_size": vit.get("mlp", 3420),
      "out_hidden_size": vit["out_width"],
    },
    tie_word_embeddings=False,
  )
  with torch.device("meta"):
    model = Qwen2_5_VLForConditionalGeneration(config)
  new = {name: tuple(x.shape) for name, x in model.named_parameters()}
  old = {
    name.replace("model.visual.", "visual.").replace("language_model.", ""): x
    for name, x in new.items()
  }
  assert old.keys() != new.keys()
  for tensors in (old, new):
    hf.plan(qwen2_5_vl.KEYS, tensors, shapes_of(variant))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("release", [0, 1])
def test_save_then_load_returns_the_same_bits(dtype, release, tmp_path):
  params = random_params(dtype)
  keys = qwen2_5_vl.KEYS
  hf.save(keys, params, tmp_path, release=release, shard_bytes=60_000)
  assert len(list(tmp_path.glob("*.safetensors"))) > 3
  loaded = hf.load(keys, tmp_path, params)
  assert trees.diff(loaded, params) == ""
  for name, leaf in trees.flatten(params).items():
    got = np.asarray(trees.flatten(loaded)[name])
    np.testing.assert_array_equal(got.view(np.uint8), leaf.view(np.uint8))
  # The other way round: the files that a second save writes are the same.
  again = tmp_path / "again"
  hf.save(keys, loaded, again, release=release, shard_bytes=60_000)
  for file in tmp_path.glob("*.safetensors"):
    assert file.read_bytes() == (again / file.name).read_bytes()


def test_each_device_reads_its_shard_only(tmp_path):
  params = random_params(np.float32)
  hf.save(qwen2_5_vl.KEYS, params, tmp_path)
  mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))

  def place(leaf):
    specs = {2: P(None, "b"), 3: P(None, "a", "b")}
    return NamedSharding(mesh, specs.get(leaf.ndim, P()))

  shardings = jax.tree.map(place, params)
  loaded = hf.load(qwen2_5_vl.KEYS, tmp_path, params, shardings)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  query = loaded["llm"]["blocks"]["attention"]["query"]["kernel"]
  assert {s.data.shape for s in query.addressable_shards} == {(3, 32, 16)}


def test_numbers_are_converted_to_the_wanted_dtype(tmp_path):
  params = random_params(ml_dtypes.bfloat16)
  hf.save(qwen2_5_vl.KEYS, params, tmp_path)
  loaded = hf.load(qwen2_5_vl.KEYS, tmp_path, shapes_of("tiny"))
  assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {
    np.dtype(np.float32)
  }
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, b.astype(np.float32)),
    loaded,
    params,
  )


def test_one_error_lists_everything_that_does_not_fit(tmp_path):
  params = random_params(np.float32)
  hf.save(qwen2_5_vl.KEYS, params, tmp_path)
  file = tmp_path / "model.safetensors"
  tensors = load_file(file)
  del tensors["visual.blocks.2.attn.qkv.bias"]
  tensors["model.norm.weight"] = np.ones(65, np.float32)
  tensors["visual.extra"] = np.ones(1, np.float32)
  save_file(tensors, file)
  wanted = {**params, "aux": {"head": {"kernel": np.ones((2, 2))}}}
  with pytest.raises(ValueError) as error:
    hf.load(qwen2_5_vl.KEYS, tmp_path, wanted)
  text = str(error.value)
  assert "4 problems" in text
  assert "missing: visual.blocks.2.attn.qkv.bias" in text
  assert "shape: model.norm.weight is [65]" in text
  assert "llm/norm/scale [64]" in text
  assert "no tensor is known for parameter aux/head/kernel" in text
  assert "unused: visual.extra [1]" in text


def test_known_leftovers_and_new_parameters_are_no_errors(tmp_path):
  params = random_params(np.float32)
  hf.save(qwen2_5_vl.KEYS, params, tmp_path)
  file = tmp_path / "model.safetensors"
  save_file({**load_file(file), "vggt.x": np.ones(1)}, file)
  wanted = {**params, "aux": {"head": {"kernel": np.ones((2, 2))}}}
  with pytest.raises(ValueError, match="aux/head/kernel"):
    hf.save(qwen2_5_vl.KEYS, wanted, tmp_path)
  loaded = hf.load(
    qwen2_5_vl.KEYS, tmp_path, wanted, ignore=["vggt."], new=["aux/.*"]
  )
  assert trees.diff(loaded, params) == ""


def test_a_head_missing_from_a_tied_checkpoint_is_its_embedding(tmp_path):
  params = random_params(np.float32)
  hf.save(qwen2_5_vl.KEYS, params, tmp_path)
  file = tmp_path / "model.safetensors"
  tensors = load_file(file)
  del tensors["lm_head.weight"]
  save_file(tensors, file)
  loaded = hf.load(qwen2_5_vl.KEYS, tmp_path, params)["llm"]
  np.testing.assert_array_equal(
    loaded["head"]["kernel"], loaded["embed"]["embedding"].T
  )


def test_rows_with_their_own_functions_load_and_save(tmp_path):
  swap = hf.Custom(lambda x: x[::-1], lambda x: x[::-1])
  table = hf.nest((("w.{i}", "w/scale", swap),), "theirs.", "ours/")
  params = {"ours": {"w": {"scale": np.arange(6.0).reshape(2, 3)}}}
  hf.save(table, params, tmp_path)
  tensors = load_file(tmp_path / "model.safetensors")
  np.testing.assert_array_equal(tensors["theirs.w.1"], [5, 4, 3])
  loaded = hf.load(table, tmp_path, jax.tree.map(np.float32, params))
  np.testing.assert_array_equal(loaded["ours"]["w"]["scale"][1], [3, 4, 5])


def broken_folders(root):
  """name -> (folder, what the error must say)."""
  params = random_params(np.float32)

  def folder(name, **kwargs):
    hf.save(qwen2_5_vl.KEYS, params, root / name, **kwargs)
    return root / name

  cut = folder("cut") / "model.safetensors"
  cut.write_bytes(cut.read_bytes()[:-100])
  junk = folder("junk") / "model.safetensors"
  junk.write_bytes(b"\xff" * 64)
  outside = folder("outside", shard_bytes=60_000)
  index = json.loads((outside / hf.INDEX).read_text())
  first = next(iter(index["weight_map"]))
  index["weight_map"][first] = "../cut/model.safetensors"
  (outside / hf.INDEX).write_text(json.dumps(index))
  lost = folder("lost", shard_bytes=60_000)
  sorted(lost.glob("*.safetensors"))[0].unlink()
  text = folder("text", shard_bytes=60_000)
  (text / hf.INDEX).write_text("{}")
  twice = folder("twice")
  (twice / "copy.safetensors").write_bytes(
    (twice / "model.safetensors").read_bytes()
  )
  for name in ("pickle", "empty"):
    (root / name).mkdir()
  (root / "pickle" / "pytorch_model.bin").write_bytes(b"x")
  return {
    "cut": "cut/model.safetensors is no readable safetensors file",
    "junk": "no readable safetensors file",
    "outside": r"names files that are not in .*\.\./cut",
    "lost": "names files that are not in .*model-00001",
    "text": "no checkpoint index with a weight_map",
    "twice": "is twice in",
    "pickle": r"pickled PyTorch weights[\s\S]*weights_only=True",
    "empty": r"holds no \.safetensors file",
    "absent": "does not exist",
  }


def test_broken_checkpoints_say_what_is_wrong_with_them(tmp_path):
  for name, message in broken_folders(tmp_path).items():
    with pytest.raises((ValueError, FileNotFoundError), match=message):
      hf.load(qwen2_5_vl.KEYS, tmp_path / name, shapes_of("tiny"))
