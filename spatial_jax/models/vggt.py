# SPDX-License-Identifier: Apache-2.0
"""VGGT: frames of a scene in; cameras, depth, points and tracks out.

Paper: https://arxiv.org/abs/2503.11651. Weights: facebook/VGGT-1B.
images [B F height width 3] -> DINOv2 -> patch tokens + camera and register
tokens -> L x (block within frames, block across frames) -> tokens of some
layers, both blocks' outputs side by side [B F P E] -> camera head, DPT heads,
tracker.

The world is the first frame's camera (its camera and register tokens differ),
at a scale that only the network knows. The order of all other frames is of no
consequence. See `geometry.pose` for encodings and their pixel convention.

Precision, for dtype "bfloat16":
* "autocast": products of the aggregator in bfloat16; norms, rotary embedding,
  layer scales and residuals in float32. How the published model is run.
* "pure_bf16": all of the aggregator in bfloat16, even the rotary angles, whose
  rounding turns distant patches by up to 0.2 radians. How Spatial-MLLM was
  trained, and therefore must be run.
The heads always compute in float32.

Departures from the paper:
1. Only the layers that a head reads are kept, not all.
2. Dense heads see `frame_chunk` frames at a time; this changes no number.
3. Without `query_points` the tracker doesn't run.

Letters: B batch, F frames, N query points, P tokens of a frame, D width of the
aggregator, E = 2 D, L layers, K kept layers, I iterations, h w patch grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from spatial_jax import hf, sharding
from spatial_jax.models import dino, vggt_loss, vggt_track
from spatial_jax.models.llm import remat
from spatial_jax.models.vggt_heads import CAMERA_KEYS, DPT_KEYS, Camera, Dpt
from spatial_jax.nn import rope
from spatial_jax.nn.layers import scan_layers
from spatial_jax.types import Array, Float

Out = dict[str, Any]

# Means and standard deviations of ImageNet.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

HEADS = ("camera", "depth", "points", "track")
PRECISIONS = ("autocast", "pure_bf16")

VARIANTS = {
  "1b": {},
  # Small enough for tests; as deep as it takes to tell layers apart.
  "tiny": {
    "width": 32,
    "depth": 4,
    "heads": 2,
    "vit_depth": 2,
    "vit_heads": 2,
    "image_size": 56,
    "camera_depth": 2,
    "camera_heads": 4,
    "dpt_layers": (0, 1, 2, 3),
    "dpt_features": 16,
    "dpt_channels": (8, 12, 16, 16),
    "track_features": 16,
    "track_hidden": 32,
    "track_levels": 3,
    "track_radius": 2,
    "track_depth": 2,
    "track_iterations": 3,
  },
  # Learns rooms from scratch on two CPU cores: frames of 32 x 32 pixels.
  "demo": {
    "width": 96,
    "depth": 4,
    "heads": 3,
    "mlp_ratio": 2,
    "patch": 8,
    "registers": 1,
    "vit_depth": 2,
    "vit_heads": 3,
    "image_size": 32,
    "camera_depth": 2,
    "camera_heads": 6,
    "dpt_layers": (0, 1, 2, 3),
    "dpt_features": 16,
    "dpt_channels": (16, 16, 16, 16),
    "head_names": ("camera", "depth", "points"),
    # Published weights start from DINOv2. From scratch, layers must count at
    # once, frames must tell who is first, and patches where they are: what
    # moved from one place to another between frames is all that turns tell.
    "layer_scale": 1.0,
    "token_std": 0.5,
    "position_std": 0.5,
  },
}

AGGREGATOR_KEYS = (
  ("camera_token", "camera/embedding"),
  ("register_token", "registers/embedding"),
  *hf.nest(dino.KEYS, "patch_embed.", "vit/"),
  *hf.nest(dino.BLOCK_KEYS, "frame_blocks.{i}.", "blocks/frame/"),
  *hf.nest(dino.BLOCK_KEYS, "global_blocks.{i}.", "blocks/global/"),
)
KEYS = (
  *hf.nest(AGGREGATOR_KEYS, "aggregator.", "aggregator/"),
  *hf.nest(CAMERA_KEYS, "camera_head.", "camera/"),
  *hf.nest(DPT_KEYS, "depth_head.", "depth/"),
  *hf.nest(DPT_KEYS, "point_head.", "points/"),
  *hf.nest(DPT_KEYS, "track_head.feature_extractor.", "track_features/"),
  *hf.nest(vggt_track.KEYS, "track_head.tracker.", "track/"),
)
# DINOv2's own training replaced patches by it; nothing here reads it.
IGNORE = ("aggregator.patch_embed.mask_token",)

INPUTS, arguments, loss = vggt_loss.INPUTS, vggt_loss.arguments, vggt_loss.loss


class Pair(nn.Module):
  """A block within frames and one across them; both outputs side by side."""

  heads: int
  mlp_ratio: float
  scale: float
  dtype: str
  stream: str
  remat: str

  @nn.compact
  def __call__(
    self, x: Float[Array, "B F P D"], rotary: rope.Rotary
  ) -> tuple[Float[Array, "B F P D"], Float[Array, "B F P E"]]:
    def block(name):
      return remat(dino.Block, self.remat)(
        self.heads,
        self.mlp_ratio,
        qk_norm=True,
        across=name == "global",
        scale=self.scale,
        dtype=self.dtype,
        stream=self.stream,
        name=name,
      )

    frame = block("frame")(x, rotary)
    x = block("global")(frame, rotary)
    return x, jnp.concatenate([frame, x], axis=-1)


class Aggregator(nn.Module):
  """Tokens of the layers in `keep`; the first 1 + registers aren't patches."""

  width: int = 1024
  depth: int = 24
  heads: int = 16
  mlp_ratio: float = 4
  patch: int = 14
  image_size: int = 518  # side of the frames that the position table is for
  registers: int = 4
  theta: float = 100.0
  vit_depth: int = 24
  vit_heads: int = 16
  layer_scale: float = 0.01
  token_std: float = 1e-6
  position_std: float = 0.02
  keep: tuple[int, ...] = (23,)  # ascending
  dtype: str = "float32"
  precision: str = "autocast"
  remat: str = "none"

  @property
  def stream(self) -> str:
    """dtype of all but products."""
    return self.dtype if self.precision == "pure_bf16" else "float32"

  @nn.compact
  def __call__(
    self, images: Float[Array, "B F height width 3"]
  ) -> Float[Array, "K B F P E"]:
    """Outputs of the kept layers.

    Args:
      images: RGB in [0, 1]; sides are multiples of the patch.
    """
    self._check(images)
    B, F, height, width, _ = images.shape
    h, w = height // self.patch, width // self.patch
    mean, std = (
      jnp.asarray(x, self.stream)[None, None, None, None] for x in (MEAN, STD)
    )
    shared = {
      "dtype": self.dtype,
      "stream": self.stream,
      "remat": self.remat,
    }
    x = dino.Model(
      self.width,
      self.vit_depth,
      self.vit_heads,
      self.mlp_ratio,
      self.patch,
      self.image_size,
      self.registers,
      self.position_std,
      **shared,
      name="vit",
    )((images.astype(self.stream) - mean) / std)
    x = jnp.concatenate([self._special(B, F), x], axis=2)
    x = sharding.constrain(x, "batch frames patches act_embed")
    return self._alternate(x, h, w, shared)

  def _alternate(self, x, h, w, shared):
    """Kept outputs [K B F P E] of the pairs of blocks."""
    # All frames have the same positions: time has none.
    rotary = rope.axial(
      token_positions(h, w, 1 + self.registers),
      self.width // self.heads,
      self.theta,
      self.stream,
    )
    pair = Pair(
      self.heads, self.mlp_ratio, self.layer_scale, **shared, name="blocks"
    )

    def step(pair, carry, slot):
      x, kept = carry
      x, both = pair(x, rotary)
      kept = jax.lax.dynamic_update_index_in_dim(kept, both, slot, axis=0)
      return (x, kept), None

    # Every layer writes where the next kept one will: what stays is what is
    # wanted, without room for all. Layers after the last kept one share a slot.
    slots = np.searchsorted(self.keep, np.arange(self.depth))
    shape = int(slots[-1]) + 1, *x.shape[:-1], 2 * self.width
    kept = jnp.zeros(shape, x.dtype)
    (_, kept), _ = scan_layers(step, self.depth)(
      pair, (x, kept), jnp.asarray(slots)
    )
    return kept[: len(self.keep)]

  def _special(self, B, F):
    """Camera and register tokens [B F 1+registers D]."""
    init = nn.initializers.normal(self.token_std)

    def tokens(name, count):
      shape = 1, 2, count, self.width
      return dino.Table(shape, init, self.stream, name=name)()

    both = jnp.concatenate(
      [tokens("camera", 1), tokens("registers", self.registers)], axis=2
    )
    is_first = (jnp.arange(F) == 0)[None, :, None, None]
    each = jnp.where(is_first, both[:, :1], both[:, 1:])
    return jnp.broadcast_to(each, (B, *each.shape[1:]))

  def _check(self, images):
    height, width = images.shape[2:4]
    if height % self.patch or width % self.patch or 0 in images.shape:
      raise ValueError(
        f"images are {list(images.shape)}; height and width must be multiples "
        f"of the patch size {self.patch}, and nothing may be empty"
      )
    if self.precision not in PRECISIONS:
      raise ValueError(
        f"precision={self.precision!r} is unknown; use one of {PRECISIONS}"
      )
    keep = tuple(self.keep)
    if keep != tuple(sorted(set(keep))) or not keep:
      raise ValueError(f"keep={keep} must name layers in ascending order")
    if keep[0] < 0 or keep[-1] >= self.depth:
      raise ValueError(
        f"keep={keep} names layers that a model of depth {self.depth} lacks"
      )


class Model(nn.Module):
  """Aggregator and heads; see the module docstring."""

  width: int = 1024
  depth: int = 24
  heads: int = 16
  mlp_ratio: float = 4
  patch: int = 14
  image_size: int = 518
  registers: int = 4
  theta: float = 100.0
  vit_depth: int = 24
  vit_heads: int = 16
  camera_depth: int = 4
  camera_heads: int = 16
  camera_iterations: int = 4
  dpt_layers: tuple[int, ...] = (4, 11, 17, 23)
  dpt_features: int = 256
  dpt_channels: tuple[int, ...] = (256, 512, 1024, 1024)
  track_features: int = 128
  track_hidden: int = 384
  track_levels: int = 7
  track_radius: int = 4
  track_depth: int = 6
  track_iterations: int = 4
  head_names: tuple[str, ...] = HEADS  # heads that exist
  keep: tuple[int, ...] = ()  # layers in `out` beyond those that heads read
  frame_chunk: int = 8  # frames that a dense head sees at a time
  layer_scale: float = 0.01  # first value
  token_std: float = 1e-6  # of the first camera and register tokens
  position_std: float = 0.02  # of the first position table
  loss_weights: Mapping[str, float] | None = None  # of `vggt_loss.compute`
  dtype: str = "float32"
  precision: str = "autocast"
  remat: str = "none"

  @nn.compact
  def __call__(
    self,
    images: Float[Array, "B F height width 3"],
    query_points: Float[Array, "B N 2"] | None = None,
  ) -> tuple[dict[str, Array], Out]:
    """Predictions and intermediates.

    Args:
      images: RGB in [0, 1]; sides are multiples of the patch.
      query_points: (x, y) in pixels of the first frame, to be tracked.

    Returns:
      predictions, of the heads that exist: pose_encodings [I B F 9] of all
      iterations and the last one, pose_encoding [B F 9]; depth [B F height
      width] along the optical axis and depth_confidence, 1 or more; points
      [B F height width 3] in the first camera's axes and points_confidence;
      tracks [I B F N 2] in pixels and the last of them, track [B F N 2],
      visibility and track_confidence [B F N], from 0 to 1.
      out: "geometry/layers" [K B F P E] of the kept layers in ascending order,
      "geometry/tokens" [B F P E], the last layer.
    """
    keep = self._keep()
    kept = self._aggregate(keep, images)
    out = {"geometry/layers": kept, "geometry/tokens": kept[-1]}
    with jax.default_matmul_precision("float32"):
      return self._predict(kept, keep, images.shape, query_points), out

  def _keep(self):
    unknown = [name for name in self.head_names if name not in HEADS]
    if unknown:
      raise ValueError(f"head_names has {unknown}; known are {HEADS}")
    layers = {self.depth - 1, *self.keep}
    if set(self.head_names) - {"camera"}:
      layers |= set(self.dpt_layers)
    return tuple(sorted(layers))

  def _aggregate(self, keep, images):
    return Aggregator(
      self.width,
      self.depth,
      self.heads,
      self.mlp_ratio,
      self.patch,
      self.image_size,
      self.registers,
      self.theta,
      self.vit_depth,
      self.vit_heads,
      self.layer_scale,
      self.token_std,
      self.position_std,
      keep,
      self.dtype,
      self.precision,
      self.remat,
      name="aggregator",
    )(images)

  def _predict(self, kept, keep, shape, query_points):
    predictions = {}
    if "camera" in self.head_names:
      camera = Camera(
        self.camera_heads,
        self.camera_depth,
        self.camera_iterations,
        self.mlp_ratio,
        self.layer_scale,
        name="camera",
      )
      encodings = camera(kept[-1, :, :, 0].astype(jnp.float32))
      predictions["pose_encodings"] = encodings
      predictions["pose_encoding"] = encodings[-1]
    read = [keep.index(layer) for layer in self.dpt_layers if layer in keep]

    def dense(name, **kwargs):
      return self._dense(kept, read, shape, name, **kwargs)

    if "depth" in self.head_names:
      maps = dense("depth", outputs=2)
      predictions["depth"] = jnp.exp(maps[..., 0])
      predictions["depth_confidence"] = 1 + jnp.exp(maps[..., 1])
    if "points" in self.head_names:
      maps = dense("points", outputs=4)
      points = maps[..., :3]
      predictions["points"] = jnp.sign(points) * jnp.expm1(jnp.abs(points))
      predictions["points_confidence"] = 1 + jnp.exp(maps[..., 3])
    track = "track" in self.head_names
    if track and (query_points is not None or self.is_initializing()):
      if query_points is None:  # parameters are made all the same
        query_points = jnp.zeros((shape[0], 1, 2))
      features = dense(
        "track_features",
        features=self.track_features,
        down=2,
        positions=False,
      )
      predictions |= self._track(features, query_points)
    return predictions

  def _track(self, features, query_points):
    tracker = vggt_track.Tracker(
      self.track_hidden,
      self.track_depth,
      self.track_levels,
      self.track_radius,
      self.track_iterations,
      name="track",
    )
    # The features are half as fine as the frames.
    tracks, visibility, confidence = tracker(features, query_points / 2)
    return {
      "tracks": 2 * tracks,
      "track": 2 * tracks[-1],
      "visibility": visibility,
      "track_confidence": confidence,
    }

  def _dense(self, kept, read, shape, name, *, features=0, **kwargs):
    """Maps [B F y x C] of a DPT head, a chunk of frames at a time."""
    h, w = shape[2] // self.patch, shape[3] // self.patch
    dpt = remat(Dpt, self.remat, scanned=self.frame_chunk < shape[1])(
      features or self.dpt_features,
      self.dpt_channels,
      patch=self.patch,
      name=name,
      **kwargs,
    )

    def run(dpt, part):
      B, F = part.shape[1:3]
      x = jnp.stack([part[i] for i in read])[..., 1 + self.registers :, :]
      x = x.astype(jnp.float32).reshape(len(read), B * F, h, w, -1)
      maps = dpt(x)
      return maps.reshape(B, F, *maps.shape[1:])

    F = shape[1]
    if self.frame_chunk >= F:
      return run(dpt, kept)
    count = -(-F // self.frame_chunk)
    size = -(-F // count)
    starts = np.minimum(np.arange(count) * size, F - size)

    def step(dpt, _, start):
      part = jax.lax.dynamic_slice_in_dim(kept, start, size, axis=2)
      return None, run(dpt, part)

    _, maps = nn.scan(
      step, variable_broadcast="params", split_rngs={"params": False}
    )(dpt, None, jnp.asarray(starts))
    # The last chunk starts early, so that it is full.
    fresh = maps[-1][:, count * size - F :]
    return jnp.concatenate([*maps[:-1], fresh], axis=1)


def token_positions(h: int, w: int, special: int) -> np.ndarray:
  """(row, column) from 1 on of the tokens of a frame [special+h*w 2].

  Special tokens are at (0, 0), where the rotary embedding turns nothing.
  """
  rows, columns = np.mgrid[1 : h + 1, 1 : w + 1]
  grid = np.stack([rows.ravel(), columns.ravel()], axis=-1)
  return np.concatenate([np.zeros((special, 2), grid.dtype), grid])
