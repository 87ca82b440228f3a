# SPDX-License-Identifier: Apache-2.0
"""A step at full width, of few layers, compiled for TPUs that aren't here."""

import importlib.util

import pytest
from ml_collections import ConfigDict

from configs import qwen2_5_vl_sft
from spatial_jax import plan

# libtpu is 0.6 GB, and jax and libtpu must match: what the tests install leaves
# it out. `pip install 'spatial-jax[tpu]'` runs this.
pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu isn't installed: pip install 'spatial-jax[tpu]'",
)


def test_full_width_step_compiles_as_predicted():
  config = qwen2_5_vl_sft.get_config("variant=3b")
  config.model.llm = ConfigDict({"layers": 2})
  config.model.vit = ConfigDict({"layers": 2, "full_layers": (1,)})
  found = plan.main(config, topology="v5e:4x4")
  assert found.fits and found.compiled
  # Nothing but weights and their gradients is moved: no activation, no score.
  assert abs(found.difference) <= 0.02
  assert not {"all-to-all", "collective-permute"} & found.collectives.keys()
  # 2 layers, the table and the merger: 12 bytes for each parameter trained, on
  # one of 16 devices.
  assert 0.2 < (found.parameters + found.optimizer) / 2**30 < 1
