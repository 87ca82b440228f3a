# SPDX-License-Identifier: Apache-2.0
"""Mechanisms on Qwen2.5-VL: by config alone, alone and together."""

import functools

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from spatial_jax import models, trees
from spatial_jax.data import vision
from spatial_jax.geometry import camera
from spatial_jax.models import qwen2_5_vl, qwen_vit

B, V, IMAGE = 2, 2, 120  # rows, pairs of frames, the token of a patch
M = V * 2 * 2
VGGT = {
  "width": 16,
  "depth": 1,
  "heads": 2,
  "patch": 4,
  "image_size": 16,
  "vit_depth": 1,
  "vit_heads": 2,
  "layer_scale": 1.0,
  "token_std": 0.02,
}
DUAL = {"vggt": VGGT, "stages": ("fuse",)}
SVA = {"vggt": VGGT, "sva": {"width": 16, "depth": 1, "heads": 2}}
LIFT = {"lift": {"level": True, "samples": 2, "waves": 2}}
FORCING = {
  "align": {"layer": 1, "width": 32},
  "teacher": {**VGGT, "keep": (0,)},
}
PRUNE = {"vit": {"prune": {"drop": 0.5, "after": 0}}}
TOGETHER = {
  "spatial_mllm_with_stts": (DUAL, PRUNE),
  "llava_3d_on_qwen": (LIFT,),
  "forcing_without_a_second_encoder": (FORCING,),
  "cambrian_with_lifting_and_pruning": (SVA, LIFT, PRUNE),
}
NEW = {"vggt", "connector", "sva", "lift", "align", "teacher"}


def build(*mechanisms):
  c = ConfigDict({"model_name": "mechanisms", "batch_size": B})
  c.data = {"length": M + 8}
  c.model = {"variant": "tiny", "grid": (V, 4, 4)}
  c.model.vit = {"layers": 3, "window": 0, "width": 16}
  for mechanism in mechanisms:
    c.model.update(mechanism)
  model, mod = models.build(c)
  rng = np.random.default_rng(0)
  batch = {
    name: rng.random(x.shape).astype(x.dtype)
    for name, x in mod.INPUTS(c).items()
  }
  words = rng.integers(1, 100, (B, M + 8), np.int32)
  batch["tokens"] = np.where(np.arange(M + 8) < M, IMAGE, words)
  place = np.arange(M + 8, dtype=np.int32)
  batch["positions"] = np.broadcast_to(place, (B, 3, M + 8))
  batch["segments"] = np.ones((B, M + 8), np.int32)
  batch["shared"][:] = False
  batch["labels"] = np.roll(batch["tokens"], -1, axis=1)
  batch["loss_weight"] = np.where(np.arange(M + 8) < M, 0, batch["loss_weight"])
  batch["frames"] = rng.integers(0, 255, batch["frames"].shape, np.uint8)
  if "depth" in batch:
    batch["depth"] += 1
    batch["intrinsics"][:] = camera.intrinsics(16, 16, 90)
    turn = np.arange(2 * V)
    batch["world_from_camera"][:] = camera.from_heading(
      np.ones((2 * V, 3)), turn, -0.2 * np.ones(2 * V)
    )
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), **mod.arguments(batch))["params"]
  )

  def fill(name, x):
    if name.endswith("scale"):
      return np.ones(x.shape, x.dtype)
    fan = x.shape[-2] if name.endswith("kernel") else 16
    return (rng.standard_normal(x.shape) / fan**0.5).astype(x.dtype)

  return model, mod, trees.map_names(fill, shapes), batch


@pytest.mark.parametrize("name", TOGETHER)
def test_mechanisms_train_together_by_config_alone(name):
  model, mod, params, batch = build(*TOGETHER[name])
  asked = set().union(*TOGETHER[name])
  asked |= {"connector"} if "stages" in asked else set()
  assert params.keys() - {"vit", "llm"} == asked & NEW
  assert ("scorer" in params["vit"]) == ("vit" in asked)

  @jax.jit
  def run(params):
    def loss(params):
      value, (metrics, out) = mod.loss(model, params, batch, rngs={})
      return value, (metrics.get("align"), out.get("llm/order"))

    return jax.value_and_grad(loss, has_aux=True)(params)

  losses = []
  for _ in range(3):  # the third sees what two steps have changed
    (value, (align, order)), grads = run(params)
    losses.append(float(value))
    # On the host: a kernel for each leaf would take longer to compile.
    grads = jax.tree.map(np.asarray, grads)
    rate = 0.03 / sum(np.sum(g * g) for g in jax.tree.leaves(grads)) ** 0.5
    update = functools.partial(lambda rate, p, g: p - rate * g, rate)
    params = jax.tree.map(update, params, grads)
  assert losses[2] < losses[0]
  for part in asked & NEW | {"vit", "llm"}:
    learns = any(np.any(g) for g in jax.tree.leaves(grads[part]))
    assert learns == (part != "teacher"), part
  assert (align is not None) == ("align" in asked)
  if "vit" in asked:
    assert order.shape == (B, M + 8 - M // 2)


def test_without_mechanisms_it_is_qwen2_5_vl():
  model, mod, params, batch = build()
  kwargs = mod.arguments(batch)
  frames = np.asarray(kwargs.pop("frames"), np.float32) / 255
  frames = qwen_vit.normalise(frames)
  vit = qwen_vit.Model(**model.vit)
  sizes = {"patch": vit.patch, "temporal_patch": vit.temporal_patch}
  patches = np.stack([vision.patchify(x, **sizes) for x in frames])
  names = ("vit", "llm", "grid", "image_token", "video_token")
  same = qwen2_5_vl.Model(**{name: getattr(model, name) for name in names})

  @jax.jit
  def both(params):
    return (
      model.apply({"params": params}, **mod.arguments(batch))[0],
      same.apply({"params": params}, **kwargs, patches=patches)[0],
    )

  np.testing.assert_allclose(*both(params), rtol=1e-5, atol=1e-5)


def test_forcing_leaves_no_trace_in_the_inference_program():
  def program(*mechanisms):
    model, mod, params, batch = build(*mechanisms)
    params = {k: x for k, x in params.items() if k not in ("align", "teacher")}
    run = jax.jit(
      lambda p: model.apply({"params": p}, **mod.arguments(batch))[0]
    )
    return run.lower(params).as_text()

  assert program(FORCING) == program()


def test_what_does_not_fit_together_is_said():
  for mechanism, message in (
    ({"vggt": VGGT}, "stages and sva read"),
    ({"stages": ("fuse",)}, "stages and sva read"),
    ({"lift": {"pool": "voxel"}}, "tokens are not pooled"),
    ({"teacher": {**VGGT, "keep": (0,)}}, "needs config.model.align"),
  ):
    with pytest.raises(ValueError, match=message):
      build(mechanism)
  model, mod, params, batch = build(LIFT)
  del batch["depth"]
  with pytest.raises(ValueError, match=r"render\.depth"):
    jax.eval_shape(
      lambda: model.apply({"params": params}, **mod.arguments(batch))
    )
