# SPDX-License-Identifier: Apache-2.0
"""Steering: the ordering that image tokens carry, amplified in all of them.

For the columns w of a probe, at image tokens only, before the first block:

  h <- h + alpha * sum_w (h.w) / (|w|^2 + 1e-8) * w

A token's own component grows and keeps its sign; nothing constant is added.
Columns are not orthogonalised and the bias is not used, as in the code of arXiv
2603.22278. `alpha` may be traced: a sweep is a `vmap` over it.

Two ways to count what that does:
- `paper_protocol`: only failures are run again, and alpha is the best for the
  very failures it is scored on. What steering breaks isn't seen.
- `honest_protocol`: everything is run again; alpha is chosen on other items.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from spatial_jax.nn import edit
from spatial_jax.types import Array, Bool, Float, Int

ALPHAS = tuple(range(16))


def steer(
  hidden: Float[Array, "B T D"],
  mask: Bool[Array, "B T"],
  kernel: Float[Array, "D C"],
  alpha: Float[Array, ""] | float,
) -> Float[Array, "B T D"]:
  """Amplifies a probe's directions where the mask is True.

  In a model: `edits={"llm": amplify(mask, kernel, alpha)}`.
  """
  return edit.apply(amplify(mask, kernel, alpha), hidden, 0)


def amplify(
  mask: Bool[Array, "B T"],
  kernel: Float[Array, "D C"],
  alpha: Float[Array, ""] | float,
  slot: Int[Array, ""] | int = 0,
) -> edit.Edit:
  """The edit that steers; alpha 0 leaves every bit as it is."""
  return edit.Edit(slot, mask, amplify=kernel.T, alpha=alpha)


def remove(
  hidden: Float[Array, "*n D"],
  mask: Bool[Array, "*n"],
  kernel: Float[Array, "D C"],
) -> Float[Array, "*n D"]:
  """Takes all of a probe's directions out where the mask is True."""
  basis, _ = jnp.linalg.qr(kernel)
  along = jnp.einsum("...d,dc->...c", hidden, basis, precision="highest")
  rest = hidden - jnp.einsum("...c,dc->...d", along, basis).astype(hidden.dtype)
  return jnp.where(mask[..., None], rest, hidden)


def strict(right: Bool[Array, "*n orders"]) -> Bool[np.ndarray, "*n"]:
  """Items answered rightly whatever the order of the options."""
  return np.asarray(right).all(-1)


def paper_protocol(right: Bool[Array, "A N orders"]) -> dict:
  """Fixes by alpha as the paper counts them.

  Args:
    right: for alphas 0, 1, ...: whether each item's answer is right in either
      order of options. Row 0 is the model as it is.

  Returns:
    `before` (strict accuracy), `fix_rate` [A] (share of failures of which every
    failed order is right now), `best_alpha` (its index), `after` (accuracy
    with the fixes at best alpha added), `oracle` (with each item's best alpha).
  """
  right = np.asarray(right)
  was = strict(right[0])
  # An order that was right before isn't looked at again.
  fixed = ((right | right[:1]).all(-1) & ~was[None])[:, ~was]
  failures = max(fixed.shape[1], 1)
  rate = fixed.sum(1) / failures
  best = int(rate.argmax())
  count = len(was)
  return {
    "before": float(was.mean()),
    "failures": int((~was).sum()),
    "fix_rate": rate.tolist(),
    "best_alpha": best,
    "after": float((was.sum() + fixed[best].sum()) / count),
    "oracle": float((was.sum() + fixed.any(0).sum()) / count),
    "oracle_fix_rate": float(fixed.any(0).sum() / failures),
  }


def honest_protocol(
  right: Bool[Array, "A N orders"], held_out: Bool[Array, " N"]
) -> dict:
  """Accuracy when every item is steered and alpha comes from other items.

  Args:
    right: as for `paper_protocol`.
    held_out: True for the items that are scored; the others choose alpha, the
      smallest of the best ones.

  Returns:
    On the held-out items: `before`, `after`, `gain` and its `error` (one
    standard error of the paired difference), `broken` and `fixed` (shares of
    all), and `strict` [A], the accuracy at each alpha.
  """
  right, held_out = np.asarray(right), np.asarray(held_out, bool)
  if held_out.all() or not held_out.any():
    raise ValueError("alpha is chosen on some items and scored on others")
  accuracy = strict(right)  # [A N]
  best = int(accuracy[:, ~held_out].mean(1).argmax())
  was, now = accuracy[0, held_out], accuracy[best, held_out]
  change = now.astype(float) - was
  return {
    "alpha": best,
    "items": int(held_out.sum()),
    "before": float(was.mean()),
    "after": float(now.mean()),
    "gain": float(change.mean()),
    "error": float(change.std() / np.sqrt(len(change))),
    "fixed": float((now & ~was).mean()),
    "broken": float((was & ~now).mean()),
    "strict": accuracy[:, held_out].mean(1).tolist(),
  }
