# SPDX-License-Identifier: Apache-2.0
"""Published files: where they lie, under which prefix, which bytes are read."""

import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from spatial_jax import hf, hf_arrays, hf_files, hf_write, trees

KEYS = (
  ("embed.weight", "embed/embedding"),
  ("layers.{i}.linear.weight", "blocks/linear/kernel"),
  ("layers.{i}.conv.weight", "blocks/conv/kernel"),
  ("layers.{i}.norm.weight", "blocks/norm/scale"),
  ("layers.{i}.qkv.weight", tuple(f"blocks/{n}/kernel" for n in "qkv")),
  (
    "layers.{i}.flip.weight",
    "blocks/flip/scale",
    hf.Custom(lambda x: x[::-1], lambda x: x[::-1]),
  ),
  ("head.weight", "head/kernel", hf.Tied("embed.weight")),
)
SHAPES = {
  "embed": {"embedding": (48, 16)},
  "blocks": {
    "linear": {"kernel": (3, 16, 24)},
    "conv": {"kernel": (3, 2, 5, 16, 8)},
    "norm": {"scale": (3, 16)},
    "q": {"kernel": (3, 16, 16)},
    "k": {"kernel": (3, 16, 8)},
    "v": {"kernel": (3, 16, 8)},
    "flip": {"scale": (3, 16)},
  },
  "head": {"kernel": (16, 48)},
}


def is_shape(x):
  return isinstance(x, tuple)


def random(dtype=np.float32):
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda s: rng.normal(size=s).astype(dtype), SHAPES, is_leaf=is_shape
  )


def abstract(dtype=jnp.float32):
  return jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, dtype), SHAPES, is_leaf=is_shape
  )


def assert_equal(got, want):
  assert trees.diff(got, want) == ""
  jax.tree.map(np.testing.assert_array_equal, got, want)


def rename(folder, change):
  """Rewrites a folder's one file under other names."""
  file = folder / "model.safetensors"
  save_file({change(k): x for k, x in load_file(file).items()}, file)


@pytest.fixture
def read_bytes(monkeypatch):
  """Counts what is read of tensors."""
  counts = []
  read = hf_files.Safetensors._read

  def count(self, into, start):
    counts.append(len(into))
    read(self, into, start)

  monkeypatch.setattr(hf_files.Safetensors, "_read", count)
  return counts


SPECS = {
  "rows": (P(), ("b",)),
  "columns": (P(), (None, "a")),
  "both": (P(), ("a", "b")),
  "one axis by two": (P(), (("a", "b"),)),
  "replicated": (P(), ()),
}


@pytest.mark.parametrize("name", SPECS)
def test_eight_devices_hold_their_shards_and_each_byte_is_read_once(
  name, tmp_path, read_bytes
):
  params = random()
  hf.save(KEYS, params, tmp_path, shard_bytes=9000)
  assert len(list(tmp_path.glob("*.safetensors"))) > 2
  mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
  spec = SPECS[name][1]

  def place(name, leaf):
    # Of a kernel the last two axes, of a scale the last one.
    own = spec[:1] if name.endswith("scale") else spec
    lead = leaf.ndim - (1 if name.endswith("scale") else 2)
    return NamedSharding(mesh, P(*(None,) * lead, *own))

  shardings = trees.map_names(place, params)
  loaded = hf.load(KEYS, tmp_path, abstract(), shardings)
  assert_equal(loaded, params)
  for path, leaf in trees.flatten(loaded).items():
    want = trees.flatten(shardings)[path].shard_shape(leaf.shape)
    assert len(leaf.addressable_shards) == 8
    for shard in leaf.addressable_shards:
      assert shard.data.shape == want
  total = sum(x.nbytes for x in jax.tree.leaves(params))
  assert sum(read_bytes) == total


def test_a_host_reads_only_what_its_devices_hold(tmp_path, read_bytes):
  """One device of eight, as on a pod of eight hosts."""
  params = random()
  hf.save(KEYS, params, tmp_path)
  reader = hf.Reader(tmp_path)
  entries = hf.plan(KEYS, reader.shapes, params)
  entry = next(e for e in entries if e.path == "blocks/linear/kernel")
  whole = params["blocks"]["linear"]["kernel"]
  with hf_arrays.ThreadPoolExecutor(2) as pool:
    for box in (((0, 3), (2, 4), (0, 24)), ((1, 2), (0, 16), (21, 24))):
      read_bytes.clear()
      (part,) = hf_arrays.fill(
        reader, entry, whole.shape, np.float32, [box], pool, 2
      )
      want = whole[tuple(slice(*bounds) for bounds in box)]
      np.testing.assert_array_equal(part, want)
      assert sum(read_bytes) == want.nbytes
    # Two corners: not what lies between them.
    corners = [((0, 1), (0, 2), (0, 2)), ((2, 3), (14, 16), (22, 24))]
    read_bytes.clear()
    hf_arrays.fill(reader, entry, whole.shape, np.float32, corners, pool, 2)
    assert sum(read_bytes) == 2 * 4 * 4


@pytest.mark.parametrize(
  "stored", ["float64", "float32", "float16", "bfloat16"]
)
@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16"])
def test_any_float_becomes_any_other(stored, wanted, tmp_path):
  params = random(np.dtype(stored))
  hf.save(KEYS, params, tmp_path)
  loaded = hf.load(KEYS, tmp_path, abstract(wanted))
  want = jax.tree.map(lambda x: x.astype(wanted), params)
  assert_equal(loaded, want)
  # As safetensors itself has them.
  tensors = load_file(tmp_path / "model.safetensors")
  kernel = params["blocks"]["conv"]["kernel"][1]
  got = tensors["layers.1.conv.weight"]
  np.testing.assert_array_equal(got, kernel.transpose(3, 2, 0, 1))
  assert got.dtype == stored
  np.testing.assert_array_equal(
    tensors["layers.2.qkv.weight"].T[:, 16:24],
    params["blocks"]["k"]["kernel"][2],
  )


def test_mixed_dtypes_lie_at_multiples_of_their_size(tmp_path):
  params = random()
  params["embed"]["embedding"] = params["embed"]["embedding"].astype(
    ml_dtypes.bfloat16
  )
  hf.save(KEYS, params, tmp_path)
  assert_equal(hf.load(KEYS, tmp_path, params), params)
  for tensor in hf_files.Safetensors(
    str(tmp_path / "model.safetensors")
  ).tensors.values():
    assert tensor.start % tensor.dtype.itemsize == 0


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_transposed_copies_have_every_number(width):
  rng = np.random.default_rng(width)
  for rows, columns in ((1, 1), (3, 5), (128, 7), (131, 130), (260, 33)):
    array = rng.integers(200, size=(rows, columns)).astype(f"u{width}")
    for source in (array.T, array.T[1:, 2:], array.T[:, ::-1], array.T[::2]):
      wide = np.zeros((source.shape[0], source.shape[1] + 3), array.dtype)
      hf_arrays._copy(wide[:, 1:-2], source)
      np.testing.assert_array_equal(wide[:, 1:-2], source)
      assert not wide[:, 0].any() and not wide[:, -2:].any()


@pytest.mark.parametrize("prefix", ["module.", "base_model.model."])
def test_a_prefix_of_all_names_is_found(prefix, tmp_path):
  params = random()
  hf.save(KEYS, params, tmp_path)
  rename(tmp_path, lambda name: prefix + name)
  assert_equal(hf.load(KEYS, tmp_path, abstract()), params)
  assert_equal(hf.load(KEYS, tmp_path, abstract(), prefix=prefix), params)
  with pytest.raises(ValueError, match=r"missing: embed\.weight"):
    hf.load(KEYS, tmp_path, abstract(), prefix="")


def test_a_prefix_is_never_guessed_among_two(tmp_path):
  shapes = {k: x.shape for k, x in tensors_of(tmp_path).items()}
  twice = {
    f"{p}.{k}": s for p in ("student", "teacher") for k, s in shapes.items()
  }
  with pytest.raises(
    ValueError, match=r"several times, below student\., teach"
  ):
    hf.plan(KEYS, twice, abstract())
  found = hf.plan(
    KEYS, twice, abstract(), prefix="teacher.", ignore=("student.",)
  )
  assert found[0].names == ("teacher.embed.weight",)
  # What is whole without a prefix needs none, and what is whole below one is
  # not mixed with a rest elsewhere: the rest must be known.
  more = {**shapes, **{f"ema.{k}": s for k, s in shapes.items()}}
  with pytest.raises(ValueError, match=r"unused: ema\.embed\.weight"):
    hf.plan(KEYS, more, abstract())
  assert hf.plan(KEYS, more, abstract(), ignore=("ema.",))[0].names == (
    "embed.weight",
  )
  # With a tensor lost, the other copy is not taken in silence.
  del more["layers.0.norm.weight"]
  with pytest.raises(ValueError, match=r"unused: layers\.0"):
    hf.plan(KEYS, more, abstract())


def test_an_incomplete_checkpoint_below_a_prefix_lists_what_it_lacks(tmp_path):
  shapes = {f"module.{k}": x.shape for k, x in tensors_of(tmp_path).items()}
  del shapes["module.layers.1.norm.weight"]
  with pytest.raises(ValueError, match="1 problems") as error:
    hf.plan(KEYS, shapes, abstract())
  assert "missing: layers.1.norm.weight" in str(error.value)


def tensors_of(folder):
  hf.save(KEYS, random(), folder / "tensors")
  return load_file(folder / "tensors" / "model.safetensors")


def test_the_cache_of_the_hub_is_read_through_its_links(tmp_path):
  params = random()
  model = tmp_path / "models--org--name"
  snapshot, blobs = model / "snapshots" / "abc", model / "blobs"
  hf.save(KEYS, params, snapshot, shard_bytes=9000)
  blobs.mkdir()
  for number, file in enumerate(sorted(snapshot.iterdir())):
    file.rename(blobs / str(number))
    file.symlink_to(f"../../blobs/{number}")
  assert_equal(hf.load(KEYS, snapshot, abstract()), params)
  other = tmp_path / "elsewhere"
  other.symlink_to(snapshot)
  assert_equal(hf.load(KEYS, other, abstract()), params)
  # The model's folder stands for its main revision.
  assert_equal(hf.load(KEYS, model, abstract()), params)
  (model / "snapshots" / "old").mkdir()
  with pytest.raises(FileNotFoundError, match="without its main revision"):
    hf.load(KEYS, model, abstract())
  (model / "refs").mkdir()
  (model / "refs" / "main").write_text("abc\n")
  assert_equal(hf.load(KEYS, model, abstract()), params)


def test_arrays_of_jax_code_keep_their_axes(tmp_path):
  """A kernel in an .npz file, or in Orbax's tree, is (in, out) already."""
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(2, 4, 6)).astype(np.float32)  # scanned
  single = [rng.normal(size=(4, 3)).astype(np.float32) for _ in range(2)]
  scale = rng.normal(size=(4,)).astype(ml_dtypes.bfloat16)
  tree = {
    "img": {"blocks": {"mlp": {"kernel": kernel}}, "norm": {"scale": scale}},
    **{f"layer_{i}": {"out": {"kernel": x}} for i, x in enumerate(single)},
  }
  flat = trees.flatten(tree)
  table = (
    ("img/blocks/mlp/kernel", "blocks/up/kernel"),
    ("layer_{i}/out/kernel", "blocks/out/kernel"),
    ("img/norm/scale", "norm/scale"),
  )
  want = {
    "blocks": {"up": {"kernel": kernel}, "out": {"kernel": np.stack(single)}},
    "norm": {"scale": scale.astype(np.float32)},
  }
  np.savez(tmp_path / "stored.npz", **flat)
  np.savez_compressed(tmp_path / "packed.npz", **flat)
  nnx = jax.tree.map(lambda x: {"value": x}, {"params": tree})
  for name, options, params in (
    ("one_store", {}, {"params": tree}),
    ("many", {"use_ocdbt": False}, tree),
    ("zarr3", {"use_zarr3": True}, nnx),
  ):
    handler = ocp.PyTreeCheckpointHandler(**options)
    with ocp.Checkpointer(handler) as writer:
      # openpi: a step's folder has the item `params`.
      writer.save(tmp_path / name / "params", jax.tree.map(jnp.asarray, params))
  sources = ("stored.npz", "packed.npz", "one_store", "many", "zarr3/params")
  devices = np.array(jax.devices()[:2])
  split = NamedSharding(jax.sharding.Mesh(devices, "x"), P(None, "x"))
  for source in sources:
    loaded = hf.load(table, tmp_path / source, want)
    assert_equal(loaded, want)
    shardings = {"blocks": {"up": {"kernel": split}}}
    loaded = hf.load(table, tmp_path / source, want, shardings)
    up = loaded["blocks"]["up"]["kernel"]
    assert up.addressable_shards[1].data.shape == (2, 2, 6)
    assert_equal(loaded, want)


def test_new_parameters_are_not_read_and_start_as_init_makes_them(
  tmp_path, read_bytes
):
  params = random()
  hf.save(KEYS, params, tmp_path)
  with pytest.raises(ValueError, match=r"regex 'haed/\.' of new parameters"):
    hf.load(KEYS, tmp_path, abstract(), new=("haed/.",))
  read_bytes.clear()
  loaded = hf.load(KEYS, tmp_path, abstract(), new=("head/.*", "embed/.*"))
  assert loaded.keys() == {"blocks"}
  want = sum(x.nbytes for x in jax.tree.leaves(params["blocks"]))
  assert sum(read_bytes) == want

  def init(key):
    made = jax.tree.map(lambda x: jnp.full(x.shape, 7.0), abstract())
    return {**made, "aux": jax.random.normal(key, (8, 2))}

  mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
  shardings = jax.tree.map(
    lambda x: NamedSharding(mesh, P("x") if x.shape[0] == 8 else P()),
    jax.eval_shape(init, jax.random.key(0)),
  )
  whole = hf.merge(loaded, init, jax.random.key(1), shardings)
  assert_equal(whole["blocks"], params["blocks"])
  assert np.all(whole["head"]["kernel"] == 7)
  assert whole["aux"].sharding.spec == P("x")
  assert np.std(whole["aux"]) > 0.5
  wrong = {"blocks": {"norm": {"scale": np.ones(3)}}}
  with pytest.raises(ValueError, match="of another model"):
    hf.merge(wrong, init, jax.random.key(1))


def test_a_tied_head_must_repeat_the_table(tmp_path):
  params = random()
  del params["head"]
  hf.save(KEYS, params, tmp_path)
  assert_equal(hf.load(KEYS, tmp_path, params), params)
  file = tmp_path / "model.safetensors"
  tensors = load_file(file)
  save_file({**tensors, "head.weight": tensors["embed.weight"]}, file)
  assert_equal(hf.load(KEYS, tmp_path, params), params)
  save_file({**tensors, "head.weight": tensors["embed.weight"] + 1}, file)
  with pytest.raises(ValueError, match=r"head.weight differs.*tied=False"):
    hf.load(KEYS, tmp_path, params)


def test_other_weights_in_the_folder_are_not_mixed_with_ours(tmp_path):
  params = random()
  hf.save(KEYS, params, tmp_path, shard_bytes=9000)
  hf.save(KEYS, params, tmp_path, shard_bytes=9000)  # the same files
  with pytest.raises(FileExistsError, match="already holds other weights"):
    hf.save(KEYS, params, tmp_path)


def test_companions_are_copied_and_tell_the_dtype(tmp_path):
  like, out = tmp_path / "like", tmp_path / "out"
  like.mkdir()
  out.mkdir()
  config = {"dtype": "float32", "text_config": {"torch_dtype": "float32"}}
  (like / "config.json").write_text(json.dumps(config))
  for name in ("tokenizer.json", "merges.txt", "model.safetensors.index.json"):
    (like / name).write_text("{}")
  (like / "model.safetensors").write_bytes(b"x")
  names = hf_write.copy_companions(str(like), str(out), "bfloat16")
  assert names == ["config.json", "merges.txt", "tokenizer.json"]
  assert sorted(os.listdir(out)) == names
  assert json.loads((out / "config.json").read_text()) == {
    "dtype": "bfloat16",
    "text_config": {"torch_dtype": "bfloat16"},
  }
  (tmp_path / "bare").mkdir()
  with pytest.raises(FileNotFoundError, match=r"neither config\.json nor"):
    hf_write.copy_companions(str(tmp_path / "bare"), str(out))
