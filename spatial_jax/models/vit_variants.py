# SPDX-License-Identifier: Apache-2.0
"""Arguments of `vit.Model` for the published towers.

| variants | weights, and the table in `vit_keys` |
|---|---|
| clip-* | openai/clip-vit-*, CLIP |
| siglip*-* | google/siglip-*, google/siglip2-* of a fixed size, SIGLIP |
| timm-siglip-so400m-14-384 | timm/ViT-SO400M-14-SigLIP-384, TIMM |
| janus-siglip-l-16-384 | within Janus-Pro, TIMM or JANUS |
| dinov2-* | facebook/dinov2-*, DINOV2 or DINOV2_SWIGLU |
| internvit-300m-448 | within OpenGVLab/InternVL3-*, INTERNVIT or INTERNVL |
| openvla-* | within openvla/openvla-7b, TIMM |
"""

from __future__ import annotations


def _size(width, layers, heads, mlp, patch, image, **more):
  return {
    "width": width,
    "layers": layers,
    "heads": heads,
    "mlp": mlp,
    "patch": patch,
    "image": image,
    **more,
  }


_CLIP = {
  "class_token": True,
  "class_position": True,
  "patch_bias": False,
  "pre_norm": True,
  "activation": "quick_gelu",
  "eps": 1e-5,
  "final_norm": "kept",
}
_SIGLIP = {"activation": "gelu_tanh"}
_DINO = {"class_token": True, "class_position": True, "layer_scale": True}
_REGISTERS = {**_DINO, "registers": 4, "resample": "antialias"}
_GIANT = {"gated": True}

_SO400M = (1152, 27, 16, 4304)
_LARGE = (1024, 24, 16, 4096)
# width, layers, heads, mlp, patch, image side before patches
VARIANTS = {
  "clip-b-32": _size(768, 12, 12, 3072, 32, 224, **_CLIP),
  "clip-b-16": _size(768, 12, 12, 3072, 16, 224, **_CLIP),
  "clip-l-14": _size(*_LARGE, 14, 224, **_CLIP),
  # Readers of CLIP take the penultimate block, which has no norm after it.
  "clip-l-14-336": _size(*_LARGE, 14, 336, **_CLIP, output_layer=-2),
  "siglip-b-16-224": _size(768, 12, 12, 3072, 16, 224, **_SIGLIP),
  "siglip-l-16-384": _size(*_LARGE, 16, 384, **_SIGLIP),
  # Also PaliGemma's and pi0's tower.
  "siglip-so400m-14-224": _size(*_SO400M, 14, 224, **_SIGLIP),
  "siglip-so400m-14-384": _size(*_SO400M, 14, 384, **_SIGLIP),
  # SigLIP 2 of a fixed resolution has the same architecture.
  "siglip2-so400m-14-384": _size(*_SO400M, 14, 384, **_SIGLIP),
  "siglip2-so400m-16-512": _size(*_SO400M, 16, 512, **_SIGLIP),
  # The towers that were trained in timm have the exact GELU.
  "timm-siglip-so400m-14-384": _size(*_SO400M, 14, 384),
  "janus-siglip-l-16-384": _size(*_LARGE, 16, 384),
  "dinov2-b-14": _size(768, 12, 12, 3072, 14, 518, **_DINO),
  "dinov2-l-14": _size(*_LARGE, 14, 518, **_DINO),
  "dinov2-g-14": _size(1536, 40, 24, 4096, 14, 518, **_DINO, **_GIANT),
  "dinov2-l-14-registers": _size(*_LARGE, 14, 518, **_REGISTERS),
  "dinov2-g-14-registers": _size(
    1536, 40, 24, 4096, 14, 518, **_REGISTERS, **_GIANT
  ),
  "internvit-300m-448": _size(*_LARGE, 14, 448, **_DINO, final_norm="none"),
  # OpenVLA reads the penultimate block of both towers, without a norm.
  "openvla-dinov2": _size(
    *_LARGE,
    14,
    224,
    class_token=True,
    registers=4,
    layer_scale=True,
    resample="antialias",
    final_norm="kept",
    output_layer=-2,
  ),
  "openvla-siglip": _size(
    *_SO400M, 14, 224, final_norm="kept", output_layer=-2
  ),
}
