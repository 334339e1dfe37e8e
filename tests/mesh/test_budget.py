"""Memory of a length: published figures, XLA's allocations, and the longest that fits."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.children import run
from support.random_models import CONFIGS

from qwen_jax.distributed import sharding
from qwen_jax.distributed.sharding import MeshShape
from qwen_jax.engine import memory as budget
from qwen_jax.engine.memory import Workload
from qwen_jax.models import kv_cache, params, presets

PUBLISHED = {
    # name: (parameters, bytes of cache a token in bfloat16)
    "7b": (7_615_616_512, 57_344),
    "14b": (14_770_033_664, 196_608),
}
MILLION = Workload(tokens=1_010_000, page=1024, slice_len=32768)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_cache_are_as_published(name, tmp_path):
    config = presets.config(tmp_path, name)
    parameters, per_token = PUBLISHED[name]
    assert budget.weights(config, MeshShape()) == parameters
    one = budget.memory(config, MILLION, MeshShape())
    assert one.weights == 2 * parameters
    longer = dataclasses.replace(MILLION, tokens=MILLION.tokens + 10 * MILLION.page)
    more = budget.memory(config, longer, MeshShape())
    assert more.cache - one.cache == 10 * MILLION.page * per_token
    assert one.cache // per_token == 988 * 1024  # 987 pages and one for padding
    wide = budget.memory(config, dataclasses.replace(MILLION, dtype="float32"), MeshShape())
    assert (wide.weights, wide.cache) == (2 * one.weights, 2 * one.cache)


def test_arguments_of_a_program_on_a_mesh_take_what_the_budget_says(tmp_path):
    run(compile_on_meshes, tmp_path)


def compile_on_meshes(directory):
    jax.config.update("jax_num_cpu_devices", 8)
    for name in PUBLISHED:
        config = presets.config(directory, name)
        for seq, tensor, data in ((2, 4, 1), (8, 1, 1), (2, 2, 2)):
            shape = MeshShape(seq=seq, tensor=tensor, data=data)
            mesh = sharding.make_mesh(**dataclasses.asdict(shape))
            placed = jax.sharding.NamedSharding(mesh, sharding.RULES.spec(kv_cache.AXES))
            pages = (987 + 1) * data
            stack = jax.ShapeDtypeStruct(
                (config.num_layers, config.num_kv_heads, pages, 1024, config.head_dim),
                jnp.bfloat16,
                sharding=placed,
            )
            tree = jax.tree.map(
                lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
                params.abstract(config),
                params.shardings(config, mesh),
            )
            compiled = jax.jit(lambda *_: 0, keep_unused=True).lower(tree, stack, stack).compile()
            memory = budget.memory(config, MILLION, shape)
            held = compiled.memory_analysis().argument_size_in_bytes
            assert held == memory.weights + memory.cache


def test_slices_on_meshes_take_what_they_take_by_hand(tmp_path):
    config = presets.config(tmp_path, "7b")
    tables = 262_145 * 128 * 4 + 152_064 // 4 * 4

    # In a short slice the MLP weighs most, with the matrix that is taken from the stack.
    load = dataclasses.replace(MILLION, slice_len=1024)
    memory = budget.memory(config, load, MeshShape(tensor=4))
    assert memory.activations == 2 * 1024 * (4 * 3584 + 3 * 18944 // 4)
    assert memory.workspace == tables + 2 * 3584 * 18944 // 4

    # A quarter of the tokens, but all queries of a quarter of the heads.
    memory = budget.memory(config, MILLION, MeshShape(seq=4, tensor=4))
    query = 32768 * 7 * 128
    assert memory.activations == 2 * (8192 * 4 * 3584 + 2 * 8192 * 128 + 4 * query)
    assert memory.workspace == tables + 3 * query * 8 + 4 * query


def test_sparse_slices_select_and_pack_by_hand(tmp_path):
    config = presets.config(tmp_path, "7b")
    mesh = MeshShape(seq=4, tensor=4)
    tables = 262_145 * 128 * 4 + 152_064 // 4 * 4
    dense = dataclasses.replace(MILLION, slice_len=1024)

    # In a short slice selection weighs most, for 7 heads and a quarter of the keys, or all.
    sparse = dataclasses.replace(dense, columns=22_032)
    memory = budget.memory(config, sparse, mesh)
    arrays = 7 * 987 * 1024 // 4 + 3 * 987 * 1024
    assert memory.activations == 2 * (256 * 4 * 3584 + 2 * 1024 * 128 + 1024 * 7 * 128)
    assert memory.workspace == tables + 4 * 7 * arrays

    # Of a short context, what is packed.
    packing = dataclasses.replace(sparse, tokens=1024, columns=1_000_000)
    memory = budget.memory(config, packing, mesh)
    short = 1024 * 128 * 4 + 152_064 // 4 * 4
    assert memory.activations == 2 * (256 * 4 * 3584 + 4 * 1024 * 7 * 128)
    assert memory.workspace == short + 2 * 2 * 7 * 1_000_000 * 128


def test_matrices_that_are_laid_out_anew_take_their_size_again(tmp_path):
    config = presets.config(tmp_path, "7b")
    relayouts_weights = dataclasses.replace(MILLION, relayouts_weights=True)
    for mesh in MeshShape(), MeshShape(seq=2, tensor=4):
        more = budget.memory(config, relayouts_weights, mesh).workspace
        more -= budget.memory(config, MILLION, mesh).workspace
        assert more == 2 * 28 * (28 * 128 * 3584 + 3 * 3584 * 18944) // mesh.tensor


@given(
    config=st.sampled_from(list(CONFIGS.values())[::8]),
    page=st.sampled_from([1, 64, 1024]),
    seq=st.integers(1, 9),
    sparse=st.booleans(),
    limit=st.integers(0, 1 << 34),
)
@settings(deadline=None, max_examples=50)
def test_no_page_more_fits_than_the_longest_context_has(config, page, seq, sparse, limit):
    load = Workload(
        tokens=1, page=page, slice_len=256, dtype="float32", columns=99 if sparse else None
    )
    mesh = MeshShape(seq=seq)

    def total(tokens):
        return budget.memory(config, dataclasses.replace(load, tokens=tokens), mesh).total

    longest = budget.longest(
        config, lambda tokens: dataclasses.replace(load, tokens=tokens), mesh, limit
    )
    assert longest % page == 0
    assert longest == 0 or total(longest) <= limit
    assert longest + page >= 2**31 or total(longest + page) > limit


def test_more_devices_never_hold_more(tmp_path):
    config = presets.config(tmp_path, "7b")
    held = [
        budget.memory(config, MILLION, sharding.default_mesh(config, 2**power))
        for power in range(9)
    ]
    for fewer, more in itertools.pairwise(held):
        assert more.weights <= fewer.weights
        assert more.cache < fewer.cache
        assert more.total < fewer.total


# MiB of temporary memory of the 7B model's dense slice, by T and MLP width, as libtpu 0.0.52
# compiles it for a v5p (jax 0.10.2, attention in XLA operations, 252,928 tokens of cache).
COMPILED = {
    (1024, 18944): 268.1,
    (8192, 18944): 1249.2,
    (32768, 18944): 4874.4,
    (2048, 128): 349.9,
    (8192, 128): 1249.2,
    (32768, 128): 4874.3,
}


@pytest.mark.parametrize(("slice_len", "mlp_dim"), COMPILED)
def test_a_slice_takes_what_the_compiler_for_tpus_takes(slice_len, mlp_dim, tmp_path):
    config = dataclasses.replace(presets.config(tmp_path, "7b"), mlp_dim=mlp_dim)
    load = Workload(tokens=252_928, page=1024, slice_len=slice_len)
    memory = budget.memory(config, load, MeshShape())
    tables = (262_145 * 128 + 152_064) * 4  # of rotary angles and logits: not temporary
    found = memory.activations + memory.workspace - tables
    assert found == pytest.approx(COMPILED[slice_len, mlp_dim] * 2**20, rel=0.05, abs=48 << 20)


# MiB of a window of 65,536 tokens and of temporary memory, the more of taking it out of the
# cache and putting it in, as libtpu 0.0.52 compiles them for the 7B model and a v5p.
WINDOWS = {"data=1": 3584 + 192.1, "tensor=4": 896 + 32.6, "seq=4": 896 + 289.4}


@pytest.mark.parametrize("shape", WINDOWS)
def test_a_window_takes_what_the_compiler_for_tpus_takes(shape, tmp_path):
    config = presets.config(tmp_path, "7b")
    load = Workload(tokens=1_010_000, page=1024, slice_len=1024, window=65536)
    memory = budget.memory(config, load, sharding.parse(shape))
    tables = (262_145 * 128 + 152_064 // (4 if shape == "tensor=4" else 1)) * 4
    found = memory.activations + memory.workspace - tables
    assert found == pytest.approx(WINDOWS[shape] * 2**20, rel=0.05)


@pytest.mark.parametrize(
    ("name", "layers", "attention", "linear"), [("7b", 28, 220.7, 13.7), ("14b", 48, 540.4, 27.5)]
)
def test_dense_prefill_costs_what_the_layers_but_one_cost(
    name, layers, attention, linear, tmp_path
):
    """PFLOP of all layers at 2^20 tokens, derived by hand from the published shapes."""
    found = budget.prefill_flops(presets.config(tmp_path, name), 2**20)
    assert found == pytest.approx((attention + linear) * 1e15 * (layers - 1) / layers, rel=2e-3)


@pytest.mark.parametrize("name", list(CONFIGS)[::7])
def test_a_token_multiplies_every_matrix_once_and_reads_every_key(name):
    config = CONFIGS[name]
    leaves = jax.tree.leaves_with_path(params.abstract(config))
    matrices = sum(leaf.size for path, leaf in leaves if path[-1].key == "kernel")
    if config.tie_embeddings:
        matrices += config.vocab_size * config.embed_dim
    per_key = 4 * config.num_layers * config.num_heads * config.head_dim
    assert budget.decode_flops(config, 99) == 2 * matrices + 100 * per_key
