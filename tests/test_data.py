# SPDX-License-Identifier: Apache-2.0
"""The pipeline: same bytes whatever makes them, exact resume, no jax."""

import dataclasses

import numpy as np
import pytest

from spatial_jax.data import pipeline, workers
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


def test_hosts_share_the_batch_without_overlap():
  whole = next(iter(pipeline.make(config(), 8)[0]))["index"]
  parts = [
    next(iter(pipeline.make(config(), 8, process_index=i, process_count=2)[0]))[
      "index"
    ]
    for i in range(2)
  ]
  assert sorted(np.concatenate(parts)) == sorted(whole)


def test_a_batch_that_hosts_cannot_share_is_an_error():
  with pytest.raises(ValueError, match="not divisible by the number of hosts"):
    pipeline.make(config(), 9, process_count=2)


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
