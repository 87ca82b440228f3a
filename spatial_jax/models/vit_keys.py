# SPDX-License-Identifier: Apache-2.0
"""Names of `vit.Model`'s parameters in published checkpoints.

One table for each naming; a row whose parameter a variant doesn't have is not
used. All are relative: nest them under the prefix of a checkpoint, and `IGNORE`
as well.

| table | checkpoints |
|---|---|
| CLIP | openai/clip-vit-*, as transformers and LLaVA name it |
| SIGLIP | google/siglip-*, google/siglip2-*, PaliGemma, pi0, LLaVA-Video |
| JANUS | deepseek-community/Janus-Pro-* (transformers) |
| DINOV2, DINOV2_SWIGLU | facebook/dinov2-*, -with-registers-*; -giant |
| TIMM | timm, open_clip's SigLIP, deepseek-ai/Janus-Pro-*, OpenVLA, DINOv2's |
| INTERNVIT | OpenGVLab/InternVL3-*, InternViT-300M-448px |
| INTERNVL | OpenGVLab/InternVL3-*-hf (transformers) |
| BIG_VISION | SigLIP within openpi's JAX checkpoints of pi0 |
"""

from __future__ import annotations

from spatial_jax import hf

# Shapes that a checkpoint has and a table of embeddings hasn't.
_ROW = hf.Custom(lambda x: x, lambda x: x[0])  # [D] for [1 D]
_LEAD = hf.Custom(lambda x: x, lambda x: x[None])  # [1 R D] for [R D]

# Known tensors without a parameter: buffers, DINOv2's token for masked
# training, and SigLIP's pooling head where `pool` is off.
IGNORE = (
  "embeddings.position_ids",
  "embeddings.mask_token",
  "mask_token",
  "attn_pool.",
  "head.",
)


def _linear(theirs, ours):
  return (
    (f"{theirs}.weight", f"{ours}/kernel"),
    (f"{theirs}.bias", f"{ours}/bias"),
  )


def _norm(theirs, ours):
  return (
    (f"{theirs}.weight", f"{ours}/scale"),
    (f"{theirs}.bias", f"{ours}/bias"),
  )


def _fused(theirs, *ours):
  """Linear layers that share a published one."""
  return tuple(
    (f"{theirs}.{kind}", tuple(f"{name}/{leaf}" for name in ours))
    for kind, leaf in (("weight", "kernel"), ("bias", "bias"))
  )


_LEAF = ("kernel", "bias")
_QKV = ("attention/query", "attention/key", "attention/value")


def _separate(theirs):
  """Query, key and value of their own; `theirs` has a place for q, k, v."""
  return tuple(
    row
    for letter, ours in zip("qkv", _QKV, strict=True)
    for row in _linear(theirs.format(letter), ours)
  )


def _mlp(up, down):
  return (*_linear(up, "mlp/up"), *_linear(down, "mlp/down"))


def _layers(prefix, *rows):
  return hf.nest(rows, f"{prefix}.{{i}}.", "blocks/")


def _clip(out):
  """transformers' names of CLIP and of those that followed it."""
  return (
    ("embeddings.class_embedding", "class_token/embedding", _ROW),
    *_linear("embeddings.patch_embedding", "patch_embed"),
    ("embeddings.position_embedding.weight", "position_embed/embedding"),
    *_norm("pre_layrnorm", "pre_norm"),  # sic
    *_layers(
      "encoder.layers",
      *_norm("layer_norm1", "attention_norm"),
      *_separate("self_attn.{}_proj"),
      *_linear(f"self_attn.{out}", "attention/out"),
      *_norm("layer_norm2", "mlp_norm"),
      *_mlp("mlp.fc1", "mlp.fc2"),
    ),
    *_norm("post_layernorm", "norm"),
    ("head.probe", "pool/latent/embedding", _LEAD),
    (
      "head.attention.in_proj_weight",
      tuple(f"pool/{x}/kernel" for x in ("query", "key", "value")),
    ),
    (
      "head.attention.in_proj_bias",
      tuple(f"pool/{x}/bias" for x in ("query", "key", "value")),
    ),
    *_linear("head.attention.out_proj", "pool/out"),
    *_norm("head.layernorm", "pool/norm"),
    *hf.nest(_mlp("mlp.fc1", "mlp.fc2"), "head.", "pool/"),
  )


def _dino(*mlp):
  """transformers' names of DINOv2."""
  return (
    ("embeddings.cls_token", "class_token/embedding", _LEAD),
    ("embeddings.register_tokens", "registers/embedding", _LEAD),
    ("embeddings.position_embeddings", "position_embed/embedding", _LEAD),
    *_linear("embeddings.patch_embeddings.projection", "patch_embed"),
    *_layers(
      "encoder.layer",
      *_norm("norm1", "attention_norm"),
      *_linear("attention.attention.query", "attention/query"),
      *_linear("attention.attention.key", "attention/key"),
      *_linear("attention.attention.value", "attention/value"),
      *_linear("attention.output.dense", "attention/out"),
      ("layer_scale1.lambda1", "attention_scale/scale"),
      *_norm("norm2", "mlp_norm"),
      *mlp,
      ("layer_scale2.lambda1", "mlp_scale/scale"),
    ),
    *_norm("layernorm", "norm"),
  )


CLIP = SIGLIP = _clip("out_proj")
JANUS = _clip("projection_layer")
DINOV2 = _dino(*_mlp("mlp.fc1", "mlp.fc2"))
DINOV2_SWIGLU = _dino(
  *_fused("mlp.weights_in", "mlp/gate", "mlp/up"),
  *_linear("mlp.weights_out", "mlp/down"),
)


def _scale(name):
  """In `hf.save`'s releases 0, timm; 1, OpenVLA; 2, DINOv2's own code."""
  return f"{name}.gamma", f"{name}.scale_factor", f"{name}.gamma"


TIMM = (
  ("cls_token", "class_token/embedding", _LEAD),
  (
    ("reg_token", "reg_token", "register_tokens"),
    "registers/embedding",
    _LEAD,
  ),
  ("pos_embed", "position_embed/embedding", _LEAD),
  *_linear("patch_embed.proj", "patch_embed"),
  *_layers(
    "blocks",
    *_norm("norm1", "attention_norm"),
    *_fused("attn.qkv", *_QKV),
    *_linear("attn.proj", "attention/out"),
    (_scale("ls1"), "attention_scale/scale"),
    *_norm("norm2", "mlp_norm"),
    *_mlp("mlp.fc1", "mlp.fc2"),
    (_scale("ls2"), "mlp_scale/scale"),
  ),
  *_norm("norm", "norm"),
  ("attn_pool.latent", "pool/latent/embedding", _LEAD),
  *_linear("attn_pool.q", "pool/query"),
  *_fused("attn_pool.kv", "pool/key", "pool/value"),
  *_linear("attn_pool.proj", "pool/out"),
  *_norm("attn_pool.norm", "pool/norm"),
  *hf.nest(_mlp("mlp.fc1", "mlp.fc2"), "attn_pool.", "pool/"),
)
INTERNVIT = (
  ("embeddings.class_embedding", "class_token/embedding", _LEAD),
  ("embeddings.position_embedding", "position_embed/embedding", _LEAD),
  *_linear("embeddings.patch_embedding", "patch_embed"),
  *_layers(
    "encoder.layers",
    *_norm("norm1", "attention_norm"),
    *_fused("attn.qkv", *_QKV),
    *_linear("attn.proj", "attention/out"),
    ("ls1", "attention_scale/scale"),
    *_norm("norm2", "mlp_norm"),
    *_mlp("mlp.fc1", "mlp.fc2"),
    ("ls2", "mlp_scale/scale"),
  ),
)
INTERNVL = (
  ("embeddings.cls_token", "class_token/embedding", _LEAD),
  ("embeddings.position_embeddings", "position_embed/embedding", _LEAD),
  *_linear("embeddings.patch_embeddings.projection", "patch_embed"),
  *_layers(
    "encoder.layer",
    *_norm("layernorm_before", "attention_norm"),
    *_separate("attention.{}_proj"),
    *_linear("attention.projection_layer", "attention/out"),
    ("lambda_1", "attention_scale/scale"),
    *_norm("layernorm_after", "mlp_norm"),
    *_mlp("mlp.fc1", "mlp.fc2"),
    ("lambda_2", "mlp_scale/scale"),
  ),
)
# big_vision's names, which openpi's checkpoints have below "PaliGemma/img/".
# The layers of a block are stacked there as well.
BIG_VISION = (
  ("embedding/kernel", "patch_embed/kernel"),
  ("embedding/bias", "patch_embed/bias"),
  ("pos_embedding", "position_embed/embedding", _LEAD),
  *hf.nest(
    tuple(
      (f"{theirs}/{leaf}", f"{ours}/{leaf}")
      for theirs, ours, leaves in (
        ("LayerNorm_0", "attention_norm", ("scale", "bias")),
        *(
          (f"MultiHeadDotProductAttention_0/{name}", f"attention/{name}", _LEAF)
          for name in ("query", "key", "value", "out")
        ),
        ("LayerNorm_1", "mlp_norm", ("scale", "bias")),
        ("MlpBlock_0/Dense_0", "mlp/up", _LEAF),
        ("MlpBlock_0/Dense_1", "mlp/down", _LEAF),
      )
      for leaf in leaves
    ),
    "Transformer/encoderblock/",
    "blocks/",
  ),
  ("Transformer/encoder_norm/scale", "norm/scale"),
  ("Transformer/encoder_norm/bias", "norm/bias"),
)
