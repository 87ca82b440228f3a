# SPDX-License-Identifier: Apache-2.0
"""The pipeline: same bytes whatever makes them, exact resume, no jax."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from spatial_jax import models
from spatial_jax.data import pipeline, sources, text, workers
from tests import toy, toy_data


def config(**data):
  out = toy.get_config()
  out.data.update(data)
  return out


def take(iterator, count):
  return [next(iterator) for _ in range(count)]


def same(a, b):
  assert len(a) == len(b)
  for one, other in zip(a, b, strict=True):
    assert one.keys() == other.keys()
    for name in one:
      if name != "has_jax":
        assert one[name].dtype == other[name].dtype
        assert one[name].tobytes() == other[name].tobytes(), name


def test_iterating_twice_gives_the_same_bytes():
  batches = [
    take(iter(pipeline.make(config(threads=n), 8)[0]), 30) for n in (1, 4)
  ]
  same(*batches)


def test_two_worker_processes_give_the_same_bytes_without_jax():
  want = take(iter(pipeline.make(config(), 8)[0]), 15)
  iterator = iter(pipeline.make(config(workers=2), 8)[0])
  got = take(iterator, 15)
  same(got, want)
  assert all(batch["has_jax"].all() for batch in want)
  assert not any(batch["has_jax"].any() for batch in got)


@pytest.mark.parametrize("processes", [0, 2])
def test_the_iterator_resumes_in_mid_epoch(processes):
  dataset, _ = pipeline.make(config(workers=processes), 8)
  first = iter(dataset)
  take(first, 17)  # 136 of 100 rows: in the second epoch
  state = first.get_state()
  want = take(first, 5)
  again = iter(pipeline.make(config(), 8)[0])
  again.set_state(state)
  same(take(again, 5), want)


def test_an_epoch_visits_every_row_once_and_the_next_in_another_order():
  iterator = iter(pipeline.make(config(), 20)[0])
  epochs = [
    np.concatenate([b["index"] for b in take(iterator, 5)]) for _ in range(2)
  ]
  for epoch in epochs:
    assert sorted(epoch) == list(range(100))
  assert not np.array_equal(*epochs)


def test_without_shuffling_rows_come_in_order():
  batch = next(iter(pipeline.make(config(shuffle=False), 8)[0]))
  assert batch["index"].tolist() == list(range(8))


@pytest.mark.parametrize("shares", [((0, 1, 2, 3), (4, 5, 6, 7)), ((1, 4),)])
def test_a_host_makes_its_rows_of_every_batch(shares):
  whole = take(iter(pipeline.make(config(), 8)[0]), 3)
  for rows in shares:
    part = take(iter(pipeline.make(config(), 8, rows=rows)[0]), 3)
    for got, want in zip(part, whole, strict=True):
      same([got], [{name: x[list(rows)] for name, x in want.items()}])


def test_an_unknown_source_names_the_key():
  with pytest.raises(ValueError, match=r"config.data.source='nowhere'"):
    pipeline.make(config(source="nowhere"), 8)


def test_an_example_of_another_shape_is_an_error():
  example = toy_data.Source(3)[0]
  check = pipeline.Check(pipeline.spec(example))
  assert check(example) is example
  with pytest.raises(ValueError, match=r"tokens: got \(\(7,\)"):
    check({**example, "tokens": example["tokens"][:7]})
  with pytest.raises(ValueError, match="labels: got nothing"):
    check({k: v for k, v in example.items() if k != "labels"})
  assert dataclasses.is_dataclass(check)


def test_a_worker_reports_the_error_of_its_source():
  pool = workers.Workers(config(), "train", 1)
  with pytest.raises(ValueError, match="invalid literal"):
    pool._pool.submit(workers._load, "no number").result()
  pool.close()


def recipe(folder, lines):
  """Config of the conversations recipe for these JSONL lines."""
  from configs import qwen2_5_vl_sft

  out = qwen2_5_vl_sft.get_config("test")
  file = folder / "train.jsonl"
  rows = [x if isinstance(x, str) else json.dumps(x) for x in lines]
  file.write_text("\n".join(rows))
  out.data.files.train = str(file)
  return out


def turns(question="<image>\nWhich color?", answer="red"):
  return [
    {"from": "human", "value": question},
    {"from": "gpt", "value": answer},
  ]


def picture(folder, name="a.png", size=(20, 30), mode="RGB"):
  Image.new(mode, size).save(folder / name)
  return name


def test_a_conversation_becomes_a_row_of_the_shapes_the_model_wants(tmp_path):
  names = [picture(tmp_path), picture(tmp_path, "b.png", (32, 16), "L")]
  c = recipe(
    tmp_path,
    [
      {"image": names, "conversations": turns("<image> or <image>?", "red")},
      "",
      {
        "messages": [
          {"role": "user", "content": "Which color is snow?"},
          {"role": "assistant", "content": "white"},
        ]
      },
    ],
  )
  source = sources.make(c, "train")
  assert len(source) == 2
  model, mod = models.build(c)
  want = {
    name: (x.shape[1:], np.dtype(x.dtype)) for name, x in mod.INPUTS(c).items()
  }
  for index in range(2):
    assert pipeline.spec(source[index]) == want
  row = source[0]
  image = row["tokens"] == model.image_token
  # One token for each group of 2 x 2 patches.
  grids = row["layout/frame_index"] < len(row["patches"])
  assert image.sum() * 4 == grids.sum()
  tokenizer = text.Tokenizer.load()
  said = row["labels"][row["loss_weight"] > 0]
  assert tokenizer.decode(said) == "red" and said[-1] == tokenizer.end_id
  assert not source[1]["patches"].any()
  assert (source[1]["positions"][0, :5] == np.arange(5)).all()


def bad_rows(folder):
  """name -> (line, what the error must say)."""
  good = picture(folder)
  picture(folder, "depth.png", (20, 30), "I;16")
  data = (folder / good).read_bytes()
  (folder / "cut.png").write_bytes(data[: len(data) // 2])
  (folder / "text.png").write_text("no image")
  (folder / "empty.png").write_bytes(b"")
  (folder / "zero.ppm").write_bytes(b"P6 0 4 255\n")

  def row(image, **kwargs):
    return {"image": image, "conversations": turns(**kwargs)}

  return {
    "missing": (row("no.png"), "no.png: the file does not exist"),
    "depth": (row("depth.png"), "has the mode 'I;16'"),
    "cut": (row("cut.png"), "truncated or no image"),
    "text": (row("text.png"), "truncated or no image"),
    "empty": (row("empty.png"), "truncated or no image"),
    "zero": (row("zero.ppm"), "zero.ppm: "),
    "json": ("{'image': 1}", "no valid JSON"),
    "list": ("[1]", "expected an object, got list"),
    "keys": ({"text": "x"}, "expected 'conversations' or 'messages'"),
    "role": ({"messages": [{"role": "robot", "content": "x"}]}, "a turn needs"),
    "fewer": (row(good, question="no image"), "1 image(s) but 0"),
    "more": (row(good, question="<image><image>"), "write one for each"),
    "silent": (
      {"messages": [{"role": "user", "content": "x"}]},
      "the assistant says nothing",
    ),
    "long": (row(good, answer="red " * 200), "longer than the longest bucket"),
    "large": (row([good] * 3, question="<image>" * 3), "needs patches=96"),
  }


FAULTS = (
  "missing depth cut text empty zero json list keys role fewer more silent "
  "long large"
)


@pytest.mark.parametrize("name", FAULTS.split())
def test_a_bad_line_names_its_file_its_number_and_the_fault(name, tmp_path):
  line, message = bad_rows(tmp_path)[name]
  fine = {"messages": turns("x", "y")}
  source = sources.make(recipe(tmp_path, [fine, line]), "train")
  assert source[0]["segments"].any()
  with pytest.raises(ValueError, match=r"train.jsonl, line 2: ") as error:
    source[1]
  assert message in str(error.value)


def test_an_empty_or_missing_file_of_conversations_says_so(tmp_path):
  c = recipe(tmp_path, [""])
  with pytest.raises(ValueError, match=r"train.jsonl is empty"):
    sources.make(c, "train")
  with pytest.raises(ValueError, match=r"no 'test'; it has \['train'\]"):
    sources.make(c, "test")
  c.data.files.train = str(tmp_path / "none.jsonl")
  with pytest.raises(FileNotFoundError, match="cannot be read"):
    sources.make(c, "train")
