# SPDX-License-Identifier: Apache-2.0
"""Pixels as Cambrian-1's reference prepares them for its four towers."""

from safetensors.numpy import load_file

from spatial_jax.data import images

TOWERS = {
  "siglip": "siglip",
  "clip": "clip",
  "dino": "dinov2",
  "convnext": "convnext",
}


def preprocess(folder, config):
  inputs = load_file(folder / "inputs.safetensors")
  got = {}
  for j in range(len(inputs)):
    for i, tower in enumerate(config["order"]):
      pixels = images.cambrian(
        inputs[f"image_{j}"], TOWERS[tower], config["sizes"][tower]
      )
      got[f"pixels_{j}_{i}"] = pixels.transpose(2, 0, 1)
  return got, load_file(folder / "outputs.safetensors")


ADAPTERS = {("cambrian", "preprocess"): preprocess}
