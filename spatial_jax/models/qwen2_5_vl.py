# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL: image or video patches and text in, text out.

Paper: https://arxiv.org/abs/2502.13923. Weights: Qwen/Qwen2.5-VL-{3B,7B,32B,
72B}-Instruct.
patches -> vit -> merged tokens -> in place of the image tokens' embeddings ->
llm with (t, h, w) positions -> logits.

Departures from the paper:
1. Patches are part of the batch's rows: the k-th image token of a row takes the
   k-th merged token of the same row, so that rows never mix and a batch can be
   sharded without communication.
2. Positions come with the batch (`data.positions`), as do the index arrays of
   images of different sizes (`data.vision.layout`); with a static `grid` no
   index arrays are needed.
3. With `vit.prune`, STTS's scorer drops video tokens (see `stts`): the decoder
   reads rows without them. Tokens left keep their positions. All frames of the
   static grid are one video.
4. The "demo" variant adds learned position and frame embeddings to the vision
   tower; see there.

Letters: B batch, T length, P patches, M merged tokens, C patch values, D width,
V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from spatial_jax import hf, losses
from spatial_jax.data import vision
from spatial_jax.data.stts import budget
from spatial_jax.models import llm, qwen_vit
from spatial_jax.nn import edit as edit_lib
from spatial_jax.nn.slots import drop_slots, restore, take
from spatial_jax.types import Array, Bool, Float, Int

Out = dict[str, Any]

PARTS = {"vit": qwen_vit.Model, "llm": llm.Model}


def _published(size, **vit):
  decoder = llm.VARIANTS[f"qwen2.5-{size}"]
  return {"vit": {"out_width": decoder["width"], **vit}, "llm": decoder}


VARIANTS = {
  "3b": _published("3b"),
  "7b": _published("7b"),
  # The two large ones have a wider MLP in the vision tower.
  "32b": _published("32b", mlp=3456),
  "72b": _published("72b", mlp=3456),
  # Small enough for parity tests: windows that the border cuts, grouped heads.
  "tiny": {
    "vit": {
      "width": 32,
      "layers": 4,
      "heads": 2,
      "mlp": 48,
      "out_width": 64,
      "patch": 4,
      "window": 16,
      "full_layers": (1, 3),
    },
    "llm": {
      "vocab": 128,
      "width": 64,
      "layers": 3,
      "heads": 4,
      "kv_heads": 2,
      "mlp": 96,
      "tied": False,
      "sections": (2, 3, 3),
    },
    "image_token": 120,
    "video_token": 121,
  },
  # Learns rooms from scratch on two CPU cores: 4 frames of 64 x 64 pixels.
  "demo": {
    "vit": {
      "width": 96,
      "layers": 3,
      "heads": 3,
      "mlp": 256,
      "out_width": 128,
      "patch": 8,
      "temporal_patch": 1,
      "window": 0,
      "theta": 100.0,
      "position_table": (8, 8),
      "frame_table": 4,
    },
    "llm": {
      "vocab": 512,
      "width": 128,
      "layers": 6,
      "heads": 4,
      "kv_heads": 4,
      "mlp": 352,
      "tied": False,
      "theta": 1000.0,
      "sections": (1,) * 16,  # t h w t h w ...: all axes at all scales
      "one_hot": True,
      # As large as what the first blocks add, or words would drown in it.
      "embed_std": 1.0,
    },
    "vision_gradient": 0.1,
    # Recomputing is faster on CPU than stacking all that a scan would save.
    "remat": "attention",
    "grid": (4, 8, 8),
    "image_token": 1,
    "video_token": 1,
  },
}

# transformers 4.51 and the published files name tensors without, releases from
# 4.52 on with the second prefix.
KEYS = (
  *hf.nest(qwen_vit.KEYS, ("visual.", "model.visual."), "vit/"),
  *hf.nest(llm.KEYS, ("model.", "model.language_model."), "llm/"),
  (
    "lm_head.weight",
    "llm/head/kernel",
    hf.Tied(
      ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight")
    ),
  ),
)
IGNORE = ()


class Model(nn.Module):
  """Vision tower and decoder; see the module docstring."""

  vit: Mapping[str, Any]
  llm: Mapping[str, Any]
  grid: tuple[int, int, int] | None = None  # frames, h, w in patches, per row
  image_token: int = 151655
  video_token: int = 151656
  dtype: str = "float32"
  remat: str = "none"
  loss_tokens: int = 0  # whose logits a device holds at once; 0: all
  # Share of the decoder's gradient that reaches the vision tower. Below 1 where
  # the tower has losses of its own, which an untrained decoder would drown.
  vision_gradient: float = 1.0
  temporal_weight: float = 0.5  # of the scorer's loss, if `vit` has `prune`

  def setup(self) -> None:
    shared = {"dtype": self.dtype, "remat": self.remat}
    self._vit = qwen_vit.Model(**{**shared, **self.vit}, name="vit")
    self._llm = self._decoder(name="llm")

  def _decoder(self, **kwargs) -> llm.Model:
    shared = {"dtype": self.dtype, "remat": self.remat}
    return llm.Model(**{**shared, **self.llm}, **kwargs)

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B 3 T"],
    segments: Int[Array, "B T"],
    shared: Bool[Array, "B T"] | None = None,
    patches: qwen_vit.Patches | None = None,
    layout: dict[str, Array] | None = None,
    cache: llm.Cache | None = None,
    *,
    see: Callable[..., tuple[Array, Out]] | None = None,
    edits: Mapping[str, edit_lib.Edits] | None = None,
    last: Int[Array, " B"] | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, "B logits V"], Out]:
    """Logits and named intermediates.

    `out` holds "vit/tokens" [B P Dv], "vit/merged" [B M D], "llm/embedding"
    [V D], "llm/blocks" [L B T D] (the residual stream after each block) and
    "llm/hidden" [B T D] (after the last norm). See `llm.Model` for the rest.
    With `vit.prune` it also holds "prune/scores" [B F G], "prune/stays" [B M],
    "prune/temporal" and "llm/order" [B K], the places of the tokens left;
    what dropped tokens would have is 0.

    Args:
      see: what the decoder reads instead of merged tokens, and intermediates,
        from merged tokens and `out`; see `mechanisms`.
      edits: of the residual streams of "vit" and "llm"; see `nn.edit`.
    """
    del train  # no dropout
    edits = edit_lib.check(edits, PARTS)
    embeddings, out = self._llm.embed(tokens), {}
    if patches is not None:
      visual, out = self.encode(patches, layout, edits.get("vit"))
      if see is not None:
        visual, more = see(visual, out)
        out = {**out, **more, "visual/tokens": visual}
      if self.vision_gradient != 1:
        share = self.vision_gradient
        visual = share * visual + jax.lax.stop_gradient((1 - share) * visual)
      is_image = (tokens == self.image_token) | (tokens == self.video_token)
      embeddings = llm.place(
        embeddings, visual, is_image, one_hot=self._llm.one_hot
      )
    row = {"positions": positions, "segments": segments}
    row["embeddings"] = embeddings
    if shared is not None:
      row["shared"] = shared
    dropped, edit = None, edits.get("llm")
    if "prune/stays" in out:
      if edit is not None:
        raise ValueError("config.model.vit.prune and edits exclude each other")
      stays = out["prune/stays"]
      lost = budget(self.grid[0], stays.shape[1] // self.grid[0], self._drop)
      row, dropped, out["llm/order"] = drop_slots(
        row, is_image, stays, tokens.shape[1] - lost, compact=False
      )
      if last is not None:
        before = jnp.cumsum(dropped, axis=1)
        last = last - jnp.take_along_axis(before, last[:, None], axis=1)[:, 0]
    logits, more = self._llm(None, **row, cache=cache, edit=edit, last=last)
    if dropped is not None:
      back = functools.partial(restore, dropped=dropped)
      more["llm/blocks"] = jax.vmap(back)(more["llm/blocks"])
      more["llm/hidden"] = back(more["llm/hidden"])
      logits = back(logits) if last is None else logits
    return logits, {**out, **more}

  @property
  def _drop(self) -> float:
    return self.vit["prune"]["drop"]

  def encode(
    self,
    patches: qwen_vit.Patches,
    layout: dict[str, Array] | None = None,
    edit: edit_lib.Edits = None,
  ) -> tuple[Float[Array, "B M D"], Out]:
    """Vision tower alone: merged tokens and intermediates."""
    grid = self.grid if layout is None else None
    merged, out = self._vit(patches, grid and tuple(grid), layout, edit)
    # Vision-only training compares merged tokens with words.
    return merged, {**out, "llm/embedding": self._llm.embed.embedding}

  def init_cache(self, batch: int, length: int) -> llm.Cache:
    """Empty decoder cache; callable without parameters."""
    return self._decoder(parent=None).init_cache(batch, length)


def arguments(batch: Mapping[str, Array]) -> dict[str, Any]:
  """What `Model` takes of a batch; keys "layout/..." become one dict."""
  names = "tokens", "positions", "segments", "shared", "patches", "edits"
  kwargs = {name: batch[name] for name in names if name in batch}
  layout = {
    key.removeprefix("layout/"): value
    for key, value in batch.items()
    if key.startswith("layout/")
  }
  return {**kwargs, "layout": layout} if layout else kwargs


def loss(
  model: nn.Module,
  params: Any,
  batch: Mapping[str, Array],
  *,
  rngs: Any = None,
  train: bool = True,
  arguments: Callable[[Mapping[str, Array]], dict[str, Any]] = arguments,
) -> tuple[Float[Array, ""], tuple[losses.Metrics, Out]]:
  """Weighted next-token loss, (metrics, intermediates)."""
  _, out = model.apply(
    {"params": params}, **arguments(batch), train=train, rngs=rngs
  )
  rows, hidden = batch, out
  if "llm/order" in out:  # the head has nothing to say of dropped tokens
    order = out["llm/order"]
    rows = {k: take(batch[k], order) for k in ("labels", "loss_weight")}
    hidden = {"llm/hidden": take(out["llm/hidden"], order)}
  tokens = model.loss_tokens
  value, metrics = llm.next_token(params["llm"], hidden, rows, tokens)
  if "prune/temporal" in out:
    metrics["temporal"] = out["prune/temporal"]
    if train:
      value = value + model.temporal_weight * metrics["temporal"]
  return value, (metrics, out)


def INPUTS(config) -> dict[str, jax.ShapeDtypeStruct]:
  """Static batch: `config.batch_size` rows of `config.data.length` tokens.

  Patches are there when the model has a static grid, or when
  `config.data.layout` gives the sizes of `data.vision.layout`.
  """
  from spatial_jax import models

  model, _ = models.build(config)
  B, T = config.batch_size, config.data.length

  def array(dtype, *shape):
    return jax.ShapeDtypeStruct((B, *shape), dtype)

  inputs = {
    "tokens": array(jnp.int32, T),
    "positions": array(jnp.int32, 3, T),
    "segments": array(jnp.int32, T),
    "shared": array(jnp.bool_, T),
    "labels": array(jnp.int32, T),
    "loss_weight": array(jnp.float32, T),
  }
  vit = qwen_vit.Model(**model.vit)
  count = math.prod(model.grid) if model.grid else 0
  if sizes := config.data.get("layout"):
    shapes = vision.layout_shapes(dict(sizes), merge=vit.merge, side=vit.side)
    for name, shape in shapes.items():
      inputs[f"layout/{name}"] = array(jnp.int32, *shape)
    count = sizes["patches"]
  if count:
    inputs["patches"] = array(jnp.float32, count, vit.patch_dim)
  return inputs
