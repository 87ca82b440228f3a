# SPDX-License-Identifier: Apache-2.0
"""The library equals reference implementations on recorded cases.

`pytest tests/test_golden.py --cases DIR` runs every folder below DIR that has a
config.json. It names a system and an entry; the adapter of that pair computes
the case with the library and returns what to compare. A line is printed for
each output: `system/case output max_abs max_rel PASS|FAIL`.

See `adapters` for how one is written.
"""

import json
import pathlib
import re

import numpy as np
import pytest

from tests.adapters import ADAPTERS, TOLERANCES

TOLERANCE = 1e-4  # of the largest number in float32; integers exactly


def pytest_generate_tests(metafunc):
  root = pathlib.Path(metafunc.config.getoption("--cases"))
  folders = sorted(path.parent for path in root.rglob("config.json"))
  names = [str(folder.relative_to(root)) for folder in folders]
  metafunc.parametrize("folder", folders, ids=names)


def differences(got, want):
  """Largest absolute difference, and that relative to the largest number."""
  if got.shape != want.shape:
    return float("inf"), float("inf")
  got, want = got.astype(np.float64), want.astype(np.float64)
  absolute = np.max(np.abs(got - want), initial=0.0)
  return absolute, absolute / max(np.max(np.abs(want), initial=0.0), 1e-30)


def test_outputs_equal_those_of_the_reference(folder, request):
  config = json.loads((folder / "config.json").read_text())
  system, entry = config["system"], config["entry"]
  adapter = ADAPTERS.get((system, entry))
  if adapter is None:
    print(f"MISSING {system}/{entry}")
    if request.config.getoption("--strict-cases"):
      pytest.fail(f"no adapter for {system}/{entry}")
    pytest.skip(f"no adapter for {system}/{entry}")
  got, want = adapter(folder, config)
  names = sorted(got.keys() & want.keys())
  assert names, "the adapter compares nothing"
  limits = TOLERANCES.get((system, entry), ())
  failed = []
  for name in names:
    absolute, relative = differences(got[name], want[name])
    exact = np.issubdtype(want[name].dtype, np.integer)
    limit = next((x for r, x in limits if re.fullmatch(r, name)), None)
    passed = absolute == 0 if exact else relative <= TOLERANCE
    if limit is not None:
      passed = absolute <= limit
    verdict = "PASS" if passed else "FAIL"
    print(
      f"{system}/{folder.name} {name} {absolute:.1e} {relative:.1e} {verdict}"
    )
    failed += [] if passed else [name]
  assert not failed
