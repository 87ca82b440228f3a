# SPDX-License-Identifier: Apache-2.0
"""Layers that every model shares: linear, norms, MLPs, embedding.

Parameters are plain float32 arrays with 2-D kernels (in, out). `dtype` is the
dtype that a layer computes in.

Letters: B batch, T length, D width, M mlp width, V vocabulary, r adapter rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from spatial_jax import sharding
from spatial_jax.types import Array, Float, Int


def scan_layers(block: Any, length: int, **kwargs: Any) -> Any:
  """`nn.scan` of a block, with a stack of parameters [length ...].

  What blocks sow is stacked as well. It is traced once less than by default,
  which would look for outputs that are the same for all layers; no block here
  has any.
  """
  return nn.scan(
    block,
    variable_axes={"params": 0, "intermediates": 0},
    split_rngs={"params": True},
    length=length,
    check_constancy_invariants=False,
    **kwargs,
  )


def fan_in_init(
  key: Array, shape: Sequence[int], dtype: Any = jnp.float32
) -> Array:
  """Truncated normal of variance 1 / fan in, all axes but the last."""
  # Drawn as a matrix: XLA takes seconds to compile random convolutions for CPU.
  flat = math.prod(shape[:-1]), shape[-1]
  return nn.initializers.lecun_normal()(key, flat, dtype).reshape(shape)


class Dense(nn.Module):
  """Linear layer on the last axis.

  Where the parameters hold lora_a [D r], lora_b [r E] and lora_scale [] beside
  the kernel (see `lora.py`), scale * (x @ a) @ b is added.
  """

  features: int
  use_bias: bool = True
  dtype: str = "float32"
  kernel_init: Callable = fan_in_init

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... E"]:
    shape = (x.shape[-1], self.features)
    kernel = self.param("kernel", self.kernel_init, shape)
    # Weight gradients of matrices are 1.5 times faster on CPU than those of
    # batches of matrices.
    flat = x.reshape(-1, x.shape[-1]).astype(self.dtype)
    name = "/".join((*self.path, "kernel"))
    y = flat @ sharding.whole(kernel.astype(self.dtype), name)
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,))
      y = y + bias.astype(self.dtype)[None]
    if self.has_variable("params", "lora_a"):
      y = y + self._adapt(flat)
    return y.reshape(*x.shape[:-1], self.features)

  def _adapt(self, x):
    a, b, scale = (
      self.get_variable("params", f"lora_{name}").astype(self.dtype)
      for name in ("a", "b", "scale")
    )
    if self.has_variable("params", "lora_dropout"):
      x = _drop(x, **self.get_variable("params", "lora_dropout"))
    return jax.lax.stop_gradient(scale) * ((x @ a) @ b)


def _drop(x, key, rate):
  """Zeros a share `rate` of the numbers, and scales the others up."""
  keep = jax.random.bernoulli(jax.random.wrap_key_data(key), 1 - rate, x.shape)
  return jnp.where(keep, x / (1 - rate).astype(x.dtype), jnp.zeros_like(x))


def adapted_kernel(layer: Mapping[str, Array]) -> Float[Array, "*l D E"]:
  """Kernel of a `Dense`'s parameters with its adapter, if any, added."""
  kernel = layer["kernel"]
  if "lora_a" not in layer:
    return kernel
  a, b, scale = (
    layer[f"lora_{name}"].astype(jnp.float32) for name in ("a", "b", "scale")
  )
  scale = jax.lax.stop_gradient(scale)[..., None, None]
  # Once, and published: not in the few bits that an accelerator likes best.
  added = scale * jnp.matmul(a, b, precision="highest")
  return (kernel.astype(jnp.float32) + added).astype(kernel.dtype)


class RMSNorm(nn.Module):
  """Division by the root mean square, in float32, then offset + scale."""

  eps: float = 1e-6
  dtype: str = "float32"
  offset: float = 0.0  # 1: the parameter is what the factor has above one

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    init = nn.initializers.constant(1 - self.offset)
    scale = self.param("scale", init, (x.shape[-1],)).astype(jnp.float32)
    scale = scale + self.offset if self.offset else scale
    scale = jnp.expand_dims(scale, range(x.ndim - 1))
    return (_over_rms(x, self.eps) * scale).astype(self.dtype)


class AdaptiveRMSNorm(nn.Module):
  """RMS norm whose scale and shift, and a gate, follow from a condition.

  The gate is for what the caller adds to the residual stream. All three start
  at zero, so that a new block adds nothing.
  """

  eps: float = 1e-6
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], condition: Float[Array, "B C"]
  ) -> tuple[Float[Array, "B T D"], Float[Array, "B 1 D"]]:
    rows = Dense(
      3 * x.shape[-1],
      dtype=self.dtype,
      kernel_init=nn.initializers.zeros,
      name="modulation",
    )(condition)
    scale, shift, gate = jnp.split(rows[:, None], 3, axis=-1)
    y = _over_rms(x, self.eps) * (1 + scale.astype(jnp.float32))
    return (y + shift.astype(jnp.float32)).astype(self.dtype), gate


def _over_rms(x, eps):
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


class LayerNorm(nn.Module):
  """Zero mean and unit variance, in float32, then a scale and a bias."""

  eps: float = 1e-6
  dtype: str = "float32"

  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    return self.affine(standardized(x, self.eps))

  @nn.compact
  def affine(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Of standardized numbers, where several norms share them."""

    def row(name, init):
      value = self.param(name, init, (x.shape[-1],)).astype(jnp.float32)
      return jnp.expand_dims(value, range(x.ndim - 1))

    scale = row("scale", nn.initializers.ones)
    bias = row("bias", nn.initializers.zeros)
    return (x * scale + bias).astype(self.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def standardized(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
  """Zero mean and unit variance along the last axis, float32."""
  return _over_deviation(x, eps)[0]


def _over_deviation(x, eps):
  x = x.astype(jnp.float32)
  y = x - jnp.mean(x, axis=-1, keepdims=True)
  factor = jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  return y * factor, factor


@standardized.defjvp
def _(eps, primals, tangents):
  """Both means in one pass.

  Of the steps above one by one, the gradient is two passes, and the second
  waits for the first: that the result has no mean is not seen there.
  """
  y, factor = _over_deviation(*primals, eps)
  t = tangents[0].astype(jnp.float32) * factor
  mean = functools.partial(jnp.mean, axis=-1, keepdims=True)
  return y, t - mean(t) - y * mean(y * t)


class Scale(nn.Module):
  """A learned factor for each channel ("layer scale")."""

  init: float = 1.0
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    init = nn.initializers.constant(self.init)
    scale = self.param("scale", init, (x.shape[-1],)).astype(self.dtype)
    return x * jnp.expand_dims(scale, range(x.ndim - 1))


def _rounded_once(function: Callable[[Array], Array]) -> Callable:
  """An element-wise function in float32, of the input's dtype.

  So PyTorch computes them. With each step rounded to bfloat16, two in five
  numbers would differ, and the lower tail of tanh's GELU by all of its size. A
  gradient then keeps the slope alone. Float32 has nothing to round.
  """

  def both(x):
    y = x.astype(jnp.float32)
    value, slope = jax.jvp(function, (y,), (jnp.ones_like(y),))
    return value.astype(x.dtype), slope.astype(x.dtype)

  @jax.custom_jvp
  def rounded(x):
    return both(x)[0]

  @rounded.defjvp
  def _(primals, tangents):
    value, slope = both(*primals)
    return value, slope * tangents[0]

  def apply(x):
    is_half = x.dtype in (jnp.bfloat16, jnp.float16)
    return rounded(x) if is_half else function(x)

  return apply


silu = _rounded_once(nn.silu)
gelu_tanh = _rounded_once(functools.partial(nn.gelu, approximate=True))
# x times the normal distribution's share below x, by the error function. By its
# complement, as in `nn.gelu`, programs are longer in front of most products.
gelu = _rounded_once(lambda x: x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5)))


def activation(name: str) -> Callable[[Array], Array]:
  """The function of a published name: "gelu" is the exact one."""
  functions = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    # Published in two steps, each of the input's dtype.
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "silu": silu,
    "relu": nn.relu,
  }
  if name not in functions:
    raise ValueError(
      f"activation {name!r} is unknown; use one of {', '.join(functions)}"
    )
  return functions[name]


class Mlp(nn.Module):
  """down(activation(up(x)))."""

  width: int
  activation: str = "gelu"
  use_bias: bool = True
  dtype: str = "float32"
  out_width: int = 0  # 0: that of the input

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... E"]:
    y = Dense(self.width, self.use_bias, self.dtype, name="up")(x)
    y = activation(self.activation)(y)
    width = self.out_width or x.shape[-1]
    return Dense(width, self.use_bias, self.dtype, name="down")(y)


class GatedMlp(nn.Module):
  """down(activation(gate(x)) * up(x))."""

  width: int
  use_bias: bool = False
  dtype: str = "float32"
  activation: str = "silu"
  out_width: int = 0  # 0: that of the input

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... E"]:
    def dense(features, name):
      return Dense(features, self.use_bias, self.dtype, name=name)

    gate = activation(self.activation)(dense(self.width, "gate")(x))
    width = self.out_width or x.shape[-1]
    return dense(width, "down")(gate * dense(self.width, "up")(x))


class Embed(nn.Module):
  """Table of vectors, which may also serve as the output projection."""

  count: int
  width: int
  std: float = 0.02
  # Gradients of a gather are scatters, which are slow on CPU: a small table is
  # better read by a matrix product.
  one_hot: bool = False
  dtype: str = "float32"
  scale: float = 1.0  # of what is read; the projection is as the table is
  extra: int = 0  # rows of a second table "new", which the projection lacks

  def setup(self) -> None:
    init = nn.initializers.normal(self.std)
    self.embedding = self.param("embedding", init, (self.count, self.width))
    if self.extra:
      self.new = Embed(self.extra, self.width, self.std, True, self.dtype)

  def __call__(self, ids: Int[Array, "*b"]) -> Float[Array, "*b D"]:
    table = self.embedding.astype(self.dtype)
    if self.extra:
      is_new = ids >= self.count
      x = lookup(table, jnp.where(is_new, 0, ids), one_hot=self.one_hot)
      new = self.new(jnp.where(is_new, ids - self.count, 0))
      x = jnp.where(is_new[..., None], new, x)
    else:
      x = lookup(table, ids, one_hot=self.one_hot)
    return x if self.scale == 1 else x * jnp.asarray(self.scale, x.dtype)

  def attend(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Logits of a tied head."""
    flat = x.reshape(-1, x.shape[-1]).astype(self.dtype)
    logits = flat @ self.embedding.astype(self.dtype).T
    return logits.reshape(*x.shape[:-1], self.count)


def lookup(
  table: Float[Array, "V D"], ids: Int[Array, "*b"], *, one_hot: bool = False
) -> Float[Array, "*b D"]:
  """Rows of a table."""
  if not one_hot:
    return _take(table, ids)
  hot = jax.nn.one_hot(ids.reshape(-1), table.shape[0], dtype=table.dtype)
  rows = jnp.matmul(hot, table, precision="highest")  # rows as they are
  return rows.reshape(*ids.shape, table.shape[1])


def _take(table, ids):
  rows = sharding.rows_alone(ids.shape[0]) if ids.ndim > 1 else None
  if not rows:
    return jnp.take(table, ids, axis=0)

  # Left to itself, the compiler gathers the gradients of all rows everywhere.
  # The way there is its own: a table in parts isn't gathered to be read.
  @jax.custom_vjp
  def take(table, ids):
    return jnp.take(table, ids, axis=0)

  def backward(ids, gradient):
    def own(ids, gradient):
      zeros = jnp.zeros(table.shape, table.dtype)
      return jax.lax.psum(zeros.at[ids].add(gradient), rows[0])

    add = jax.shard_map(own, in_specs=(rows, rows), out_specs=P())
    return add(ids, gradient), None

  take.defvjp(lambda table, ids: (take(table, ids), ids), backward)
  return take(table, ids)
