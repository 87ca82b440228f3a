# SPDX-License-Identifier: Apache-2.0
"""Trees of arrays as flat dictionaries: names, regex rules, counts, diffs.

A leaf's name is its path joined by "/", for instance
"llm/blocks/attention/query/kernel".
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax


def path_name(path: Iterable[Any]) -> str:
  """Name of a leaf from the key path that jax.tree_util gives."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Any) -> dict[str, Any]:
  """Leaves by name, in the order of the tree."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {path_name(path): leaf for path, leaf in leaves}


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Nested dictionaries from names; the inverse of flatten for dicts."""
  tree: dict[str, Any] = {}
  for name, leaf in leaves.items():
    *parents, last = name.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def map_names(fn, tree: Any, *rest: Any) -> Any:
  """Like jax.tree.map, but fn gets the leaf's name first."""
  return jax.tree_util.tree_map_with_path(
    lambda path, *leaves: fn(path_name(path), *leaves), tree, *rest
  )


def match(
  tree: Any, rules: Iterable[tuple[str, Any]], what: str = "rules"
) -> Any:
  """Value of the first rule whose regex matches the whole name of each leaf.

  Raises one error that lists every leaf without a rule and every rule that
  matches no leaf at all: both are nearly always typing errors.
  """
  rules = tuple(rules)
  compiled = [(re.compile(pattern), value) for pattern, value in rules]
  names = list(flatten(tree))
  chosen = {
    name: next(
      (i for i, (regex, _) in enumerate(compiled) if regex.fullmatch(name)),
      None,
    )
    for name in names
  }
  lost = [name for name, i in chosen.items() if i is None]
  idle = [
    pattern
    for (regex, _), (pattern, _) in zip(compiled, rules, strict=True)
    if not any(regex.fullmatch(name) for name in names)
  ]
  if lost or idle:
    lines = [f"{what} do not fit the parameters:"]
    lines += [f"  no rule matches {name!r}" for name in lost]
    lines += [f"  rule {pattern!r} matches no parameter" for pattern in idle]
    lines += ["  the parameters are: " + ", ".join(names)] if idle else []
    raise ValueError("\n".join(lines))
  return map_names(lambda name, _: compiled[chosen[name]][1], tree)


def count(tree: Any) -> int:
  """Number of elements of all leaves (arrays or abstract shapes)."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def diff(got: Any, want: Any) -> str:
  """What differs in names, shapes and dtypes; empty when nothing does."""
  got, want = flatten(got), flatten(want)
  lines = [f"missing: {name}" for name in want if name not in got]
  lines += [f"unexpected: {name}" for name in got if name not in want]
  for name in got.keys() & want.keys():
    a, b = got[name], want[name]
    if (tuple(a.shape), a.dtype) != (tuple(b.shape), b.dtype):
      lines.append(
        f"{name}: got {a.dtype}{list(a.shape)}, "
        f"expected {b.dtype}{list(b.shape)}"
      )
  return "\n".join(sorted(lines))


def is_on_host(x: Any) -> bool:
  """Whether `np.asarray` reads it in place: NumPy's, or of one CPU device."""
  if not isinstance(x, jax.Array):
    return True
  devices = x.devices()
  return len(devices) == 1 and {d.platform for d in devices} == {"cpu"}
