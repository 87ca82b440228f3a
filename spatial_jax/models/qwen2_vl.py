# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL: Qwen2.5-VL with the vision tower of the generation before.

Paper: https://arxiv.org/abs/2409.12191. Weights: Qwen/Qwen2-VL-2B-Instruct and
Qwen/Qwen2-VL-7B-Instruct.
patches -> vit -> merged tokens -> in place of the image tokens' embeddings ->
llm with (t, h, w) positions -> logits.

The tower has LayerNorm, an MLP without a gate, and full attention within a
frame in all layers (`qwen_vit.Model.plain`). Times of a video count temporal
patches, whatever their seconds: `data.positions.mrope` with `second_per_grid`
1 and `tokens_per_second` 1. All else, and the departures from the paper, are
those of `qwen2_5_vl`, whose model this is.
"""

from __future__ import annotations

from spatial_jax import hf
from spatial_jax.models import llm, llm_variants, qwen2_5_vl, qwen_vit

PARTS = qwen2_5_vl.PARTS
_VIT = {"plain": True, "window": 0, "mlp": 5120}


def _published(decoder):
  decoder = llm.VARIANTS[decoder]
  return {"vit": {**_VIT, "out_width": decoder["width"]}, "llm": decoder}


VARIANTS = {
  # Decoders of the two generations have the same sizes.
  "2b": _published("qwen2.5-1.5b"),
  "7b": _published("qwen2-7b"),
  # Small enough for parity tests.
  "tiny": {
    **qwen2_5_vl.VARIANTS["tiny"],
    "vit": {**qwen2_5_vl.VARIANTS["tiny"]["vit"], **_VIT, "mlp": 128},
  },
}

# transformers 4.51 and the published files name tensors without, releases from
# 4.52 on with the second prefix.
KEYS = (
  *hf.nest(qwen_vit.PLAIN_KEYS, ("visual.", "model.visual."), "vit/"),
  *llm_variants.keys(("model.", "model.language_model.")),
)
IGNORE = ()

Model = qwen2_5_vl.Model
arguments = qwen2_5_vl.arguments
loss = qwen2_5_vl.loss
INPUTS = qwen2_5_vl.INPUTS
