# SPDX-License-Identifier: Apache-2.0
"""OpenVLA-OFT: camera images and an instruction in, a chunk of actions out.

Papers: https://arxiv.org/abs/2502.19645 (OFT), 2406.09246 (OpenVLA),
2510.12276 (Spatial Forcing). Weights: openvla/openvla-7b, moojink/
openvla-7b-oft-*, haofuly/spatial-forcing-7b-finetuned-libero-*.
images -> DINOv2 and SigLIP, channels side by side -> projector; [begin, image
tokens, proprioception, instruction, one empty token for each number of the
actions] -> Llama, where all see all -> what it says before each empty token ->
head -> actions. One pass, no decoding; the loss is the mean absolute error.

With `align`, hidden states of image tokens also follow VGGT's (`forcing`), in
training only. `teacher` computes its features in the step; without it they come
with the batch.

Departures from the papers:
1. Rows are padded at the right to one length; the reference pads each batch.
2. Only the L1 head: neither tokens as actions, nor diffusion, nor FiLM.

Letters: B batch, T length of the text, V views, h w patch grid, N = V*h*w, P
image tokens and proprioception, L = P + T, S = K*A slots, K actions of a chunk,
A numbers of an action, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from spatial_jax import hf, losses
from spatial_jax.data.images import IMAGENET_MEAN, IMAGENET_STD
from spatial_jax.models import forcing, llm, llm_variants, vit, vit_keys
from spatial_jax.nn.layers import Dense, LayerNorm, Mlp, activation, scan_layers
from spatial_jax.types import Array, Bool, Float, Int

Out = dict[str, Any]

DINO = (IMAGENET_MEAN, IMAGENET_STD)

PARTS = {"dino": vit.Model, "siglip": vit.Model, "llm": llm.Model}
_DINO = vit.VARIANTS["openvla-dinov2"]
_SIGLIP = vit.VARIANTS["openvla-siglip"]
_SMALL = {"layers": 2, "heads": 2, "patch": 8, "image": 64}
VARIANTS = {
  "7b": {
    "dino": _DINO,
    "siglip": _SIGLIP,
    # The exported config falls back to another eps than Llama 2 has.
    "llm": {**llm.VARIANTS["llama2-7b"], "vocab": 32064, "eps": 1e-6},
  },
  # Views of 64 x 64 pixels on a CPU.
  "tiny": {
    "dino": {**_DINO, **_SMALL, "width": 24, "mlp": 48},
    "siglip": {**_SIGLIP, **_SMALL, "width": 16, "mlp": 32},
    "llm": {
      **llm.VARIANTS["llama2-7b"],
      "vocab": 128,
      "width": 32,
      "layers": 3,
      "heads": 4,
      "kv_heads": 4,
      "mlp": 64,
    },
  },
}


def _rows(*pairs):
  """Rows of linear layers; of norms where the name says so."""
  return tuple(
    (f"{theirs}.{kind}", f"{ours}/{leaf}")
    for theirs, ours in pairs
    for kind, leaf in (
      ("weight", "scale" if ours.endswith("norm") else "kernel"),
      ("bias", "bias"),
    )
  )


# The parts that the published checkpoints keep in files of their own.
PART_KEYS = {
  "action_head": _rows(
    ("model.layer_norm1", "in_norm"),
    ("model.fc1", "up"),
    ("model.mlp_resnet_blocks.{i}.ffn.0", "blocks/norm"),
    ("model.mlp_resnet_blocks.{i}.ffn.1", "blocks/up"),
    ("model.layer_norm2", "out_norm"),
    ("model.fc2", "down"),
  ),
  "proprio": _rows(("fc1", "up"), ("fc2", "down")),
  "align": forcing.KEYS,
  "teacher": forcing.TEACHER_KEYS,
}
PART_IGNORE = forcing.TEACHER_IGNORE
_VLA = ("", "vla.")
_TOWERS = tuple(f"{vla}vision_backbone." for vla in _VLA)
KEYS = (
  *hf.nest(vit_keys.TIMM, tuple(f"{t}featurizer." for t in _TOWERS), "dino/"),
  *hf.nest(
    vit_keys.TIMM, tuple(f"{t}fused_featurizer." for t in _TOWERS), "siglip/"
  ),
  *hf.nest(
    _rows(("fc1", "up"), ("fc2", "middle"), ("fc3", "down")),
    tuple(f"{vla}projector." for vla in _VLA),
    "projector/",
  ),
  *llm_variants.keys(
    tuple(f"{vla}language_model.model." for vla in _VLA),
    tuple(f"{vla}language_model." for vla in _VLA),
  ),
  # As files of one folder, or of one file, below a name for each.
  *hf.nest(PART_KEYS["action_head"], "action_head.", "action_head/"),
  *hf.nest(PART_KEYS["proprio"], "proprio_projector.", "proprio/"),
  *hf.nest(PART_KEYS["align"], "align_projector.", "align/"),
)
IGNORE = tuple(f"{t}fused_featurizer.attn_pool." for t in _TOWERS)


class Projector(nn.Module):
  """Three linear layers from the towers' channels to the decoder's width."""

  width: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... D"]:
    def dense(features, name):
      return Dense(features, dtype=self.dtype, name=name)

    gelu = activation("gelu")
    x = gelu(dense(4 * x.shape[-1], "up")(x))
    x = gelu(dense(self.width, "middle")(x))
    return dense(self.width, "down")(x)


class Residual(nn.Module):
  """A block of the head, shaped for a scan."""

  dtype: str = "float32"

  @nn.compact
  def __call__(self, x, _):
    y = LayerNorm(1e-5, self.dtype, name="norm")(x)
    y = Dense(x.shape[-1], dtype=self.dtype, name="up")(y)
    return x + nn.relu(y), None


class Head(nn.Module):
  """Hidden states of an action's slots, side by side, to its numbers."""

  width: int
  actions: int
  layers: int = 2
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "B K AD"]) -> Float[Array, "B K A"]:
    x = LayerNorm(1e-5, self.dtype, name="in_norm")(x)
    x = nn.relu(Dense(self.width, dtype=self.dtype, name="up")(x))
    blocks = scan_layers(Residual, self.layers)
    x, _ = blocks(self.dtype, name="blocks")(x, None)
    x = LayerNorm(1e-5, self.dtype, name="out_norm")(x)
    return Dense(self.actions, dtype=self.dtype, name="down")(x)


class Model(nn.Module):
  """Towers, decoder and head; see the module docstring."""

  dino: Mapping[str, Any]
  siglip: Mapping[str, Any]
  llm: Mapping[str, Any]
  chunk: int = 8
  actions: int = 7  # numbers of one of them
  state: int = 8  # numbers of proprioception; 0: none
  align: Mapping[str, Any] | None = None  # of `forcing.Align`
  # Hidden states of this position on are aligned. Image tokens start at 1: the
  # published weights have learned what the patch before sees.
  align_from: int = 2
  teacher: Mapping[str, Any] | None = None  # of `vggt.Aggregator`
  dtype: str = "float32"
  remat: str = "none"

  def setup(self) -> None:
    shared = {"dtype": self.dtype, "remat": self.remat}
    self._dino = vit.Model(**{**shared, **self.dino}, name="dino")
    self._siglip = vit.Model(**{**shared, **self.siglip}, name="siglip")
    self._llm = llm.Model(**{**shared, **self.llm}, name="llm")
    width = self.llm["width"]
    self.projector = Projector(width, self.dtype)
    if self.state:
      self._proprio = Mlp(
        width, "gelu", True, self.dtype, width, name="proprio"
      )
    self.action_head = Head(width, self.actions, dtype=self.dtype)
    self._align, self._teacher = forcing.parts(self.align, self.teacher)

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    tokens_mask: Bool[Array, "B T"],
    slots: Bool[Array, "B T"],
    images: Float[Array, "B V height width 6"],
    state: Float[Array, "B Q"] | None = None,
  ) -> tuple[Float[Array, "B K A"], Out]:
    """Normalised actions, and named intermediates.

    Args:
      tokens: begin token, instruction, slots in a row, end token, padding.
      slots: True at the S tokens that stand for the numbers of the actions.
      images: channels are RGB in [0, 1] normalised with `DINO`'s mean and
        deviation, then with SigLIP's, 0.5 and 0.5.

    `out` holds "dino/tokens" and "siglip/tokens" [B*V h*w C], "visual/tokens"
    [B P D], "inputs" [B L D], what `llm.Model` returns and "actions/hidden"
    [B S D].
    """
    visual, out = self._see(images)
    if self.state:
      if state is None:
        raise ValueError("give `state`, or set config.model.state to 0")
      visual = jnp.concatenate([visual, self._proprio(state)[:, None]], axis=1)
    B, P = visual.shape[:2]

    def insert(text, visual):  # after the begin token
      return jnp.concatenate([text[:, :1], visual, text[:, 1:]], axis=1)

    embeddings = jnp.where(slots[..., None], 0, self._llm.embed(tokens))
    x = insert(embeddings, visual)
    segments = insert(tokens_mask, jnp.ones((B, P), bool)).astype(jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), segments.shape)
    _, more = self._llm(
      None, positions, segments, mutual=segments, embeddings=x
    )
    # Slots in order, and of each the token before.
    at = jnp.argsort(~slots, axis=1, stable=True)
    at = at[:, : self.chunk * self.actions] + P - 1
    hidden = jnp.take_along_axis(more["llm/hidden"], at[..., None], axis=1)
    actions = self.action_head(hidden.reshape(B, self.chunk, -1))
    out |= {"visual/tokens": visual, "inputs": x, "actions/hidden": hidden}
    if self.is_initializing():
      forcing.initialize(self._align, self._teacher, self.llm["width"])
    return actions.astype(jnp.float32), {**out, **more}

  def _see(self, images):
    B, V, height, width, _ = images.shape
    images = images.reshape(B * V, height, width, 6)
    dino, _ = self._dino(images[..., :3])
    siglip, _ = self._siglip(images[..., 3:])
    x = self.projector(jnp.concatenate([dino, siglip], axis=-1))
    out = {"dino/tokens": dino, "siglip/tokens": siglip}
    return x.reshape(B, -1, x.shape[-1]), out

  def force(
    self,
    out: Out,
    images: Float[Array, "B V height width 6"],
    features: Float[Array, "B V y x E"] | None = None,
  ) -> tuple[Float[Array, ""], Out]:
    """Loss of the image tokens' hidden states against the teacher.

    Args:
      out: what `__call__` returned for these images.
      features: the teacher's, computed before.
    """
    B, V, height, width, _ = images.shape
    h, w = height // self._dino.patch, width // self._dino.patch
    features = forcing.teach(self._teacher, colors(images), features)
    x = forcing.select(out, self._align.layer, self._llm.layers)
    x = x[:, self.align_from : self.align_from + V * h * w]
    return self._align(x.reshape(B, V, h, w, -1), features)


def colors(
  images: Float[Array, "*b height width 6"],
) -> Float[Array, "*b height width 3"]:
  """RGB in [0, 1] of what the towers read."""
  shape = (1,) * (images.ndim - 1) + (3,)
  mean, std = (jnp.array(x).reshape(shape) for x in DINO)
  return images[..., :3] * std + mean


def arguments(batch: Mapping[str, Array]) -> dict[str, Any]:
  """What `Model` takes of a batch."""
  names = ("tokens", "tokens_mask", "slots", "images", "state")
  return {name: batch[name] for name in names if name in batch}


def loss(
  model: Model,
  params: Any,
  batch: Mapping[str, Array],
  *,
  rngs: Any = None,
  train: bool = True,
) -> tuple[Float[Array, ""], tuple[losses.Metrics, Out]]:
  """Mean absolute error of the actions, (metrics, intermediates).

  In training, `align.weight` times the loss of `Model.force` is added.
  """
  del rngs  # nothing is random
  actions, out = model.apply({"params": params}, **arguments(batch))
  value = error = jnp.mean(jnp.abs(actions - batch["actions"]))
  metrics = {"l1": error}
  if train and model.align is not None:
    align, more = model.apply(
      {"params": params},
      out,
      batch["images"],
      batch.get("teacher_features"),
      method="force",
    )
    value = error + model.align.get("weight", forcing.Align.weight) * align
    metrics["align"], out = align, {**out, **more}
  return value, ({"loss": value, **metrics}, {**out, "actions": actions})


def INPUTS(config) -> dict[str, jax.ShapeDtypeStruct]:
  """`config.batch_size` rows with `config.data.length` tokens of text.

  `config.data.views` images have the size of the towers' tables.
  """
  sizes, variant = config.model, VARIANTS[config.model.variant]
  side = {**variant["dino"], **sizes.get("dino", {})}["image"]
  B, T, V = config.batch_size, config.data.length, config.data.views
  chunk, actions = sizes.get("chunk", 8), sizes.get("actions", 7)
  inputs = {
    "tokens": ((B, T), jnp.int32),
    "tokens_mask": ((B, T), jnp.bool_),
    "slots": ((B, T), jnp.bool_),
    "images": ((B, V, side, side, 6), jnp.float32),
    "actions": ((B, chunk, actions), jnp.float32),
  }
  if state := sizes.get("state", 8):
    inputs["state"] = ((B, state), jnp.float32)
  return {name: jax.ShapeDtypeStruct(*x) for name, x in inputs.items()}
