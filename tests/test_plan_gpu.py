# SPDX-License-Identifier: Apache-2.0
"""A step of few layers, compiled for a GPU that isn't here."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from configs import qwen2_5_vl_sft
from spatial_jax import plan, sharding
from spatial_jax.nn import attention
from spatial_jax.plan import chips


def has_compiler() -> bool:
  try:
    return importlib.util.find_spec("jax_plugins.xla_cuda13") is not None
  except ModuleNotFoundError:
    return False


# 4 GB with CUDA's libraries, so that what the tests install leaves it out.
pytestmark = pytest.mark.skipif(
  not has_compiler(),
  reason="jax's CUDA plugin isn't installed: pip install 'spatial-jax[cuda]'",
)


@pytest.mark.parametrize("kind", ["a100", "h200"])
def test_cudnn_reads_no_mask_where_rows_are_causal(kind):
  mesh = sharding.mesh(devices=chips.devices(chips.parse(f"{kind}:1")))
  x = jax.ShapeDtypeStruct((2, 512, 8, 128), jnp.bfloat16)
  segments = jax.ShapeDtypeStruct((2, 512), jnp.int32)

  def total(q, k, v, segments):
    mask = attention.packed_mask(segments, segments)
    out = attention.attention(q, k, v, mask, causal=True)
    return jnp.sum(out.astype(jnp.float32))

  def odd(q, k, v):
    return jnp.sum(attention.attention(q, k, v).astype(jnp.float32))

  with jax.set_mesh(mesh):
    rows = sharding.batch_sharding(mesh)
    # A frame of a tower, with gradients.
    frame = jax.ShapeDtypeStruct((2, 729, 16, 72), jnp.bfloat16, sharding=rows)
    jax.jit(jax.grad(odd, (0, 1, 2))).lower(frame, frame, frame).compile()
    x, segments = (a.update(sharding=rows) for a in (x, segments))
    gradient = jax.jit(jax.grad(total, (0, 1, 2)))
    text = gradient.lower(x, x, x, segments).compile().as_text()
  calls = [line for line in text.splitlines() if "__cudnn$fmha" in line]
  assert len(calls) == 4  # two branches, forward and backward
  causal = [line for line in calls if "PADDING_CAUSAL" in line]
  assert len(causal) == 2
  assert not any("[2,1,512,512]" in line for line in causal)


def test_a_step_and_its_generation_compile():
  config = qwen2_5_vl_sft.get_config("variant=3b")
  config.batch_size = 2
  config.data.length, config.model.loss_tokens = 512, 256
  config.data.layout.update(
    {"patches": 1024, "frames": 2, "frame_patches": 512, "windows": 32}
  )
  config.model.llm = ConfigDict({"layers": 2})
  config.model.vit = ConfigDict({"layers": 2, "full_layers": (1,)})
  found = plan.main(config, topology="h200:1")
  assert found.fits and found.compiled
  state = found.parameters + found.optimizer
  assert state < found.peak < 3 * state
  found = plan.main(config, topology="h200:1", serve=True)
  assert found.fits and all(p.compiled for p in found.phases.values())
