# SPDX-License-Identifier: Apache-2.0
"""Malformed checkpoints, each a function that fills a folder.

CASES: name -> (function, what the error must say, its type). The function may
return what is to be loaded in place of the folder. They are of a model with
two layers, whose tensors are SHAPES.
"""

import io
import json
import os
import pickle
import struct
import warnings
import zipfile

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from spatial_jax import hf_files

SHAPES = {
  "embed.weight": (6, 4),
  "layers.0.w.weight": (8, 4),
  "layers.0.norm.weight": (4,),
  "layers.1.w.weight": (8, 4),
  "layers.1.norm.weight": (4,),
  "head.weight": (6, 4),
}


def tensors(dtype=np.float32):
  rng = np.random.default_rng(0)
  return {
    name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()
  }


def header(entries, extra=b""):
  """Bytes of a file with these header entries; or with a header of bytes."""
  text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
  return struct.pack("<Q", len(text)) + text + extra


def entries():
  """A sound header, and the data that it describes."""
  found, data = {}, b""
  for name, array in tensors().items():
    begin, data = len(data), data + array.tobytes()
    found[name] = {
      "dtype": "F32",
      "shape": list(array.shape),
      "data_offsets": [begin, len(data)],
    }
  return found, data


CASES = {}


def case(*messages, kind="ValueError"):
  """Registers a function that fills a folder and may return what to load."""

  def add(make):
    CASES[make.__name__.replace("_", " ")] = (make, messages, kind)
    return make

  return add


def changed(name, messages, change, *, append=b""):
  """Registers a file whose header or data `change` has altered."""

  def make(folder):
    found, data = entries()
    found = change(found) or found
    (folder / "model.safetensors").write_bytes(header(found, data + append))

  CASES[name] = (make, ("model.safetensors", *messages), "ValueError")


def entry(**values):
  """Changes the header's entry of one tensor."""

  def change(found):
    found["layers.1.w.weight"].update(values)

  return change


W = "layers.1.w.weight"
changed("unknown dtype", (W, "dtype is 'F4'"), entry(dtype="F4"))
changed("dtype that is no text", (W, "dtype is ['F32']"), entry(dtype=["F32"]))
changed("offsets beyond the file", (W, "span"), entry(data_offsets=[0, 9**9]))
changed(
  "negative offsets", (W, "data_offsets are"), entry(data_offsets=[-128, 0])
)
changed("reversed offsets", (W, "span -128"), entry(data_offsets=[128, 0]))
changed("three offsets", (W, "data_offsets are"), entry(data_offsets=[0, 1, 2]))
changed("overlapping tensors", ("overlaps",), entry(data_offsets=[0, 128]))
changed("shape of other bytes", (W, "takes 124"), entry(shape=[31]))
changed("negative shape", (W, "shape is [-8, -4]"), entry(shape=[-8, -4]))
changed("shape of booleans", (W, "shape is [True"), entry(shape=[True, 32]))
changed("shape of floats", (W, "shape is [8.0"), entry(shape=[8.0, 4]))
changed("shape that overflows", (W, "its shape"), entry(shape=[2**62, 2**62]))
changed("shape beyond 64 bits", (W, "its shape"), entry(shape=[10**400]))
changed("shape of a thousand axes", (W, "its shape"), entry(shape=[1] * 1000))
changed("key that no header has", (W, "strides"), entry(strides=[1]))
changed(
  "entry that is no object", (W, "not an object"), lambda f: {**f, W: [8, 4]}
)
changed(
  "metadata that is no object",
  ("__metadata__",),
  lambda f: {"__metadata__": "x", **f},
)
changed("name with NUL", (r"'layers\x00'",), lambda f: {**f, "layers\0": 1})
changed("half of a UTF-16 pair", (r"\ud800",), lambda f: {**f, "\ud800": 1})
changed("empty name", ("is no name",), lambda f: {**f, "": 1})
changed(
  "bytes after the last tensor",
  ("5 bytes follow",),
  lambda f: f,
  append=b"12345",
)


def quantised(name, dtype, messages):
  """Registers a file with one tensor of another dtype."""

  def make(folder):
    found = tensors()
    found[W] = found[W].astype(dtype)
    found.pop("head.weight")
    save_file(found, folder / "model.safetensors")

  CASES[name] = (make, messages, "ValueError")


quantised(
  "8-bit floats in place of floats",
  ml_dtypes.float8_e4m3fn,
  ("1 problems", f"dtype: {W} is float8_e4m3fn, but blocks/w/kernel", "scales"),
)
quantised("integers in place of floats", np.int64, (f"dtype: {W} is int64",))
quantised("booleans in place of floats", np.bool_, (f"dtype: {W} is bool",))
quantised("complex in place of floats", np.complex64, (W, "complex64"))


@case("model.safetensors", "has 0 bytes")
def empty_file(folder):
  (folder / "model.safetensors").touch()


@case("holds no .safetensors file")
def empty_folder(folder):
  pass


@case("is a folder, not a file")
def folder_named_as_a_file(folder):
  (folder / "model.safetensors").mkdir()


@case("its header of", "is cut short")
def header_cut_short(folder):
  found, _ = entries()
  (folder / "model.safetensors").write_bytes(header(found)[:100])


@case("is cut short in tensor head.weight", "40 bytes after its end")
def data_cut_short(folder):
  found, data = entries()
  (folder / "model.safetensors").write_bytes(header(found, data[:-40]))


@case("leaves a hole after embed.weight")
def hole_between_tensors(folder):
  found, data = entries()
  for name, one in found.items():
    if name != "embed.weight":
      one["data_offsets"] = [x + 8 for x in one["data_offsets"]]
  (folder / "model.safetensors").write_bytes(header(found, data + b"0" * 8))


@case("holds no sound JSON", "the key layers.0.norm.weight is there twice")
def key_twice_in_the_header(folder):
  found, data = entries()
  text = json.dumps(found)
  text = text.replace("layers.1.norm.weight", "layers.0.norm.weight")
  (folder / "model.safetensors").write_bytes(header(text.encode(), data))


@case("claims 1152921504606846976 bytes")
def header_that_claims_an_exabyte(folder):
  data = struct.pack("<Q", 2**60) + b"{}" + b" " * 100
  (folder / "model.safetensors").write_bytes(data)


@case("claims 209715200 bytes, more than")
def header_of_200_megabytes(folder):
  with open(folder / "model.safetensors", "wb") as file:
    file.write(struct.pack("<Q", 200 * 2**20) + b"{")
    file.truncate(300 * 2**20)  # sparse


@case("tensor a: its entry")
def header_of_many_small_objects(folder):
  # Just below the limit: the most that parsing can cost.
  one = b'{"":' * 50 + b"0" + b"}" * 50 + b","
  text = b'{"a":[' + one * (hf_files.TEXT_LIMIT // len(one) - 1) + b"0]}"
  (folder / "model.safetensors").write_bytes(header(text))


@case("holds no sound JSON", "recursion")
def header_nested_without_end(folder):
  (folder / "model.safetensors").write_bytes(header(b'{"a":' * 10**6))


@case("holds no sound JSON", "utf-8")
def header_that_is_no_text(folder):
  (folder / "model.safetensors").write_bytes(header(b"{\xff\xfe}"))


@case("does not begin with {")
def header_that_is_a_list(folder):
  (folder / "model.safetensors").write_bytes(header(b"[1, 2]"))


@case("but a pickle")
def pickle_called_safetensors(folder):
  data = pickle.dumps({"embed.weight": list(range(99))}, protocol=4)
  (folder / "model.safetensors").write_bytes(data)


@case("but a zip archive, probably a PyTorch pickle")
def torch_archive_called_safetensors(folder):
  with zipfile.ZipFile(folder / "model.safetensors", "w") as file:
    file.writestr("archive/data.pkl", b"x" * 99)


@case("git lfs pull")
def pointer_in_place_of_the_file(folder):
  text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
  (folder / "model.safetensors").write_text(text)


@case("but a web page")
def web_page_in_place_of_the_file(folder):
  (folder / "model.safetensors").write_text("<!DOCTYPE html><html></html>")


@case("holds pickled PyTorch weights", "weights_only=True")
def pickles_only(folder):
  (folder / "pytorch_model.bin").write_bytes(b"x")


@case("holds pickled PyTorch weights", "weights_only=True")
def pickle_given_itself(folder):
  (folder / "model.pth").write_bytes(b"x")
  return folder / "model.pth"


@case("1 problems", "missing: layers.1.norm.weight (for blocks/norm/scale)")
def last_layer_missing(folder):
  found = tensors()
  del found["layers.1.norm.weight"]
  save_file(found, folder / "model.safetensors")


@case("1 problems", "unused: layers.2.norm.weight [4]")
def one_layer_too_many(folder):
  found = {**tensors(), "layers.2.norm.weight": np.ones(4, np.float32)}
  save_file(found, folder / "model.safetensors")


@case("1 problems", f"shape: {W} is [8, 5], which does not fill blocks/w")
def wrong_width(folder):
  save_file(
    {**tensors(), W: np.ones((8, 5), np.float32)}, folder / "a.safetensors"
  )


@case("2 problems", "unused: layers.1.weight [8, 4]", f"missing: {W}")
def wrong_name(folder):
  found = tensors()
  found["layers.1.weight"] = found.pop(W)
  save_file(found, folder / "model.safetensors")


@case("unused: ümlaut [1]")
def name_in_another_alphabet(folder):
  found = {**tensors(), "ümlaut": np.ones(1, np.float32)}
  save_file(found, folder / "model.safetensors")


@case("missing: head.weight (for head/kernel)", "not tied")
def head_missing_though_not_tied(folder):
  found = tensors()
  del found["head.weight"]
  save_file(found, folder / "model.safetensors")
  text = '{"text_config": {"tie_word_embeddings": false}}'
  (folder / "config.json").write_text(text)


@case("tensor embed.weight is twice in", "a.safetensors", "b.safetensors")
def tensor_in_two_files(folder):
  save_file(tensors(), folder / "a.safetensors")
  one = {"embed.weight": np.zeros((6, 4), np.float32)}
  save_file(one, folder / "b.safetensors")


def index(folder, weight_map):
  """Two shards, and an index with this in place of a file of theirs."""
  found = tensors()
  last = {"head.weight": found.pop("head.weight")}
  save_file(found, folder / "a.safetensors")
  save_file(last, folder / "b.safetensors")
  where = {
    **dict.fromkeys(found, "a.safetensors"),
    "head.weight": "b.safetensors",
  }
  where = weight_map(where) if callable(weight_map) else weight_map
  text = json.dumps({"metadata": {}, "weight_map": where})
  (folder / "model.safetensors.index.json").write_text(text)


def wrong_index(name, weight_map, *messages):
  def make(folder):
    (folder.parent / "outside.safetensors").write_bytes(b"")
    index(folder, weight_map)

  CASES[name] = (make, ("index.json", *messages), "ValueError")


OUT = "../outside.safetensors"
wrong_index(
  "index that climbs out of the folder",
  lambda w: {**w, "head.weight": OUT},
  "not in",
  OUT,
  "head.weight",
)
wrong_index(
  "index with an absolute path",
  lambda w: {**w, W: "/etc/passwd"},
  "/etc/passwd",
)
wrong_index("index with NUL", lambda w: {**w, W: "a\0b"}, r"a\x00b")
wrong_index(
  "index that names an absent file", lambda w: {**w, W: "c.safetensors"}, W
)
wrong_index(
  "index that names another kind of file",
  lambda w: {**w, "x": "model.safetensors.index.json"},
  "which is no .safetensors file",
)
wrong_index(
  "index whose file is a number", lambda w: {**w, W: 3}, W, "not a file"
)
wrong_index("index that is a list", ["a.safetensors"], "no checkpoint index")
wrong_index("index without a map", None, "no checkpoint index")


@case("a.safetensors does not hold the tensor head.weight", "index")
def index_that_names_the_wrong_file(folder):
  index(folder, lambda where: dict.fromkeys(where, "a.safetensors"))


@case("index.json holds no sound JSON")
def index_cut_short(folder):
  index(folder, lambda where: where)
  path = folder / "model.safetensors.index.json"
  path.write_bytes(path.read_bytes()[:-9])


@case("index.json holds no sound JSON", f"the key {W} is there twice")
def key_twice_in_the_index(folder):
  index(folder, lambda where: where)
  path = folder / "model.safetensors.index.json"
  path.write_text(path.read_text().replace("layers.0.w.weight", W))


@case("index.json holds no sound JSON", "recursion")
def index_nested_without_end(folder):
  index(folder, lambda where: where)
  (folder / "model.safetensors.index.json").write_text("[" * 10**6)


@case("index.json has 1073741824 bytes")
def index_of_a_gigabyte(folder):
  index(folder, lambda where: where)
  with open(folder / "model.safetensors.index.json", "r+b") as file:
    file.truncate(2**30)


@case("is a link out of its folder")
def link_out_of_the_folder(folder):
  save_file(tensors(), folder.parent / "elsewhere.safetensors")
  (folder / "model.safetensors").symlink_to("../elsewhere.safetensors")


@case("is a link out of its folder")
def link_from_a_cache_past_its_blobs(folder):
  save_file(tensors(), folder.parent / "elsewhere.safetensors")
  inside = folder / "models--a--b" / "snapshots" / "1"
  inside.mkdir(parents=True)
  (inside / "model.safetensors").symlink_to("../../../../elsewhere.safetensors")
  return inside


@case("is a link to a file that is not there")
def link_to_nothing(folder):
  (folder / "model.safetensors").symlink_to("nothing")


@case("cannot be read", "symbolic links")
def link_to_itself(folder):
  (folder / "model.safetensors").symlink_to("model.safetensors")


@case("is a pipe or device")
def pipe_in_place_of_a_file(folder):
  os.mkfifo(folder / "model.safetensors")


@case("is a pipe or device")
def pipe_given_itself(folder):
  os.mkfifo(folder / "pipe.safetensors")
  return folder / "pipe.safetensors"


@case("does not exist", kind="FileNotFoundError")
def nothing_at_all(folder):
  return folder / "nothing" / "here"


def array_file(array):
  stream = io.BytesIO()
  np.lib.format.write_array(stream, array, allow_pickle=True)
  return stream.getvalue()


def archive(folder, members, kind=zipfile.ZIP_STORED):
  with zipfile.ZipFile(folder / "params.npz", "w", kind) as file:
    for name, data in members.items():
      file.writestr(name, data)


@case("params.npz", "'a.npy' holds pickled objects")
def objects_in_an_npz(folder):
  archive(folder, {"a.npy": array_file(np.array([{}, None], object))})


@case("params.npz is no readable .npz file")
def npz_cut_short(folder):
  archive(folder, {"a.npy": array_file(np.ones(99))})
  path = folder / "params.npz"
  path.write_bytes(path.read_bytes()[:-60])


@case("params.npz", "'a.npy'", "has 8 bytes")
def npz_that_claims_100_gigabytes(folder):
  data = array_file(np.ones(1)).replace(b"(1,), }", b"(12500000000,), }")
  archive(folder, {"a.npy": data.replace(b" " * 10 + b"\n", b"\n")})


@case("unused: bomb [1073741824]")
def npz_that_unpacks_to_a_gigabyte(folder):
  with (
    zipfile.ZipFile(folder / "params.npz", "w", zipfile.ZIP_DEFLATED) as file,
    file.open("bomb.npy", "w") as stream,
  ):
    head = {"descr": "|u1", "fortran_order": False, "shape": (2**30,)}
    np.lib.format.write_array_header_1_0(stream, head)
    for _ in range(64):
      stream.write(bytes(2**24))


@case("params.npz", "'a.txt' is no array")
def npz_with_something_else(folder):
  archive(folder, {"a.txt": b"x"})


@case("params.npz", "a name twice")
def npz_with_a_name_twice(folder):
  with (
    warnings.catch_warnings(),
    zipfile.ZipFile(folder / "params.npz", "w") as file,
  ):
    warnings.simplefilter("ignore")
    for _ in range(2):
      file.writestr("a.npy", array_file(np.ones(1)))


@case("_METADATA is no readable metadata of Orbax")
def orbax_metadata_cut_short(folder):
  (folder / "_METADATA").write_text('{"tree_metadata": {')


@case("cannot be opened", "'a/kernel'")
def orbax_without_its_arrays(folder):
  leaf = {
    "key_metadata": [{"key": "a"}, {"key": "kernel"}],
    "value_metadata": {"value_type": "jax.Array"},
  }
  (folder / "_METADATA").write_text(json.dumps({"tree_metadata": {"x": leaf}}))
