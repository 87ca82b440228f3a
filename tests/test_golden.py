# SPDX-License-Identifier: Apache-2.0
"""The library equals reference implementations on recorded cases.

`pytest tests/test_golden.py --cases DIR` runs every folder below DIR that has a
config.json. It names a system and an entry; the adapter of that pair computes
the case with the library and returns what to compare. A line is printed for
each output: `system/case output max_abs max_rel PASS|FAIL`.

Adapters hold no numbers of a case: cases of other sizes run as well.
"""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from spatial_jax.data import positions, vision
from spatial_jax.evaluators import qa

TOLERANCE = 1e-4  # of the largest number in float32; integers exactly
GOLDEN = pathlib.Path(__file__).parent / "golden"


def mrope_train(folder, config):
  inputs = load_file(folder / "inputs.safetensors")
  got = {}
  for number, case in enumerate(config["cases"]):
    tokens = inputs[f"case{number}_input_ids"]
    grids = inputs[f"case{number}_grid_thw"].tolist()
    ids, deltas = [], []
    for row in tokens:
      # Grids and times of a batch follow each other row by row.
      starts = row == config["vision_start"]
      count = int(np.count_nonzero(starts))
      mine, grids = grids[:count], grids[count:]
      row_ids, delta = positions.mrope(
        row,
        mine,
        image_token=config["image_token_id"],
        video_token=config["video_token_id"],
        second_per_grid=case["second_per_grid_ts"] or 1.0,
      )
      ids.append(row_ids)
      deltas.append([delta])
    got[f"case{number}_position_ids"] = np.stack(ids, axis=1)
    got[f"case{number}_rope_deltas"] = np.array(deltas)
  return got, load_file(folder / "outputs.safetensors")


def smart_resize(folder, config):
  cases = json.loads((folder / "cases.json").read_text())
  rows = [
    dict(zip(cases["columns"], row, strict=True)) for row in cases["rows"]
  ]
  want = np.array([[row.pop("out_h"), row.pop("out_w")] for row in rows])
  got = np.array([vision.smart_resize(**row) for row in rows])
  return {"size": got}, {"size": want}


def preprocess(folder, config):
  frames = load_file(folder / "inputs.safetensors")["frames_tchw_u8"]
  frames = frames.transpose(0, 2, 3, 1)
  got = {}
  for kind, some in (("video", frames), ("image", frames[:1])):
    patches, grid, pixels = vision.preprocess(
      some,
      min_pixels=config["min_pixels"],
      max_pixels=config["max_pixels"],
      mean=config["image_mean"],
      std=config["image_std"],
    )
    got[f"{kind}_pixel_values"] = patches
    got[f"{kind}_grid_thw"] = np.array([grid])
    got[f"{kind}_tchw_u8"] = pixels.transpose(0, 3, 1, 2)
  return got, load_file(folder / "outputs.safetensors")


def metrics(folder, config):
  cases = json.loads((folder / "cases.json").read_text())
  pairs = {
    "clean_text": [(qa.clean_text(a), b) for a, b in cases["clean_text"]],
    "mean_relative_accuracy": [
      (qa.mean_relative_accuracy(a, b), c)
      for a, b, c in cases["mean_relative_accuracy"]
    ],
    "vsi_reward": [
      (qa.vsi_reward(truth, answer, kind), value)
      for truth, answer, kind, value in cases["vsi_reward"]
    ],
  }
  rows = [tuple(row) for row in cases["aggregate_input"]]
  averages, types = qa.aggregate(rows), qa.per_type(rows)
  pairs["aggregate"] = [
    (averages[group][mean], value)
    for group, means in cases["aggregate"].items()
    for mean, value in means.items()
  ]
  pairs["per_question_type"] = [
    (types[name]["score"], value)
    for name, value in cases["per_question_type"].items()
  ]
  columns = {
    name: tuple(zip(*rows, strict=True)) for name, rows in pairs.items()
  }
  text = columns.pop("clean_text")
  same = np.array([a == b for a, b in zip(*text, strict=True)], np.int32)
  got = {name: np.array(pair[0]) for name, pair in columns.items()}
  want = {name: np.array(pair[1]) for name, pair in columns.items()}
  return {**got, "clean_text": same}, {**want, "clean_text": 0 * same + 1}


ADAPTERS = {
  ("spatial_mllm", "metrics"): metrics,
  ("spatial_mllm", "mrope_train"): mrope_train,
  ("spatial_mllm", "smart_resize"): smart_resize,
  ("spatial_mllm", "preprocess"): preprocess,
}


def pytest_generate_tests(metafunc):
  root = pathlib.Path(metafunc.config.getoption("--cases"))
  folders = sorted(path.parent for path in root.rglob("config.json"))
  names = [str(folder.relative_to(root)) for folder in folders]
  metafunc.parametrize("folder", folders, ids=names)


def differences(got, want):
  """Largest absolute difference, and that relative to the largest number."""
  if got.shape != want.shape:
    return float("inf"), float("inf")
  got, want = got.astype(np.float64), want.astype(np.float64)
  absolute = np.max(np.abs(got - want), initial=0.0)
  return absolute, absolute / max(np.max(np.abs(want), initial=0.0), 1e-30)


def test_outputs_equal_those_of_the_reference(folder, request):
  config = json.loads((folder / "config.json").read_text())
  system, entry = config["system"], config["entry"]
  adapter = ADAPTERS.get((system, entry))
  if adapter is None:
    print(f"MISSING {system}/{entry}")
    if request.config.getoption("--strict-cases"):
      pytest.fail(f"no adapter for {system}/{entry}")
    pytest.skip(f"no adapter for {system}/{entry}")
  got, want = adapter(folder, config)
  names = sorted(got.keys() & want.keys())
  assert names, "the adapter compares nothing"
  failed = []
  for name in names:
    absolute, relative = differences(got[name], want[name])
    exact = np.issubdtype(want[name].dtype, np.integer)
    passed = absolute == 0 if exact else relative <= TOLERANCE
    verdict = "PASS" if passed else "FAIL"
    print(
      f"{system}/{folder.name} {name} {absolute:.1e} {relative:.1e} {verdict}"
    )
    failed += [] if passed else [name]
  assert not failed
