# SPDX-License-Identifier: Apache-2.0
"""Names of Molmo2's vision: of transformers from 5 on, and as published.

They stand below "model." of a checkpoint. `hf.save` writes the first naming,
with `release=1` the second.
"""

from __future__ import annotations

from spatial_jax import hf

# Published as a linear layer of flattened (y, x, channel) patches.
_FLAT = hf.Custom(lambda x: x.T, lambda x: x.reshape(-1, x.shape[-1]).T)


def _rows(theirs, new, ours, *kinds):
  """Rows of both releases: transformers from 5 on, and the published files."""
  leaves = {"weight": "kernel", "scale": "scale", "bias": "bias"}
  return tuple(
    (
      tuple(
        f"{name}.{'weight' if kind == 'scale' else kind}"
        for name in (new, theirs)
      ),
      f"{ours}/{leaves[kind]}",
    )
    for kind in kinds
  )


def _block(theirs, new, ours, *kinds):
  return _rows(
    f"vision_backbone.image_vit.transformer.resblocks.{{i}}.{theirs}",
    f"vision_tower.layers.{{i}}.{new}",
    f"vit/blocks/{ours}",
    *kinds,
  )


def _attention(place, prefixes, path):
  """The four projections of an attention layer, in both releases."""
  return tuple(
    row
    for theirs, new, ours in (
      ("wq", "q_proj", "query"),
      ("wk", "k_proj", "key"),
      ("wv", "v_proj", "value"),
      ("wo", "o_proj", "out"),
    )
    for row in place(
      f"{prefixes[0]}.{theirs}",
      f"{prefixes[1]}.{new}",
      f"{path}/{ours}",
      "weight",
      "bias",
    )
  )


_TOWER = ("vision_tower.", "vision_backbone.image_vit.")
_JOIN = ("vision_backbone.image_", "multi_modal_projector.image_")
# Names below "model." of a checkpoint.
KEYS = (
  (
    tuple(f"{name}patch_embedding.weight" for name in _TOWER),
    "vit/patch_embed/kernel",
    _FLAT,
  ),
  *hf.nest(
    (
      ("patch_embedding.bias", "patch_embed/bias"),
      ("positional_embedding", "position_embed/embedding"),
    ),
    _TOWER,
    "vit/",
  ),
  *_block("attention_norm", "layer_norm1", "attention_norm", "scale", "bias"),
  *_attention(_block, ("attention", "self_attn"), "attention"),
  *_block("ffn_norm", "layer_norm2", "mlp_norm", "scale", "bias"),
  *_block("feed_forward.w1", "mlp.fc1", "mlp/up", "weight", "bias"),
  *_block("feed_forward.w2", "mlp.fc2", "mlp/down", "weight", "bias"),
  *_attention(_rows, [f"{name}pooling_2d" for name in _JOIN], "connector"),
  *(
    row
    for theirs, new, ours in (
      ("w1", "gate_proj", "gate"),
      ("w3", "up_proj", "up"),
      ("w2", "down_proj", "down"),
    )
    for row in _rows(
      f"{_JOIN[0]}projector.{theirs}",
      f"{_JOIN[1]}projector.{new}",
      f"connector/mlp/{ours}",
      "weight",
    )
  ),
)
