# SPDX-License-Identifier: Apache-2.0
"""Decoders and readers of images equal transformers', with random weights."""

import functools

import jax
import numpy as np
import pytest
from ml_collections import FrozenConfigDict
from safetensors.numpy import save_file

from spatial_jax import generate, hf, losses, trees
from spatial_jax.models import janus, llm, llm_variants, paligemma

WHY = "parity is shown beside a live reference, which isn't installed"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 1e-4
NEW_TOKENS = 16
LENGTHS = 70, 53  # of the two rows, padded at their left
IMAGE, VOCAB = 3, 96  # the image token; others are drawn from 4 on
IMAGES, SIDE, PATCH = 2, 12, 4  # images per row
# Compiling takes most of the time here.
OPTIONS = {"xla_backend_optimization_level": 0}


def sizes(variant, width, heads, kv_heads, mlp, **more):
  """A published size made small, its options as they are."""
  small = {
    "vocab": VOCAB,
    "width": width,
    "layers": 2,
    "heads": heads,
    "kv_heads": kv_heads,
    "mlp": mlp,
  }
  return FrozenConfigDict({**llm.VARIANTS[variant], **small, **more})


# Groups of 1, 2, 3 and 4 heads; head dims apart from width / heads.
DECODERS = {
  "Llama-2": sizes("llama2-7b", 32, 4, 4, 48),
  # 32: most waves are longer than that.
  "Llama-3.2": sizes(
    "llama3.2-1b", 48, 6, 2, 64, rope_scaling=(8.0, 1.0, 4.0, 32)
  ),
  "Qwen2": sizes("qwen2.5-0.5b", 32, 4, 1, 48),
  "Qwen3": sizes("qwen3-4b", 40, 4, 2, 56, head_dim=16),
  "Gemma": sizes("gemma-2b", 40, 3, 1, 56, head_dim=16),
  "Molmo2": sizes("molmo2-4b", 40, 4, 2, 56, head_dim=16, new_vocab=8),
}
TOWER = {"width": 24, "layers": 2, "heads": 3, "mlp": 48}
READERS = {
  "PaliGemma": paligemma.Model(
    vit=FrozenConfigDict(
      {
        **paligemma.VARIANTS["3b-224"]["vit"],
        **TOWER,
        "patch": PATCH,
        "image": SIDE,
      }
    ),
    llm=DECODERS["Gemma"],
    image_token=IMAGE,
  ),
  "Janus": janus.Model(
    vit=FrozenConfigDict(
      {**janus.VARIANTS["1b"]["vit"], **TOWER, "patch": PATCH, "image": SIDE}
    ),
    llm=sizes("deepseek-1.3b", 32, 4, 4, 48),
    image_token=IMAGE,
  ),
}
NAMES = (*DECODERS, *READERS)


# --- the reference ----------------------------------------------------------


def text_config(ours):
  """Our arguments as transformers names them."""
  rope = {"rope_type": "default", "rope_theta": ours.get("theta", 1e6)}
  if ours.get("rope_scaling"):
    factor, low, high, length = ours["rope_scaling"]
    rope |= {
      "rope_type": "llama3",
      "factor": factor,
      "low_freq_factor": low,
      "high_freq_factor": high,
      "original_max_position_embeddings": length,
    }
  return {
    "vocab_size": ours["vocab"],
    "hidden_size": ours["width"],
    "intermediate_size": ours["mlp"],
    "num_hidden_layers": ours["layers"],
    "num_attention_heads": ours["heads"],
    "num_key_value_heads": ours["kv_heads"],
    "head_dim": ours.get("head_dim") or ours["width"] // ours["heads"],
    "rms_norm_eps": ours.get("eps", 1e-6),
    "rope_parameters": rope,
    "tie_word_embeddings": ours["tied"],
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
  }


def build(name):
  """transformers' model of a case."""
  if name in ("Llama-2", "Llama-3.2", "Qwen2", "Qwen3", "Gemma"):
    family = name.partition("-")[0]
    config = getattr(transformers, f"{family}Config")
    model = getattr(transformers, f"{family}ForCausalLM")
    return model(config(**text_config(DECODERS[name])))
  if name == "Molmo2":
    text = text_config(DECODERS[name])
    tiny = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8}
    tiny |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    config = transformers.Molmo2Config(
      text_config={**text, "additional_vocab_size": 8},
      vision_config={**tiny, "image_size": [4, 4], "patch_size": 2},
      adapter_config={
        **tiny,
        "vision_feature_layer": [0],
        "text_hidden_size": text["hidden_size"],
      },
      tie_word_embeddings=False,
    )
    return transformers.Molmo2ForConditionalGeneration(config)
  ours = READERS[name]
  text = text_config(ours.llm)
  vision = {
    "hidden_size": ours.vit["width"],
    "num_hidden_layers": ours.vit["layers"],
    "num_attention_heads": ours.vit["heads"],
    "image_size": SIDE,
    "patch_size": PATCH,
    "projection_dim": text["hidden_size"],
  }
  if name == "PaliGemma":
    vision |= {"intermediate_size": ours.vit["mlp"], "vision_use_head": False}
    config = transformers.PaliGemmaConfig(
      text_config={**text, "model_type": "gemma"},
      vision_config={**vision, "model_type": "siglip_vision_model"},
      image_token_id=IMAGE,
      projection_dim=text["hidden_size"],
      hidden_size=text["hidden_size"],
    )
    return transformers.PaliGemmaForConditionalGeneration(config)
  ratio = ours.vit["mlp"] / ours.vit["width"]
  config = transformers.JanusConfig(
    text_config={**text, "model_type": "llama"},
    vision_config={**vision, "mlp_ratio": ratio, "num_image_tokens": 9},
    vq_config={
      "embed_dim": 4,
      "num_embeddings": 8,
      "latent_channels": 8,
      "base_channels": 32,
      "channel_multiplier": [1],
      "num_res_blocks": 1,
      "projection_dim": 8,
      "image_token_embed_dim": 8,
    },
    image_token_id=IMAGE,
    tie_word_embeddings=False,
  )
  return transformers.JanusForConditionalGeneration(config)


@functools.cache
def reference(name):
  """The same with random numbers in every parameter."""
  torch.manual_seed(NAMES.index(name))
  model = build(name).float().eval()
  with torch.no_grad():
    for key, value in model.named_parameters():
      noise = torch.randn(value.shape)
      if value.ndim == 1:
        # Norms keep their mean of one, or of zero if one is added to them.
        value.add_(0.3 * noise)
      elif "embed" in key and value.ndim == 2:
        # A tied head would answer with the token itself if the stream were
        # little more than its embedding.
        value.copy_(0.1 * noise)
      else:
        value.copy_(1.5 * noise * value[0].numel() ** -0.5)
  return model


# --- cases ------------------------------------------------------------------


def images(rng):
  shape = len(LENGTHS), IMAGES, SIDE, SIDE, 3
  return rng.uniform(-1, 1, shape).astype(np.float32)


def make(name):
  """Our batch and what transformers gets of it."""
  rng = np.random.default_rng(NAMES.index(name))
  B, T = len(LENGTHS), max(LENGTHS)
  starts = T - np.array(LENGTHS)[:, None]
  valid = np.arange(T)[None] >= starts
  tokens = np.where(valid, rng.integers(4, VOCAB, (B, T)), 0)
  count = IMAGES * (SIDE // PATCH) ** 2
  after = np.arange(T)[None] - starts  # the first token
  is_image = np.zeros((B, T), bool)
  if name in READERS:
    # Behind the first word and, split in two, behind the fourth.
    is_image = (
      (after >= 1) & (after < count + 4) & ~((after > 9) & (after < 13))
    )
    tokens[is_image] = IMAGE
  prefix = valid & (after < count + 12)
  counted = valid & (after > 0) & ~is_image
  theirs, ours = {}, {}
  if name == "PaliGemma":
    counted &= ~prefix
    theirs["token_type_ids"] = torch.tensor(~prefix).long()
    ours["prefix"] = prefix
  if name == "Molmo2":
    # Tokens of the second table, apart from each other, see each other.
    mutual = valid & (rng.random((B, T)) < 0.4)
    tokens[mutual] = rng.integers(VOCAB, VOCAB + 8, mutual.sum())
    counted &= ~mutual
    theirs["mm_token_type_ids"] = torch.tensor(mutual).long()
    ours["mutual"] = mutual.astype(np.int32)
  if name in READERS:
    ours["images"] = pixels = images(rng)
    pixels = pixels.reshape(-1, SIDE, SIDE, 3).transpose(0, 3, 1, 2)
    theirs["pixel_values"] = torch.tensor(pixels)
  ours["tokens"] = tokens.astype(np.int32)
  ours["segments"] = valid.astype(np.int32)
  first = 1 if name == "PaliGemma" else 0
  ours["positions"] = (np.maximum(after, 0) + first).astype(np.int32)
  ours["labels"] = np.roll(ours["tokens"], -1, axis=1)
  ours["loss_weight"] = np.roll(counted, -1, axis=1).astype(np.float32)
  theirs["input_ids"] = torch.tensor(tokens)
  theirs["attention_mask"] = torch.tensor(valid).long()
  labels = torch.tensor(np.where(counted, tokens, -100))
  return ours, theirs, labels


def arguments(batch):
  return {k: v for k, v in batch.items() if k not in ("labels", "loss_weight")}


def text_loss(model, params, batch):
  logits, out = model.apply({"params": params}, **arguments(batch))
  labels, weight = batch["labels"], batch["loss_weight"]
  value, metrics = losses.next_token(logits, labels, weight)
  return value, (metrics, out)


def ours_of(name):
  """Model, loss, table and what the table leaves out."""
  if name == "PaliGemma":
    return READERS[name], paligemma.loss, paligemma.KEYS, ()
  if name == "Janus":
    return READERS[name], janus.loss, janus.KEYS, janus.IGNORE
  model = llm.Model(**DECODERS[name])
  if name == "Molmo2":
    keys = llm_variants.keys(
      "model.language_model.", path="", table=llm_variants.MOLMO2
    )
    ignore = ("model.vision_tower.", "model.multi_modal_projector.")
    return model, text_loss, keys, ignore
  return model, text_loss, llm_variants.keys(path=""), ()


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=OPTIONS)
def evaluate(model, loss, params, batch):
  logits, _ = model.apply({"params": params}, **arguments(batch))

  def value(params):
    return loss(model, params, batch)[0]

  return logits, *jax.value_and_grad(value)(params)


@functools.partial(jax.jit, static_argnums=0, compiler_options=OPTIONS)
def greedy(model, params, batch):
  return generate.generate(
    model, params, batch, max_new_tokens=NEW_TOKENS, stop_ids=()
  )[0]


def worst(got, want):
  """Largest difference relative to the largest number that is wanted."""
  return np.max(np.abs(got - want)) / np.max(np.abs(want))


def shapes_of(model, batch):
  init = functools.partial(model.init, jax.random.key(0))
  return jax.eval_shape(lambda: init(**arguments(batch)))["params"]


def tensors(model, kind):
  """Parameters or gradients of transformers' model by name."""
  named = model.named_parameters()
  picked = {n: p if kind == "data" else p.grad for n, p in named}
  return {n: p.detach().numpy() for n, p in picked.items() if p is not None}


def compare_gradients(got, want):
  report = {}
  for path, grad in trees.flatten(got).items():
    other = np.asarray(want[path])
    if path.startswith("vit/") and path.endswith("key/bias"):
      # Equal for all keys, so that the softmax takes it out: rounding remains.
      assert max(np.max(np.abs(grad)), np.max(np.abs(other))) < 1e-5
    else:
      report[path] = worst(grad, other)
  return report


@pytest.mark.parametrize("name", NAMES)
def test_a_model_equals_that_of_transformers(name, tmp_path):
  theirs = reference(name)
  batch, kwargs, labels = make(name)
  model, loss, keys, ignore = ours_of(name)
  shapes = shapes_of(model, batch)
  for kind in ("data", "grad"):
    if kind == "grad":
      positions = torch.tensor(batch["positions"]).long()
      theirs.zero_grad()
      result = theirs(**kwargs, position_ids=positions, labels=labels)
      result.loss.backward()
    save_file(tensors(theirs, kind), tmp_path / f"{kind}.safetensors")
  params, want = (
    hf.load(keys, tmp_path / f"{kind}.safetensors", shapes, ignore=ignore)
    for kind in ("data", "grad")
  )
  logits, value, grads = evaluate(model, loss, params, batch)
  valid = batch["segments"] > 0
  report = {
    "logits": worst(logits[valid], result.logits.detach().numpy()[valid]),
    "loss": worst(value, result.loss.item()),
    **compare_gradients(grads, trees.flatten(want)),
  }
  print(name, {key: f"{value:.1e}" for key, value in report.items()})
  assert not {k: v for k, v in report.items() if not v <= TOLERANCE}

  tokens = greedy(model, params, arguments(batch))
  with torch.no_grad():
    answer = theirs.generate(
      **kwargs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
  answer = answer[:, max(LENGTHS) :].numpy()
  assert min(len(np.unique(row)) for row in answer) > 4
  np.testing.assert_array_equal(tokens, answer)
  if name == "Molmo2" or name == "Janus":
    return  # parts of theirs are not ours

  # transformers reads what we write.
  out = tmp_path / "ours"
  hf.save(keys, params, out, shard_bytes=20_000)
  theirs.config.save_pretrained(out)
  again, info = type(theirs).from_pretrained(out, output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"]
  with torch.no_grad():
    got = again.eval()(**kwargs, position_ids=positions).logits
  assert torch.equal(got, result.logits)


@pytest.mark.parametrize("name", READERS)
def test_a_folder_that_transformers_writes_fits(name, tmp_path):
  reference(name).save_pretrained(tmp_path)
  model, _, keys, ignore = ours_of(name)
  params = hf.load(
    keys, tmp_path, shapes_of(model, make(name)[0]), ignore=ignore
  )
  assert "vit" in params
