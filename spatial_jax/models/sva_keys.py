# SPDX-License-Identifier: Apache-2.0
"""Names of the aggregator's parameters in published checkpoints.

| table | of | below |
|---|---|---|
| KEYS | `sva.Aggregator` | "model." of nyu-visionx/cambrian-* |
| SAMPLER | `sva.Sampler` | "model.vision_sampler_0." there |
| LAYER | `sva.Layer` | "model.vision_sampler_0.layers.0." there |

A row whose parameter a model doesn't have is not used.
"""

from __future__ import annotations

from spatial_jax import hf

_MOST_ENCODERS, _MOST_GROUPS = 8, 8


def _linear(theirs, ours):
  return ((f"{theirs}.weight", f"{ours}/kernel"),)


def _norm(theirs, ours):
  return (
    (f"{theirs}.weight", f"{ours}/scale"),
    (f"{theirs}.bias", f"{ours}/bias"),
  )


def _normed(theirs, ours):
  """A linear layer behind its norm."""
  return (*_norm(f"{theirs}.0", f"{ours}_norm"), *_linear(f"{theirs}.1", ours))


def _pair(theirs, ours):
  return (
    *_linear(f"{theirs}.linear_1", f"{ours}/up"),
    *_linear(f"{theirs}.linear_2", f"{ours}/down"),
  )


def _encoder(e):
  alone, ours = f"aggregate_{e}.attention_layer", f"encoder_{e}"
  return (
    (f"pos_embed_{e}", f"position_{e}/embedding"),
    *_normed(f"cross_attn.k_proj_{e}", f"attention/{ours}/key"),
    *_normed(f"cross_attn.v_proj_{e}", f"attention/{ours}/value"),
    *_pair(alone, ours),
    *_normed(f"{alone}.q_proj", f"{ours}/query"),
    *_normed(f"{alone}.k_proj", f"{ours}/encoder_0/key"),
    *_normed(f"{alone}.v_proj", f"{ours}/encoder_0/value"),
    *_linear(f"{alone}.o_proj", f"{ours}/out"),
  )


LAYER = (
  *_linear("proj_context", "context"),
  *_linear("proj_in", "enter"),
  *_pair("proj_out", "mlp"),
  *_norm("norm", "norm"),
  *_normed("cross_attn.q_proj", "attention/query"),
  *_linear("cross_attn.o_proj", "attention/out"),
  *_pair("weight_mlp", "mix"),
  *(row for e in range(_MOST_ENCODERS) for row in _encoder(e)),
)
SAMPLER = hf.nest(LAYER, "layers.{i}.", "layers/")


def _project(theirs, ours):
  return tuple(
    (f"{theirs}.{place}.{kind}", f"{ours}/{part}")
    for place, kind, part in (
      (0, "weight", "up/kernel"),
      (0, "bias", "up/bias"),
      (2, "weight", "down/kernel"),
      (2, "bias", "down/bias"),
      (3, "weight", "norm/scale"),
      (3, "bias", "norm/bias"),
    )
  )


KEYS = (
  ("vision_query", "queries/embedding"),
  (
    "image_newline",
    "newline/embedding",
    hf.Custom(lambda x: x, lambda x: x[0]),  # [D] for [1 D]
  ),
  *_project("mm_projector", "project"),
  *(
    row
    for e in range(_MOST_ENCODERS)
    for row in _project(f"mm_projector_aux_{e}", f"project_{e}")
  ),
  *(
    row
    for g in range(_MOST_GROUPS)
    for row in hf.nest(SAMPLER, f"vision_sampler_{g}.", f"sampler_{g}/")
  ),
  *hf.nest(LAYER, "vision_sampler_layers.{i}.layers.0.", "between/"),
)
