# SPDX-License-Identifier: Apache-2.0
"""A step at full width, of few layers, compiled for TPUs that aren't here."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from configs import qwen2_5_vl_sft
from spatial_jax import plan, sharding
from spatial_jax.nn import kernels
from spatial_jax.plan import chips

# libtpu is 0.6 GB, and jax and libtpu must match: what the tests install leaves
# it out. `pip install 'spatial-jax[tpu]'` runs this.
pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu isn't installed: pip install 'spatial-jax[tpu]'",
)


@pytest.mark.parametrize("heads, size", [(32, 128), (16, 64)])
def test_a_masked_kernel_fits_a_core(heads, size):
  # Blocks of scores and of the mask, which the compiler can't see through.
  mesh = sharding.mesh(devices=chips.devices(chips.parse("v5p:2x2x1")))
  x = jax.ShapeDtypeStruct((4, 4096, heads, size), jnp.bfloat16)
  mask = jax.ShapeDtypeStruct((4, 4096, 4096), jnp.bool_)

  def total(q, k, v, mask):
    return jnp.sum(kernels.splash(q, k, v, mask).astype(jnp.float32))

  with jax.set_mesh(mesh):
    rows = sharding.batch_sharding(mesh)
    arguments = (x.update(sharding=rows),) * 3, mask.update(sharding=rows)
    gradient = jax.jit(jax.grad(total, (0, 1, 2)))
    gradient.lower(*arguments[0], arguments[1]).compile()


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
@pytest.mark.parametrize("tokens", [1374, 1569, 3000])
def test_padded_rows_fit_a_core(topology, tokens):
  # Frames of VGGT at 518 x 518 and 476 x 644, rows of more than one block.
  mesh = sharding.mesh(devices=chips.devices(chips.parse(topology)))
  x = jax.ShapeDtypeStruct((4, tokens, 16, 64), jnp.bfloat16)

  def total(q, k, v):
    return jnp.sum(kernels.splash(q, k, v).astype(jnp.float32))

  with jax.set_mesh(mesh):
    x = x.update(sharding=sharding.batch_sharding(mesh))
    for function in (total, jax.grad(total, (0, 1, 2))):
      jax.jit(function).lower(x, x, x).compile()


def test_full_width_step_compiles_as_predicted():
  config = qwen2_5_vl_sft.get_config("variant=3b")
  # What takes time is the number of different layers and their width.
  config.data.length, config.model.loss_tokens = 512, 256
  config.data.layout.update(
    {"patches": 1024, "frames": 2, "frame_patches": 512, "windows": 32}
  )
  config.model.llm = ConfigDict({"layers": 2})
  config.model.vit = ConfigDict({"layers": 2, "full_layers": (1,)})
  found = plan.main(config, topology="v5e:4x4")
  assert found.fits and found.compiled
  # Nothing but weights and their gradients is moved: no activation, no score.
  assert abs(found.difference) <= 0.02
  assert "all-to-all" not in found.collectives
  # The last of 16 steps of the rings that sum a gradient in parts.
  _, passed = found.collectives.get("collective-permute", (0, 0))
  _, summed = found.collectives.get("reduce-scatter", (0, 0))
  assert passed <= 1.001 * summed / 16
  # 2 layers, the table and the merger: 12 bytes for each parameter trained, on
  # one of 16 devices.
  assert 0.2 < (found.parameters + found.optimizer) / 2**30 < 1
