# SPDX-License-Identifier: Apache-2.0
"""Plans: what is counted in traced and in compiled programs, without a TPU."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import qwen2_5_vl_sft, vggt_world
from spatial_jax import losses, models, plan, sharding
from spatial_jax.models import llm
from spatial_jax.nn import attention, layers
from spatial_jax.plan import chips, cost, hlo

# What libtpu prints, cut: a loop of 36 trips with a gather that is shown twice,
# a reduction of two arrays, a fusion that keeps its part of a sum, a product
# whose parts go around a ring of 16 both ways, two steps a trip, and a gather
# that the loop of this ring hides, branches that 9 of 36 layers take, and none.
TPU_TEXT = """
%body (p: s32[]) -> s32[] {
  %all-gather.1 = bf16[64,32]{1,0} all-gather(%p), replica_groups=mesh['a'=2,'b'=16] {'b'}, frontend_attributes={chain_id="9"}
  %f = bf16[64,32]{1,0} fusion(%p), kind=kCustom, calls=%async.done
  %conditional.1 = f32[5]{0} conditional(%p, %p, %p), true_computation=%often, false_computation=%never
  %conditional.2 = f32[5]{0} conditional(%p, %p, %p), branch_computations={%never, %often}
}

%often (p: s32[]) -> s32[] {
  %all-gather.20 = f32[5]{0} all-gather(%p), replica_groups={{0,1,2}}, metadata={op_name="jit(f)/taken_1_of_1/cond/branch_1_fun/taken_9_of_36/up"}
}

%never (p: s32[]) -> s32[] {
  %all-gather.21 = f32[5]{0} all-gather(%p), replica_groups={{0,1,2}}
  %g = f32[5]{0} add(%p, %p), metadata={op_name="jit(f)/cond/branch_0_fun/taken_0_of_1/up"}
}

%async.done (p: s32[]) -> s32[] {
  %all-gather.2 = bf16[64,32]{1,0} all-gather(%p), replica_groups=mesh['a'=2,'b'=16] {'b'}, frontend_attributes={chain_id="9"}
}

%condition (p: s32[]) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(36)
}

%all-reduce-scatter.3 (p: s32[]) -> s32[] {
  %all-reduce.4 = f32[32]{0} all-reduce(%p), replica_groups=[2,16]<=[32], to_apply=%add
}

%windowed_dot_general_body_rs.4 (q: (f32[2], u32[])) -> (f32[2], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %nine = u32[]{:T(128)} constant(9)
  %q = (f32[2]{0}, u32[]) parameter(0)
  %trip = u32[]{:T(128)} get-tuple-element(%q), index=1
  %other = u32[]{:T(128)} add(%trip, %nine)
  %collective-permute-start.1 = (bf16[16,2]{1,0}, bf16[16,2]{1,0}, u32[]{:S(2)}) collective-permute-start(%q), source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,8},{8,9},{9,10},{10,11},{11,12},{12,13},{13,14},{14,15},{15,0}}
  %collective-permute-start.2 = (bf16[16,2]{1,0}, bf16[16,2]{1,0}, u32[]{:S(2)}) collective-permute-start(%q), source_target_pairs={{1,0},{2,1},{3,2},{4,3},{5,4},{6,5},{7,6},{8,7},{9,8},{10,9},{11,10},{12,11},{13,12},{14,13},{15,14},{0,15}}
  %h = bf16[8,2]{1,0} fusion(%q), kind=kCustom, calls=%async_collective_fusion.7
  %next = u32[]{:T(128)} add(%trip, %two)
  ROOT %tuple.1 = (f32[2]{0}, /*index=1*/u32[]) tuple(%r, %next)
}

%windowed_dot_general_cond_rs.4 (q: (f32[2], u32[])) -> pred[] {
  %eight = u32[]{:T(128)} constant(8)
  %q = (f32[2]{0}, u32[]) parameter(0)
  %trip.1 = u32[]{:T(128)} get-tuple-element(%q), index=1
  ROOT %less = pred[] compare(%trip.1, %eight), direction=LT
}

%async_collective_fusion.7 (p: s32[]) -> s32[] {
  %all-gather.8 = bf16[8,2]{1,0} all-gather(%p), replica_groups=[2,16]<=[32], frontend_attributes={chain_id="12"}
}

%fused_computation.9 (p: s32[]) -> s32[] {
  %all-gather.9 = bf16[8,2]{1,0:T(8)} all-gather(%p), replica_groups=[2,16]<=[32], frontend_attributes={chain_id="12"}
}

ENTRY %main (p: s32[]) -> s32[] {
  %while.2 = (f32[2]{0}, u32[]) while(%p), condition=%windowed_dot_general_cond_rs.4, body=%windowed_dot_general_body_rs.4
  %fusion.9 = bf16[8,2]{1,0} fusion(%p), kind=kCustom, calls=%fused_computation.9
  %while.1 = s32[] while(%p), condition=%condition, body=%body
  %all-reduce.7 = (f32[8]{0}, f32[4]{0}) all-reduce(%p, %p), replica_groups={{0,1},{2,3}}, to_apply=%add
  %all-gather.9 = f32[3]{0} all-gather(%p), replica_groups=mesh['c'=4,'d'=1,'e'=2], device_ids=([2,4]T(1,0)) {'c'}, dimensions={0}
  %fusion.2 = f32[2]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3
}
"""  # noqa: E501


def test_collectives_of_a_tpu_program():
  assert hlo.by_kind(hlo.collectives(TPU_TEXT)) == {
    ("all-gather", 16): (37, 36 * 64 * 32 * 2 + 8 * 2 * 2),
    ("all-gather", 3): (18, 18 * 20),
    ("all-gather", 4): (1, 12),
    ("all-reduce", 2): (1, 48),
    ("reduce-scatter", 16): (1 + 2 * 4, 128 + 2 * 4 * 16 * 2 * 2),
  }
  wire = {(one.kind, one.count): one.wire for one in hlo.collectives(TPU_TEXT)}
  assert wire["all-reduce", 1] == 48 and wire["reduce-scatter", 1] == 120


def stack(x, weights, remat):
  def layer(x, w):
    name = "blocks/up/kernel"
    return jnp.tanh(x @ sharding.whole(w, name)), None

  layer = jax.checkpoint(layer, prevent_cse=False) if remat else layer
  return jnp.sum(jax.lax.scan(layer, x, weights)[0])


def test_a_decoding_step_moves_no_slots_of_the_cache():
  # More devices than key heads, of which each device has a part.
  mesh = sharding.mesh(fsdp=1, tensor=4, devices=jax.devices()[:4])
  model = llm.Model(
    vocab=24,
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    mlp=32,
    sections=(1, 1, 2),
  )
  new = {
    "tokens": jnp.zeros((1, 1), jnp.int32),
    "positions": jnp.zeros((1, 3, 1), jnp.int32),
    "segments": jnp.ones((1, 1), jnp.int32),
  }
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **new))

  def step(params, cache):
    return model.apply(params, **new, cache=cache)[1]["cache"]

  with jax.set_mesh(mesh):
    cache = jax.jit(lambda: model.init_cache(1, 256))()
    placed = sharding.parameters(shapes["params"], mesh)
    params = jax.tree.map(
      lambda x, s: x.update(sharding=s), shapes["params"], placed
    )
    program = jax.jit(step).lower({"params": params}, cache).compile()
  found = hlo.collectives(program.as_text())
  assert found and max(one.bytes for one in found) < cache["key"].nbytes / 32


def test_a_tied_table_is_gathered_once_and_its_gradients_summed_once():
  mesh = sharding.mesh(data=2, fsdp=4)
  rng = np.random.default_rng(0)
  table = rng.normal(size=(24, 16)).astype(np.float32)
  # Many more tokens than words: moving their gradients would show.
  ids, labels = rng.integers(0, 24, (2, 8, 48)).astype(np.int32)
  weight = rng.random((8, 48)).astype(np.float32)

  def loss(table, ids, labels, weight, tokens=0):
    table = sharding.whole(table, "embed/embedding")
    hidden = jnp.tanh(3 * layers.lookup(table, ids))
    if not tokens:
      return losses.next_token(hidden @ table.T, labels, weight)[0]
    made = hidden, table, labels, weight, tokens
    return losses.next_token_of(*made, tied=True)[0]

  want = jax.grad(loss)(table, ids, labels, weight)
  with jax.set_mesh(mesh):
    place, rows = NamedSharding(mesh, P("fsdp")), sharding.batch_sharding(mesh)
    run = jax.jit(jax.grad(loss), static_argnums=4, out_shardings=place)
    batch = jax.device_put((ids, labels, weight), rows)
    arguments = jax.device_put(table, place), *batch
    for tokens in (48, 12):  # of one row a device
      compiled = run.lower(*arguments, tokens).compile()
      got = compiled(*arguments)
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
      found = hlo.by_kind(hlo.collectives(compiled.as_text()))
      moved = {kind: size for (kind, _), (_, size) in found.items()}
      assert moved.pop("all-gather") == table.nbytes
      # Of the lookup and of the head, which chips add before; and of numbers.
      assert sum(moved.values()) <= 2 * table.nbytes + 64
      # Each device's products count: two with the table, one for its gradient.
      jaxpr = run.trace(*arguments, tokens).jaxpr
      assert cost.flops(jaxpr, 8).model == 3 * 2 * 8 * 48 * 16 * 24


@pytest.mark.parametrize("data, fsdp", [(1, 8), (2, 4)])
def test_formula_and_compiled_program_gather_the_same(data, fsdp):
  mesh = sharding.mesh(data=data, fsdp=fsdp)
  with jax.set_mesh(mesh):
    x = jax.ShapeDtypeStruct(
      (16, 64), jnp.float32, sharding=sharding.batch_sharding(mesh)
    )
    weights = jax.ShapeDtypeStruct(
      (3, 64, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp"))
    )
    step = jax.jit(jax.grad(lambda w, x: stack(x, w, True)))
    predicted = cost.gathers(cost.trace(step, weights, x))
    compiled = step.lower(weights, x).compile()
  matrix = 64 * 64 * 4
  summed = sum(predicted.values()) - predicted["all-gather"]
  assert predicted.pop("all-reduce", 0) == (data > 1) * 3 * matrix / fsdp
  assert predicted == {
    "all-gather": 2 * 3 * matrix, "reduce-scatter": 3 * matrix
  }  # fmt: skip
  kinds = hlo.by_kind(hlo.collectives(compiled.as_text()))
  assert kinds["all-gather", fsdp] == (6, predicted["all-gather"])
  # Without a TPU's fusions a sum that is cut up is an all-reduce.
  sums = sum(size for (kind, _), (_, size) in kinds.items() if "reduce" in kind)
  assert sums == pytest.approx(summed, rel=0.01)


def test_flops_leave_out_what_is_computed_again():
  x, weights = jnp.ones((16, 64)), jnp.ones((3, 64, 64))
  forward = 3 * 2 * 16 * 64 * 64
  for remat in (False, True):
    step = jax.jit(jax.grad(stack, argnums=(0, 1)), static_argnums=2)
    flops = cost.flops(cost.trace(step, x, weights, remat), 128)
    assert flops.model == 3 * forward
    assert flops.program == (4 if remat else 3) * forward


def test_causal_scores_count_half_and_small_heads_more():
  q = jnp.ones((2, 512, 4, 64))
  mask = jnp.ones((1, 512, 512), bool)
  full = 4 * 2 * 512 * 512 * 4 * 64
  run = jax.jit(attention.attention)
  assert cost.flops(cost.trace(run, q, q, q), 128).program == full
  flops = cost.flops(cost.trace(run, q, q, q, mask), 128)
  assert flops.program == flops.attention == full / 2
  assert flops.padded == 2 * flops.program


def test_queries_in_turns_are_padded_like_all_at_once(monkeypatch):
  q = jnp.ones((2, 512, 4, 64))
  step = jax.grad(lambda *x: attention.unmasked(*x).sum(), argnums=(0, 1, 2))
  whole = cost.flops(cost.trace(jax.jit(step), q, q, q), 128)
  monkeypatch.setattr(attention, "_MOST_SCORES", 2**16)  # 16 rows a turn
  turns = cost.flops(cost.trace(jax.jit(step), q, q, q), 128)
  assert turns.model == whole.model
  # Seven products, of which the gradient computes the scores once more.
  assert 6 * whole.program == 7 * whole.model
  assert turns.program == whole.program
  assert turns.padded == 2 * turns.program
  assert whole.padded == 2 * whole.program


def test_placing_image_tokens_takes_no_collective():
  mesh = sharding.mesh(data=2, fsdp=4)
  rows = sharding.batch_sharding(mesh)

  def array(dtype, *shape):
    return jax.ShapeDtypeStruct((16, *shape), dtype, sharding=rows)

  def total(words, image, there):
    return jnp.sum(jnp.sin(llm.place(words, image, there)), axis=(1, 2))

  def step(words, image, there):
    out, back = jax.vjp(lambda w, i: total(w, i, there), words, image)
    return back(jnp.ones_like(out))

  arguments = array("float32", 32, 8), array("float32", 12, 8), array(bool, 32)
  compiled = jax.jit(step).lower(*arguments).compile()
  assert hlo.collectives(compiled.as_text()) == []


@pytest.fixture
def no_compiler(monkeypatch):
  """As where jax's CUDA plugin isn't installed."""
  monkeypatch.setattr(chips, "devices", lambda topology: [])


@pytest.mark.usefixtures("no_compiler")
def test_plan_of_a_gpu_without_its_compiler_traces_only(capsys):
  config = qwen2_5_vl_sft.get_config("test")
  found = plan.main(config, topology="h100:1", json=True)
  printed = json.loads(capsys.readouterr().out)
  assert printed["fits"] and not printed["compiled"]
  # Moments are as large as what is trained; nothing is gathered on one GPU.
  assert found.parameters < found.optimizer < 2.01 * found.parameters
  assert found.predicted == {} and found.peak > found.parameters
  assert 0 < found.model_flops <= found.program_flops <= found.padded_flops
  plan.main(config, topology="h100:1")
  assert "fits" in capsys.readouterr().out


@pytest.mark.usefixtures("no_compiler")
def test_plan_of_views_counts_steps(capsys):
  found = plan.main(vggt_world.get_config("test"), topology="h100:1")
  assert found.tokens == 0 and "steps a second" in capsys.readouterr().out


@pytest.mark.usefixtures("no_compiler")
def test_serving_on_a_gpu_reads_weights_and_cache_for_each_token(capsys):
  config = qwen2_5_vl_sft.get_config("test")
  config.generate.max_new_tokens = 16
  found = plan.main(config, topology="h100:1", serve=True, json=True)
  printed = json.loads(capsys.readouterr().out)
  assert printed["fits"] and printed["prompt"] == config.data.length
  prefill, decode = found.phases["prefill"], found.phases["decode"]
  model, _ = models.build(config)
  cache = model.init_cache(8, config.data.length + 16)
  assert decode.cache == sum(
    jnp.asarray(x).nbytes for x in jax.tree.leaves(cache)
  )
  assert decode.bound == "memory"
  bandwidth = chips.parse("h100:1").chip.bandwidth
  read = found.parameters + decode.cache
  assert decode.seconds == pytest.approx(read / bandwidth)
  assert decode.flops < prefill.flops / 10
  # Layers are there twice, in their stack and one by one.
  assert decode.peak > found.parameters + 2 * decode.cache
  plan.main(config, topology="h100:1", serve=True)
  assert "new tokens a second" in capsys.readouterr().out


def test_serving_needs_a_model_that_generates():
  config = vggt_world.get_config("test")
  with pytest.raises(ValueError, match="generates no text"):
    plan.main(config, topology="h100:1", serve=True)


@pytest.mark.parametrize(
  "text, message",
  [
    ("v9:4x4", "kinds are"),
    ("v5e:4x4x4", "takes 2"),
    ("v5e", "expected KIND"),
    ("h100:8", "one GPU"),
  ],
)
def test_unknown_topologies_say_what_there_is(text, message):
  with pytest.raises(ValueError, match=message):
    chips.parse(text)


def test_wires_of_a_torus_need_rings():
  assert chips.parse("v5e:4x4").wire == 2 * 45e9
  assert chips.parse("v5e:16x16").wire == 4 * 45e9
  assert chips.parse("v5p:4x4x4").wire == 6 * 90e9
  assert np.isclose(chips.parse("v5p:2x2x1").wire, 2 * 90e9)
