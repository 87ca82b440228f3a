# SPDX-License-Identifier: Apache-2.0
"""What pruning saves: CPU seconds and FLOPs of one step, forward and backward.

  python launch/prune_bench.py --frames=64 --drop=0.5

Two parts of a model of STTS's shape, with and without pruning: the ViT's blocks
after the scorer's, and the decoder with its loss. What is dropped is drawn at
random. A ratio is that of the smallest CPU seconds of this process, so that
other work counts little; FLOPs are XLA's, with loops unrolled.
"""

from __future__ import annotations

import argparse
import functools
import math
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

DEFAULTS = {
  "frames": 64,
  "drop": 0.5,
  "side": 4,  # groups in a row or column of a frame
  "text": 64,  # tokens
  "width": 512,
  "layers": 2,
  "vocab": 1024,
  "bins": 0.54,  # rows that the ViT packs frames in, as a share of them
  "rounds": 5,
}


def vit_steps(args):
  """Programs: whole frames, packed ones, and the latter's blocks alone.

  FLOPs are counted in these: packing also has a branch for too few bins, of
  which XLA would count the larger.
  """
  import jax
  import jax.numpy as jnp
  from ml_collections import FrozenConfigDict

  from spatial_jax.models import molmo2_vit, stts_vit
  from spatial_jax.nn import packing, pruning, scorer

  F, side, D = args.frames, 3 * args.side, args.width
  P, first, last = side**2, 1, args.layers
  sizes = dict(molmo2_vit.VIT, width=D, heads=D // 64, mlp=4 * D)
  sizes |= {"layers": last + 1, "image": 14 * side, "unroll": args.layers}
  tower = stts_vit.Tower(FrozenConfigDict(sizes), (last,))
  image = jnp.zeros((1, 14 * side, 14 * side, 3))
  params = jax.jit(functools.partial(tower.init, method="embed"))(
    jax.random.key(0), image
  )
  x = jax.random.normal(jax.random.key(1), (1, F, P, D))
  scores = jax.random.uniform(jax.random.key(2), (1, F, args.side**2))
  kept = pruning.keep(scores, jnp.ones((1, F), jnp.int32), args.drop)
  groups = stts_vit.processing.pooling(1, side, side)
  kept = kept[..., scorer.group_of(groups, P)]
  bins = math.ceil(F * args.bins)
  count = int(packing.pack(kept).count[0])
  print(f"{F} frames fit in {count} bins; {bins} are computed")
  if count > bins:
    raise SystemExit(f"--bins={args.bins} is too small")

  def gradient(loss, x):
    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile()

  def whole(params, x):
    y, _ = tower.apply(params, x[0], first, last, P, method="run")
    return jnp.sum(y * y)

  def pruned(params, x):
    plan = packing.pack(kept)
    read = tower.apply(params, x, kept, plan, first, bins, method="run_packed")
    return jnp.sum(read[last] ** 2)

  def branch(params, x):
    mask = jnp.ones((bins, P, P), bool)
    given = x[0], first, last, P
    y, _ = tower.apply(params, *given, mask=mask, method="run")
    return jnp.sum(y * y)

  return [
    functools.partial(gradient(loss, given), params, given)
    for loss, given in ((whole, x), (pruned, x), (branch, x[:, :bins]))
  ]


def llm_steps(args):
  """(whole, pruned): programs on rows of the decoder."""
  import jax
  import jax.numpy as jnp

  from spatial_jax import losses
  from spatial_jax.data.stts import budget
  from spatial_jax.models import llm

  D, groups = args.width, args.side**2
  sizes = dict(llm.VARIANTS["molmo2-4b"], vocab=args.vocab, new_vocab=0)
  sizes |= {"width": D, "mlp": 4 * D, "heads": D // 64, "head_dim": 64}
  sizes |= {"kv_heads": max(D // 256, 1), "layers": args.layers}
  decoder = llm.Model(**sizes, unroll=args.layers)
  tokens = jnp.zeros((1, 4), jnp.int32)
  params = jax.jit(decoder.init)(jax.random.key(0), tokens, tokens, tokens)

  def step(length):
    row = jnp.arange(length)[None]

    def loss(params, x):
      logits, _ = decoder.apply(
        params,
        None,
        row,
        jnp.ones_like(row),
        mutual=(row < length - args.text).astype(jnp.int32),
        embeddings=x,
      )
      labels = row % args.vocab
      return losses.next_token(logits, labels, jnp.ones(labels.shape))[0]

    x = jax.random.normal(jax.random.key(1), (1, length, D))
    program = jax.jit(jax.grad(loss, argnums=(0, 1)))
    return functools.partial(program.lower(params, x).compile(), params, x)

  whole = args.frames * groups + args.text
  left = whole - budget(args.frames, groups, args.drop)
  print(f"rows of {whole} tokens, {left} after pruning")
  return step(whole), step(left)


def seconds(steps, rounds):
  """Smallest CPU seconds of each program."""
  import jax

  best = [math.inf] * len(steps)
  for step in steps:
    jax.block_until_ready(step())
  for _ in range(rounds):
    for i, step in enumerate(steps):
      start = time.process_time()
      jax.block_until_ready(step())
      best[i] = min(best[i], time.process_time() - start)
  return best


def flops(step):
  return step.func.cost_analysis()["flops"]


def main(argv=None) -> dict[str, float]:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  for name, value in DEFAULTS.items():
    parser.add_argument(f"--{name}", type=type(value), default=value)
  args = parser.parse_args(argv)
  whole, pruned, branch = vit_steps(args)
  parts = {"vit": (seconds((whole, pruned), args.rounds), (whole, branch))}
  steps = llm_steps(args)
  parts["llm"] = seconds(steps, args.rounds), steps
  ratios, total = {}, [0.0, 0.0]
  for name, (times, programs) in parts.items():
    counts = [flops(program) for program in programs]
    ratios[f"{name}/seconds"] = times[1] / times[0]
    ratios[f"{name}/flops"] = counts[1] / counts[0]
    total = [a + b for a, b in zip(total, times, strict=True)]
    print(
      f"{name}: {times[0]:.2f} s -> {times[1]:.2f} s "
      f"({ratios[f'{name}/seconds']:.3f}), {counts[0] / 1e9:.1f} GFLOP -> "
      f"{counts[1] / 1e9:.1f} ({ratios[f'{name}/flops']:.3f})"
    )
  ratios["seconds"] = total[1] / total[0]
  print(f"together {ratios['seconds']:.3f} of the time")
  return ratios


if __name__ == "__main__":
  main()
