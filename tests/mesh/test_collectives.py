"""Collectives are parsed from HLO text: written by hand, and by the compiler for CPUs."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from support.children import run

from qwen_jax.distributed import sharding
from qwen_jax.planner.hlo import Collective, collectives, sent

MESH = {"data": 1, "seq": 2, "tensor": 4}
TEXT = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%start (p.1: bf16[8,128]) -> (bf16[8,128], bf16[32,128]) {
  %p.1 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %gather.1 = bf16[32,128]{1,0} all-gather(%p.1), replica_groups=[2,4]<=[8], dimensions={0}, \
backend_config={"async_collective_fusion_config":{}}
  ROOT %begun = (bf16[8,128], bf16[32,128]) custom-call(%gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%done (p.2: bf16[8,128]) -> bf16[32,128] {
  %p.2 = bf16[8,128]{1,0} parameter(0)
  %gather.2 = bf16[32,128]{1,0} all-gather(%p.2), replica_groups=[2,4]<=[8], dimensions={0}, \
backend_config={"async_collective_fusion_config":{}}
  ROOT %ended = bf16[32,128]{1,0} custom-call(%p.2, %gather.2), \
custom_call_target="AsyncCollectiveDone"
}

%condition (state.1: (s32[], f32[4])) -> pred[] {
  %state.1 = (s32[], f32[4]) parameter(0)
  %limit = s32[]{:T(128)} constant(LIMIT)
  %counter = s32[] get-tuple-element(%state.1), index=0
  ROOT %more = pred[] compare(%counter, %limit), direction=LT
}

%body (state.2: (s32[], f32[4])) -> (s32[], f32[4]) {
  %state.2 = (s32[], f32[4]) parameter(0)
  %counter.2 = s32[] get-tuple-element(%state.2), index=0
  %x = f32[4]{0} get-tuple-element(%state.2), index=1
  %total = f32[4]{0} all-reduce(%x), \
replica_groups=mesh['a'=2,'b'=4] {'b'}, use_global_device_ids=true, to_apply=%add
  ROOT %next = (s32[], f32[4]) tuple(%counter.2, %total)
}

%little (l: f32[4]) -> f32[4] {
  %l = f32[4]{0} parameter(0)
  ROOT %swapped = f32[4]{0} collective-permute(%l), source_target_pairs={{0,4},{4,0},{1,5}}
}

%much (m: f32[4]) -> f32[4] {
  %m = f32[4]{0} parameter(0)
  %both = (f32[4]{0}, f32[4]{0}) all-reduce(%m, %m), \
replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  ROOT %one = f32[4]{0} get-tuple-element(%both), index=0
}

ENTRY %main (x.1: bf16[8,128], y.1: f32[4], which: s32[]) -> f32[4] {
  %x.1 = bf16[8,128]{1,0} parameter(0)
  %y.1 = f32[4]{0} parameter(1)
  %which = s32[] parameter(2)
  %flight = (bf16[8,128], bf16[32,128]) fusion(%x.1), kind=kCustom, calls=%start
  %landed = bf16[32,128]{1,0} fusion(%x.1), kind=kCustom, calls=%done
  %zero = s32[] constant(0)
  %init = (s32[], f32[4]) tuple(%zero, %y.1)
  %loop = (s32[], /*index=1*/f32[4]) while(%init), condition=%condition, body=%body
  %y.2 = f32[4]{0} get-tuple-element(%loop), index=1
  %scattered = f32[1]{0} reduce-scatter(%y.2), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  ROOT %chosen = f32[4]{0} conditional(%which, %y.2, %y.2), branch_computations={%little, %much}
}
"""


def test_loops_branches_and_spellings_are_read_as_they_are_meant():
    found = collectives(TEXT.replace("LIMIT", "27"), MESH)
    assert found == Counter(
        {
            # Three other devices get the 2 KiB of this one.
            Collective("all-gather", "tensor", "bf16[8,128]", 2048, 3 * 2048): 1,
            # A sum over four devices is scattered, then gathered.
            Collective("all-reduce", "tensor", "f32[4]", 16, 24): 27,
            # Groups {0,2,4,6} and {1,3,5,7} are those of no axis.
            Collective("reduce-scatter", "?", "f32[4]", 16, 12): 1,
            # The branch that sends more.
            Collective("all-reduce", "seq", "f32[4], f32[4]", 32, 32): 1,
        }
    )
    assert sent(found) == 3 * 2048 + 27 * 24 + 12 + 32


def test_a_loop_of_unknown_length_that_sends_is_refused():
    text = TEXT.replace("constant(LIMIT)", "parameter(1)")
    with pytest.raises(ValueError, match="does not say how often"):
        collectives(text, MESH)


def test_a_program_for_cpus_sends_what_it_was_written_to_send():
    found = run(compile_a_step)
    assert found == Counter(
        {
            Collective("all-gather", "seq", "f32[4,8]", 128, 128): 5,
            Collective("all-reduce", "tensor", "f32[8,8]", 256, 384): 5,
            Collective("all-to-all", "seq+tensor", ", ".join(["f32[1,1,8]"] * 8), 256, 224): 1,
            Collective("collective-permute", "tensor", "f32[8,8]", 256, 256): 1,
        }
    )


def compile_a_step():
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = sharding.make_mesh(seq=2, tensor=4)

    def local(x):
        def layer(_, x):
            whole = jax.lax.all_gather(x, "seq", tiled=True)
            return jax.lax.psum(whole * whole, "tensor")[:4]

        x = jax.lax.fori_loop(0, 5, layer, x)
        x = jnp.concatenate([x, x])
        x = jax.lax.ppermute(x, "tensor", [(i, (i + 1) % 4) for i in range(4)])
        return jax.lax.all_to_all(x[:, None], ("seq", "tensor"), 0, 0)

    spec = PartitionSpec("seq")
    step = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    text = jax.jit(step).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32)).compile().as_text()
    assert text is not None
    return collectives(text, MESH)
