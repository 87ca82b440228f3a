# SPDX-License-Identifier: Apache-2.0
"""Splits of `writer.py` as a TFDS data set, for readers that want one.

  tfds_rooms.prepare("rooms/", data_dir="tfds/")
  source = tfds.data_source("rooms", split="train", data_dir="tfds/")

Needs the `data` extra, and no TensorFlow: images stay encoded (a uint16 image
feature would need OpenCV, so depth is PNG bytes, 16 bits, millimetres).
"""

from __future__ import annotations

import io
import json
import pathlib
import zipfile

import numpy as np
import tensorflow_datasets as tfds

from spatial_jax.world import writer


class Rooms(tfds.core.GeneratorBasedBuilder):
  """Rendered rooms with poses, depth, objects and questions."""

  VERSION = tfds.core.Version("1.0.0")
  MANUAL_DOWNLOAD_INSTRUCTIONS = "A folder of splits made by world/writer.py."

  def _info(self) -> tfds.core.DatasetInfo:
    features = tfds.features
    return tfds.core.DatasetInfo(
      builder=self,
      features=features.FeaturesDict(
        {
          "name": features.Text(),
          "rgb": features.Sequence(
            features.Image(shape=(None, None, 3), encoding_format="png")
          ),
          "depth_png": features.Sequence(features.Text()),
          "world_from_camera": features.Tensor(
            shape=(None, 4, 4), dtype=np.float32
          ),
          "intrinsics": features.Tensor(shape=(3, 3), dtype=np.float32),
          "room_json": features.Text(),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    folder = pathlib.Path(dl_manager.manual_dir)
    splits = sorted(p.stem for p in folder.glob("*.json"))
    return {split: self._generate_examples(folder, split) for split in splits}

  def _generate_examples(self, folder: pathlib.Path, split: str):
    for key, record in enumerate(writer.records(folder, split)):
      with zipfile.ZipFile(io.BytesIO(record)) as archive:
        names = sorted(archive.namelist())
        text = archive.read("room.json").decode()
        images = {
          kind: [archive.read(n) for n in names if n.startswith(f"{kind}/")]
          for kind in ("rgb", "depth")
        }
      room = json.loads(text)
      yield (
        key,
        {
          "name": room["name"],
          "rgb": [io.BytesIO(image) for image in images["rgb"]],
          "depth_png": images["depth"],
          "world_from_camera": np.float32(room["world_from_camera"]),
          "intrinsics": np.float32(room["intrinsics"]),
          "room_json": text,
        },
      )


def prepare(folder: str | pathlib.Path, data_dir: str | pathlib.Path) -> Rooms:
  """Converts all splits of `folder`; returns the builder."""
  builder = Rooms(data_dir=str(data_dir), file_format="array_record")
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(
      manual_dir=str(pathlib.Path(folder).resolve())
    )
  )
  return builder
