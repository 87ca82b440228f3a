# SPDX-License-Identifier: Apache-2.0
"""pi0 and pi0.5: camera images, a prompt and a state in, actions out by flow.

Papers: https://arxiv.org/abs/2410.24164 (pi0), 2504.16054 (pi0.5), 2510.12276
(Spatial Forcing). Weights: openpi's pi0_base and pi05_base, for PyTorch.
images -> SigLIP -> connector; [image tokens, prompt] -> Gemma-2B, all see all
-> keys and values of every layer; [state, noisy actions with their time] ->
expert Gemma-300M, which sees these as well -> velocity of the actions.
Training: mean square error of the velocity. Inference: Euler steps from noise.

pi0.5 has the state in its prompt, and norms of the expert that follow the time.

With `align`, hidden states of image tokens also follow VGGT's (`forcing`), in
training only. `teacher` computes its features in the step; without it they come
with the batch.

Departures from the papers:
1. Images and prompt never see what is after them: so one stream runs after the
   other, in training too, and the expert goes on with the first one's cache.
2. Sines of the time are those of float64: see `time_embed`.

Letters: B batch, V views, h w patch grid, N = V*h*w, T length of the prompt,
P = N + T, K actions of a chunk, A numbers of an action or a state, S tokens of
the expert (K, or K + 1 with the state), D width, W width of the expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from spatial_jax import hf, losses
from spatial_jax.models import forcing, llm, paligemma, vit
from spatial_jax.nn.layers import Dense, silu
from spatial_jax.nn.time_embed import time_embed
from spatial_jax.types import Array, Bool, Float, Int

Out = dict[str, Any]

PARTS = {"vit": vit.Model, "llm": llm.Model, "expert": llm.Model}
_BASE = {**paligemma.VARIANTS["pi0"], "expert": llm.VARIANTS["gemma-300m"]}
_SMALL = {"layers": 2, "heads": 4, "kv_heads": 1, "head_dim": 8}
_VIEW = {"layers": 2, "heads": 2, "patch": 8, "image": 64}
_TINY = {
  "vit": {**_BASE["vit"], **_VIEW, "width": 24, "mlp": 48},
  "llm": {**_BASE["llm"], **_SMALL, "width": 32, "mlp": 64, "vocab": 128},
  "expert": {**_BASE["expert"], **_SMALL, "width": 24, "mlp": 48},
}


_FOLLOWS = {"adaptive": True}  # the time
VARIANTS = {
  "pi0": _BASE,
  "pi05": {**_BASE, "expert": {**_BASE["expert"], **_FOLLOWS}},
  # Views of 64 x 64 pixels on a CPU.
  "pi0-tiny": _TINY,
  "pi05-tiny": {**_TINY, "expert": {**_TINY["expert"], **_FOLLOWS}},
}

_EXPERT = "paligemma_with_expert.gemma_expert."
KEYS = (
  *paligemma.KEYS,
  *hf.nest(llm.KEYS, f"{_EXPERT}model.", "expert/"),
  *(
    (tuple(f"{one}.{kind}" for one in theirs), f"{ours}/{leaf}")
    for theirs, ours in (
      (("state_proj",), "state"),
      (("action_in_proj",), "action_in"),
      (("action_out_proj",), "action_out"),
      (("action_time_mlp_in", "time_mlp_in"), "time_in"),
      (("action_time_mlp_out", "time_mlp_out"), "time_out"),
    )
    for kind, leaf in (("weight", "kernel"), ("bias", "bias"))
  ),
  *hf.nest(forcing.KEYS, "align_projector.", "align/"),
)
IGNORE = (f"{_EXPERT}lm_head.",)  # the expert says nothing
PART_KEYS = {"align": forcing.KEYS, "teacher": forcing.TEACHER_KEYS}
PART_IGNORE = forcing.TEACHER_IGNORE


class Model(nn.Module):
  """PaliGemma, expert and heads; see the module docstring."""

  vit: Mapping[str, Any]
  llm: Mapping[str, Any]
  expert: Mapping[str, Any]  # `adaptive`: pi0.5
  chunk: int = 50
  actions: int = 32  # numbers of an action and of a state, the rest zeros
  align: Mapping[str, Any] | None = None  # of `forcing.Align`
  teacher: Mapping[str, Any] | None = None  # of `vggt.Aggregator`
  dtype: str = "float32"
  remat: str = "none"

  def setup(self) -> None:
    shared = {"dtype": self.dtype, "remat": self.remat}
    self._vit = vit.Model(**{**shared, **self.vit}, name="vit")
    self.connector = Dense(self.llm["width"], dtype=self.dtype)
    self._llm = llm.Model(**{**shared, **self.llm}, name="llm")
    self._expert = llm.Model(**{**shared, **self.expert}, name="expert")
    width = self.expert["width"]
    self.action_in = Dense(width, dtype=self.dtype)
    self.action_out = Dense(self.actions, dtype=self.dtype)
    self.time_in = Dense(width, dtype=self.dtype)
    self.time_out = Dense(width, dtype=self.dtype)
    if not self._expert.adaptive:
      self.state = Dense(width, dtype=self.dtype)
    self._align, self._teacher = forcing.parts(self.align, self.teacher)

  def __call__(
    self,
    images: Float[Array, "B V height width 3"],
    images_mask: Bool[Array, "B V"],
    tokens: Int[Array, "B T"],
    tokens_mask: Bool[Array, "B T"],
    state: Float[Array, "B A"] | None,
    noisy: Float[Array, "B K A"],
    time: Float[Array, " B"],
  ) -> tuple[Float[Array, "B K A"], Out]:
    """Velocity of noisy actions, from actions to noise, and intermediates.

    Args:
      images: from -1 to 1.
      images_mask: False for cameras that are missing.
      noisy: time * noise + (1 - time) * actions.
      time: in (0, 1].

    `out` holds those of `read` and of `flow`.
    """
    cache, out = self.read(images, images_mask, tokens, tokens_mask)
    velocity, more = self.flow(cache, state, noisy, time)
    if self.is_initializing():
      forcing.initialize(self._align, self._teacher, self.llm["width"])
    return velocity, {**out, **more}

  def read(
    self,
    images: Float[Array, "B V height width 3"],
    images_mask: Bool[Array, "B V"],
    tokens: Int[Array, "B T"],
    tokens_mask: Bool[Array, "B T"],
  ) -> tuple[llm.Cache, Out]:
    """Cache of images and prompt with room for the expert's S tokens.

    `out` holds "vit/connected" [B N D], "inputs" [B P D] and what `llm.Model`
    returns.
    """
    B, V = images.shape[:2]
    x, _ = self._vit(images.reshape(B * V, *images.shape[2:]))
    seen = self.connector(x).reshape(B, -1, self.llm["width"])
    x = jnp.concatenate([seen, self._llm.embed(tokens)], axis=1)
    of_image = jnp.repeat(images_mask, seen.shape[1] // V, axis=1)
    mask = jnp.concatenate([of_image, tokens_mask], axis=1)
    segments = mask.astype(jnp.int32)
    cache = self._llm.init_cache(B, x.shape[1] + self._suffix)
    _, out = self._llm(
      None,
      jnp.cumsum(segments, axis=1) - 1,
      segments,
      cache=cache,
      mutual=jnp.ones_like(segments),
      embeddings=x,
    )
    return out.pop("cache"), {"vit/connected": seen, "inputs": x, **out}

  def flow(
    self,
    cache: llm.Cache,
    state: Float[Array, "B A"] | None,
    noisy: Float[Array, "B K A"],
    time: Float[Array, " B"],
  ) -> tuple[Float[Array, "B K A"], Out]:
    """Velocity, from the cache of `read`.

    `out` holds "expert/inputs" [B S W], "expert/blocks" [L B S W],
    "expert/hidden" [B S W], "time" [B W], "positions" [B S], and of all tokens
    "segments" and "groups" [B P+S], as `nn.attention.packed_mask` takes them.
    """
    B = noisy.shape[0]
    times = time_embed(time, self.expert["width"]).astype(self.dtype)
    x, condition = self.action_in(noisy), None
    groups = jnp.full((B, self.chunk), 3)
    if self._expert.adaptive:
      condition = silu(self.time_out(silu(self.time_in(times))))
    else:
      wide = jnp.broadcast_to(times[:, None], x.shape)
      x = self.time_in(jnp.concatenate([x, wide], axis=-1))
      x = self.time_out(silu(x))
      x = jnp.concatenate([self.state(state)[:, None], x], axis=1)
      groups = jnp.concatenate([jnp.full((B, 1), 2), groups], axis=1)
    count = jnp.sum(cache["segments"], axis=1, keepdims=True)
    positions = count + jnp.arange(self._suffix)[None]
    hidden, out = self._expert(
      None,
      positions,
      jnp.ones_like(groups),
      cache=cache,
      mutual=groups,
      embeddings=x,
      condition=condition,
    )
    velocity = self.action_out(hidden[:, -self.chunk :])
    return velocity.astype(jnp.float32), {
      "expert/inputs": x,
      "expert/blocks": out["llm/blocks"],
      "expert/hidden": hidden,
      "time": times,
      "positions": positions,
      "segments": out["cache"]["segments"],
      "groups": out["cache"]["mutual"],
    }

  def sample(
    self,
    images: Float[Array, "B V height width 3"],
    images_mask: Bool[Array, "B V"],
    tokens: Int[Array, "B T"],
    tokens_mask: Bool[Array, "B T"],
    state: Float[Array, "B A"] | None,
    noise: Float[Array, "B K A"],
    steps: int = 10,
  ) -> Float[Array, "B K A"]:
    """Normalised actions: Euler steps from noise at time 1 to time 0."""
    cache, _ = self.read(images, images_mask, tokens, tokens_mask)

    def step(_, carry):
      x, time = carry
      velocity, _ = self.flow(cache, state, x, jnp.full(len(x), time))
      return x - velocity / steps, time - 1 / steps

    start = noise.astype(jnp.float32), jnp.float32(1)
    return jax.lax.fori_loop(0, steps, step, start)[0]

  @property
  def _suffix(self) -> int:
    return self.chunk + (not self.expert.get("adaptive", False))

  def force(
    self,
    out: Out,
    images: Float[Array, "B V height width 3"],
    images_mask: Bool[Array, "B V"],
    pixels_mask: Bool[Array, "B V height width"] | None = None,
    features: Float[Array, "B V y x E"] | None = None,
  ) -> tuple[Float[Array, ""], Out]:
    """Loss of the image tokens' hidden states against the teacher.

    Args:
      out: what `__call__` returned for these images.
      pixels_mask: False where images were padded.
      features: the teacher's, computed before.
    """
    B, V, height, width, _ = images.shape
    grid = height // self._vit.patch, width // self._vit.patch
    white = (images + 1) / 2
    seen = jnp.any(white != 0, axis=(2, 3, 4), keepdims=True)
    if pixels_mask is not None:
      seen = seen & pixels_mask[..., None]
    white = jnp.where(seen, white, 1.0)
    features = forcing.teach(self._teacher, white, features)
    mask = jnp.broadcast_to(images_mask[..., None, None], (B, V, *grid))
    if pixels_mask is not None:
      mask = mask & forcing.token_mask(pixels_mask, grid)
    x = forcing.select(out, self._align.layer, self._llm.layers)
    x = x[:, : V * grid[0] * grid[1]].reshape(B, V, *grid, -1)
    return self._align(x, features, mask)


def arguments(batch: Mapping[str, Array]) -> dict[str, Any]:
  """What `Model` takes of a batch."""
  names = ("images", "images_mask", "tokens", "tokens_mask")
  actions = batch["actions"]
  return {
    **{name: batch[name] for name in names},
    "state": batch.get("state"),
    "noisy": batch.get("noisy", actions),
    "time": batch.get("time", jnp.ones(len(actions))),
  }


def draw(key: Array, shape: tuple[int, int, int]) -> dict[str, Array]:
  """Noise [B K A] and times [B], which are 0.001 + 0.999 * Beta(1.5, 1)."""
  keys = jax.random.split(key)
  noise = jax.random.normal(keys[0], shape)
  # Below t lies t^1.5 of that distribution.
  time = jax.random.uniform(keys[1], shape[:1]) ** (2 / 3)
  return {"noise": noise, "time": 0.999 * time + 0.001}


def loss(
  model: Model,
  params: Any,
  batch: Mapping[str, Array],
  *,
  rngs: Any = None,
  train: bool = True,
) -> tuple[Float[Array, ""], tuple[losses.Metrics, Out]]:
  """Mean square error of the velocity, (metrics, intermediates).

  In training, `align.weight` times the loss of `Model.force` is added. The
  batch may have its own `noise` and `time`.
  """
  actions = batch["actions"]
  key = jax.random.key(0) if rngs is None else rngs["sample"]
  batch = {**draw(key, actions.shape), **batch}
  time = batch["time"][:, None, None]
  noisy = time * batch["noise"] + (1 - time) * actions
  velocity, out = model.apply(
    {"params": params}, **arguments({**batch, "noisy": noisy})
  )
  error = velocity - (batch["noise"] - actions)
  value = flow = jnp.mean(jnp.square(error))
  metrics = {"flow": flow}
  if train and model.align is not None:
    align, more = model.apply(
      {"params": params},
      out,
      batch["images"],
      batch["images_mask"],
      batch.get("pixels_mask"),
      batch.get("teacher_features"),
      method="force",
    )
    value = flow + model.align.get("weight", forcing.Align.weight) * align
    metrics["align"], out = align, {**out, **more}
  return value, ({"loss": value, **metrics}, {**out, "velocity": velocity})


def INPUTS(config) -> dict[str, jax.ShapeDtypeStruct]:
  """`config.batch_size` rows with `config.data.length` tokens of text.

  `config.data.views` images have the size of the tower's table.
  """
  sizes, variant = config.model, VARIANTS[config.model.variant]
  side = {**variant["vit"], **sizes.get("vit", {})}["image"]
  B, T, V = config.batch_size, config.data.length, config.data.views
  chunk, actions = sizes.get("chunk", 50), sizes.get("actions", 32)
  inputs = {
    "images": ((B, V, side, side, 3), jnp.float32),
    "images_mask": ((B, V), jnp.bool_),
    "tokens": ((B, T), jnp.int32),
    "tokens_mask": ((B, T), jnp.bool_),
    "state": ((B, actions), jnp.float32),
    "actions": ((B, chunk, actions), jnp.float32),
  }
  return {name: jax.ShapeDtypeStruct(*x) for name, x in inputs.items()}
