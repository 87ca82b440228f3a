# SPDX-License-Identifier: Apache-2.0
"""Sizes of the published decoders, and the names of their tensors.

| variants | checkpoints |
|---|---|
| llama2, llama3, llama3.1, llama3.2 | meta-llama/Llama-* |
| vicuna | lmsys/vicuna-*-v1.5, LLaVA-1.5 |
| yi-34b | 01-ai/Yi-34B, NousResearch/Nous-Hermes-2-Yi-34B |
| deepseek | the decoders of deepseek-ai/Janus-Pro-* |
| qwen2, qwen2.5 | Qwen/Qwen2-*, Qwen/Qwen2.5-*, Qwen/Qwen2.5-VL-* |
| qwen3 | Qwen/Qwen3-* |
| molmo2 | the decoders of allenai/Molmo2-* |
| gemma | google/gemma-2b; PaliGemma and pi0 override its vocabulary |
| gemma3-4b | the decoder of google/gemma-3-4b-* |
| gemma-300m | pi0's action expert, which has neither embedding nor head |

A fine-tuned checkpoint with more tokens overrides `vocab`.
"""

from __future__ import annotations

from spatial_jax import hf


def _size(*sizes, **options):
  names = ("width", "layers", "heads", "kv_heads", "mlp", "vocab")
  return {**dict(zip(names, sizes, strict=True)), **options}


_LLAMA = {
  "tied": False,
  "bias": False,
  "sections": None,
  "theta": 1e4,
  "eps": 1e-5,
}
_LLAMA3 = {**_LLAMA, "theta": 5e5}
# factor, low, high, length of pre-training
_LLAMA31 = {**_LLAMA3, "rope_scaling": (8.0, 1.0, 4.0, 8192)}
_LLAMA32 = {**_LLAMA3, "rope_scaling": (32.0, 1.0, 4.0, 8192), "tied": True}
_DEEPSEEK = {**_LLAMA, "eps": 1e-6}
_QWEN3 = {
  "bias": False,
  "qk_norm": True,
  "sections": None,
  "head_dim": 128,
}
_GEMMA = {
  "tied": True,
  "bias": False,
  "sections": None,
  "theta": 1e4,
  "head_dim": 256,
  "activation": "gelu_tanh",
  "norm_offset": 1.0,
  "scale_embed": True,
}
_GEMMA3 = {
  **_GEMMA,
  "theta": 1e6,
  "rope_scaling": (8.0,),  # of full layers
  "qk_norm": True,
  "post_norm": True,
  "window": 1024,
}
_MOLMO2 = {**_QWEN3, "tied": False, "new_vocab": 128}

# width, layers, heads, kv heads, mlp, vocabulary
VARIANTS = {
  "llama2-7b": _size(4096, 32, 32, 32, 11008, 32000, **_LLAMA),
  "llama2-13b": _size(5120, 40, 40, 40, 13824, 32000, **_LLAMA),
  "vicuna-7b": _size(4096, 32, 32, 32, 11008, 32000, **_LLAMA),
  "vicuna-13b": _size(5120, 40, 40, 40, 13824, 32000, **_LLAMA),
  "yi-34b": _size(7168, 60, 56, 8, 20480, 64000, **{**_LLAMA, "theta": 5e6}),
  "llama3-8b": _size(4096, 32, 32, 8, 14336, 128256, **_LLAMA3),
  "llama3.1-8b": _size(4096, 32, 32, 8, 14336, 128256, **_LLAMA31),
  "llama3.2-1b": _size(2048, 16, 32, 8, 8192, 128256, **_LLAMA32),
  "llama3.2-3b": _size(3072, 28, 24, 8, 8192, 128256, **_LLAMA32),
  "deepseek-1.3b": _size(2048, 24, 16, 16, 5632, 102400, **_DEEPSEEK),
  "deepseek-7b": _size(4096, 30, 32, 32, 11008, 102400, **_DEEPSEEK),
  "qwen2-7b": _size(3584, 28, 28, 4, 18944, 152064, tied=False),
  # Half the head dim of the others, so that their M-RoPE doesn't fit.
  "qwen2.5-0.5b": _size(896, 24, 14, 2, 4864, 151936, tied=True, sections=None),
  "qwen2.5-1.5b": _size(1536, 28, 12, 2, 8960, 151936, tied=True),
  "qwen2.5-3b": _size(2048, 36, 16, 2, 11008, 151936, tied=True),
  "qwen2.5-7b": _size(3584, 28, 28, 4, 18944, 152064, tied=False),
  "qwen2.5-14b": _size(5120, 48, 40, 8, 13824, 152064, tied=False),
  "qwen2.5-32b": _size(5120, 64, 40, 8, 27648, 152064, tied=False),
  "qwen2.5-72b": _size(8192, 80, 64, 8, 29568, 152064, tied=False),
  "qwen3-0.6b": _size(1024, 28, 16, 8, 3072, 151936, **_QWEN3, tied=True),
  "qwen3-1.7b": _size(2048, 28, 16, 8, 6144, 151936, **_QWEN3, tied=True),
  "qwen3-4b": _size(2560, 36, 32, 8, 9728, 151936, **_QWEN3, tied=True),
  "qwen3-8b": _size(4096, 36, 32, 8, 12288, 151936, **_QWEN3, tied=False),
  "qwen3-14b": _size(5120, 40, 40, 8, 17408, 151936, **_QWEN3, tied=False),
  "qwen3-32b": _size(5120, 64, 64, 8, 25600, 151936, **_QWEN3, tied=False),
  # From Qwen3-4B-Instruct-2507, made for long contexts, and from Qwen3-8B.
  "molmo2-4b": _size(2560, 36, 32, 8, 9728, 151936, **_MOLMO2, theta=5e6),
  "molmo2-8b": _size(4096, 36, 32, 8, 12288, 151936, **_MOLMO2),
  "gemma-2b": _size(2048, 18, 8, 1, 16384, 256000, **_GEMMA),
  "gemma3-4b": _size(2560, 34, 8, 4, 10240, 262208, **_GEMMA3),
  # pi0.5 sets `adaptive` as well.
  "gemma-300m": _size(1024, 18, 8, 1, 4096, 0, **_GEMMA),
}


def _layers(prefix, *rows):
  return hf.nest(rows, f"{prefix}.{{i}}.", "blocks/")


# Names below "model." of a checkpoint; the head stands outside.
KEYS = (
  ("embed_tokens.weight", "embed/embedding"),
  *_layers(
    "layers",
    ("input_layernorm.weight", "attention_norm/scale"),
    ("input_layernorm.dense.weight", "attention_norm/modulation/kernel"),
    ("input_layernorm.dense.bias", "attention_norm/modulation/bias"),
    ("self_attn.q_proj.weight", "attention/query/kernel"),
    ("self_attn.q_proj.bias", "attention/query/bias"),
    ("self_attn.k_proj.weight", "attention/key/kernel"),
    ("self_attn.k_proj.bias", "attention/key/bias"),
    ("self_attn.v_proj.weight", "attention/value/kernel"),
    ("self_attn.v_proj.bias", "attention/value/bias"),
    ("self_attn.q_norm.weight", "attention/query_norm/scale"),
    ("self_attn.k_norm.weight", "attention/key_norm/scale"),
    ("self_attn.o_proj.weight", "attention/out/kernel"),
    ("post_attention_layernorm.weight", "mlp_norm/scale"),
    ("post_attention_layernorm.dense.weight", "mlp_norm/modulation/kernel"),
    ("post_attention_layernorm.dense.bias", "mlp_norm/modulation/bias"),
    ("mlp.gate_proj.weight", "mlp/gate/kernel"),
    ("mlp.up_proj.weight", "mlp/up/kernel"),
    ("mlp.down_proj.weight", "mlp/down/kernel"),
  ),
  ("norm.weight", "norm/scale"),
  ("norm.dense.weight", "norm/modulation/kernel"),
  ("norm.dense.bias", "norm/modulation/bias"),
)

# Gemma 3 has norms before and after; the others call the one before the MLP
# what is here the one after attention.
GEMMA3 = (
  *(row for row in KEYS if row[1] != "blocks/mlp_norm/scale"),
  *_layers(
    "layers",
    ("post_attention_layernorm.weight", "attention_post_norm/scale"),
    ("pre_feedforward_layernorm.weight", "mlp_norm/scale"),
    ("post_feedforward_layernorm.weight", "mlp_post_norm/scale"),
  ),
)

_TABLES = ("embed/embedding", "embed/new/embedding")
# Molmo2 in transformers: both tables of embeddings are one tensor.
MOLMO2 = (("embed_tokens.weight", _TABLES), *KEYS[1:])
# Molmo2 as released, below "model.transformer.".
MOLMO2_RELEASED = (
  ("wte.embedding", _TABLES[0]),
  ("wte.new_embedding", _TABLES[1]),
  *_layers(
    "blocks",
    ("attn_norm.weight", "attention_norm/scale"),
    (
      "self_attn.att_proj.weight",
      tuple(f"attention/{name}/kernel" for name in ("query", "key", "value")),
    ),
    ("self_attn.q_norm.weight", "attention/query_norm/scale"),
    ("self_attn.k_norm.weight", "attention/key_norm/scale"),
    ("self_attn.attn_out.weight", "attention/out/kernel"),
    ("ff_norm.weight", "mlp_norm/scale"),
    ("mlp.ff_proj.weight", ("mlp/up/kernel", "mlp/gate/kernel")),
    ("mlp.ff_out.weight", "mlp/down/kernel"),
  ),
  ("ln_f.weight", "norm/scale"),
)


def keys(
  body: str | tuple[str, ...] = "model.",
  head: str | tuple[str, ...] = "",
  path: str = "llm/",
  table: hf.Table = KEYS,
) -> tuple:
  """Table of a decoder with its head.

  Args:
    body: prefix of `table`'s names; several are aliases.
    head: prefix of "lm_head.weight", likewise.
    path: prefix of the parameters.
  """
  bodies = (body,) if isinstance(body, str) else body
  heads = (head,) if isinstance(head, str) else head
  tied = hf.Tied(tuple(f"{name}embed_tokens.weight" for name in bodies))
  names = tuple(f"{name}lm_head.weight" for name in heads)
  return (
    *hf.nest(table, bodies, path),
    (names, f"{path}head/kernel", tied),
  )
