# SPDX-License-Identifier: Apache-2.0
"""Attention kernels of accelerators against plain attention, on CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from spatial_jax import sharding
from spatial_jax.nn import attention, kernels


def arrays(seed, B, T, S, N, K, H):
  rng = np.random.default_rng(seed)
  shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
  return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)


def packed(T):
  """Two rows: three segments with a shared prefix and padding; one segment."""
  cut = np.repeat([1, 2, 3, 0], [T // 3, T // 4, T // 4, T - T // 3 - T // 2])
  segments = jnp.asarray([cut[:T], np.ones(T, int)])
  shared = jnp.arange(T)[None] < jnp.asarray([[9], [0]])
  return attention.packed_mask(segments, segments, shared)


def test_splash_equals_plain_attention(monkeypatch):
  monkeypatch.setattr(kernels, "_MASKED_BLOCK", 128)  # two blocks of rows
  # A head size of a tower, rows that don't fill a block, grouped heads; keys
  # of one row are all hidden.
  T, S = 200, 130
  keys = np.zeros((2, 1, S), bool)
  keys[0, 0, :70] = True
  cases = (
    (arrays(0, 2, T, T, 4, 2, 72), packed(T)),
    (arrays(1, 2, T, S, 2, 2, 16), jnp.asarray(keys)),
    (arrays(2, 1, T, S, 2, 1, 16), None),
  )

  def run(kind):
    def total(inputs):
      outs = [
        kernels.splash(*x, mask, interpret=True)
        if kind == "splash"
        else attention.attention(*x, mask)
        for x, (_, mask) in zip(inputs, cases, strict=True)
      ]
      return sum(jnp.sum(jnp.sin(out)) for out in outs), outs

    return jax.jit(jax.grad(total, has_aux=True))([x for x, _ in cases])

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5),
    run("splash"),
    run("xla"),
  )


def test_splash_on_a_mesh_of_all_axes():
  mesh = sharding.mesh(data=2, fsdp=1, tensor=2, context=2)
  T = 256
  inputs, mask = arrays(3, 2, T, T, 4, 2, 16), packed(T)
  want = attention.attention(*inputs, mask)
  with jax.set_mesh(mesh):
    got = jax.jit(
      lambda q, k, v, m: kernels.splash(q, k, v, m, interpret=True)
    )(*inputs, mask)
  np.testing.assert_allclose(got, want, atol=3e-5)


def test_cudnn_is_told_what_a_causal_mask_hides(monkeypatch):
  T = 24
  told = []

  def plain(*heads, implementation, **more):
    assert implementation == "cudnn"
    assert not any(x.shape[1] % 2 for x in heads)  # it would refuse
    told.append("is_causal" in more)
    return dot_product_attention(*heads, implementation="xla", **more)

  dot_product_attention = jax.nn.dot_product_attention
  monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
  behind = jnp.asarray([[1] * T, [1] * 17 + [0] * 7, [0] * T])
  before = jnp.asarray([[0] * 5 + [1] * (T - 5)] * 3)
  parts = jnp.asarray([[1] * 9 + [2] * (T - 9)] * 3)
  masks = [attention.packed_mask(x, x) for x in (behind, before, parts)]
  masks += [masks[0][:1], masks[0] | True]
  inputs = arrays(4, 3, T, T, 4, 2, 16)
  cases = [(inputs, mask, True) for mask in masks]
  few = tuple(x[:, :-5] for x in inputs)
  cases += [(few, masks[1][:, :-5, :-5], True), (few, None, False)]
  keys = jnp.asarray(behind[:, None, :-5], bool)
  cases += [(few, keys, False), ((inputs[0], *few[1:]), None, False)]

  def total(heads, read, mask):
    out = read(*heads, mask)
    return jnp.sum(jnp.sin(out)), out

  for heads, mask, causal in cases:
    got, want = (
      jax.jit(jax.grad(total, has_aux=True), static_argnums=1)(
        heads, read, mask
      )
      for read in (
        functools.partial(kernels.cudnn, causal=causal),
        attention.attention,
      )
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), got, want
    )
  assert set(told) == {True, False}  # both branches
  taken = [bool(kernels._causal_lengths(mask)[1]) for mask in masks]
  assert taken == [True, False, False, True, False]


@pytest.mark.parametrize(
  "length, want", [(64, 128), (1564, 1664), (3584, 3584), (25104, 25600)]
)
def test_blocks_pad_little(length, want):
  longest = length if length <= 1664 else 1024
  size, padded = kernels.blocks(length, longest)
  assert padded == want and padded % size == 0 and size % 128 == 0


def test_the_mesh_chooses_and_not_the_backend():
  long = jax.ShapeDtypeStruct((1, 512, 2, 64), jnp.bfloat16)
  short = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)
  token = jax.ShapeDtypeStruct((1, 1, 2, 64), jnp.bfloat16)
  assert attention.choose(long, long) == "xla"  # no mesh
  kinds = {}
  for platform in ("tpu", "gpu", "cpu"):
    mesh = AbstractMesh(
      (1,),
      ("data",),
      axis_types=(AxisType.Auto,),
      abstract_device=jax.sharding.AbstractDevice(
        platform, num_cores=1, platform=platform
      ),
    )
    with jax.sharding.use_abstract_mesh(mesh):
      kinds[platform] = attention.choose(long, long)
      window = "cudnn" if platform == "gpu" else "xla"
      assert attention.choose(short, short) == window
      assert attention.choose(short, short, has_mask=True) == "xla"
      assert attention.choose(token, short) == "xla"  # a token's
      assert attention.choose(long, long, has_bias=True) == "xla"
  assert kinds == {"tpu": "splash", "gpu": "cudnn", "cpu": "xla"}
