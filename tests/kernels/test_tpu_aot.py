"""Every kernel, compiled for five TPU generations by their compiler, at the shapes that they serve.

A million tokens and slices of 32,768, on one device of the smallest mesh that fits them. The
default suite compiles a few; the rest takes minutes: `make test-tpu-aot`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
import tpu_compile
from hlo import sizes
from jax.sharding import PartitionSpec

from pallas_kernels import check
from pallas_kernels.programs import PROGRAMS, inputs, program
from pallas_kernels.shard import Shard
from qwen_jax.planner.shapes import MODELS
from qwen_jax.sparse import budgets

pytestmark = pytest.mark.optimized

pytest.importorskip("libtpu", reason="the TPU compiler (pip install libtpu) is not installed")

CONTEXT = 1_010_000
SOON = {("v5e", "7B")}
MATRIX = [
    pytest.param(
        generation,
        model,
        name,
        marks=() if (generation, model) in SOON else pytest.mark.tpu_aot,
    )
    for generation in tpu_compile.GENERATIONS
    for model in MODELS
    for name in PROGRAMS
]


@functools.cache
def device(generation):
    mesh = tpu_compile.mesh(generation)
    return mesh, tpu_compile.memory_of(mesh)


def check_fits(mesh, memory, name, case, function=None, more=0):
    """Compiles, fits, reads the cache where it lies, and holds little beside what it is given."""
    args = jax.eval_shape(lambda: inputs(name, case))
    function = function or program(name, case, "mosaic_tpu")
    compiled = tpu_compile.compiled(mesh, function, *args)
    used = compiled.memory
    queries = next(leaf for leaf in args if getattr(leaf, "ndim", 0) >= 4)
    given = used.argument_size_in_bytes
    assert given >= case.cache_bytes // (2 if name == "selection" else 1)
    assert given + used.output_size_in_bytes + used.temp_size_in_bytes < memory
    most = bound(name, case, queries.size * queries.dtype.itemsize)
    assert used.temp_size_in_bytes <= most + more
    layer = case.num_kv_heads * case.num_pages * case.page * case.head_dim
    made = sizes(compiled.text)
    assert not made & {layer * count for count in (1, case.num_layers)}
    assert max(made) < layer * case.num_layers


def bound(name, case, query_bytes):
    """Bytes that a program may hold beside its arguments and results."""
    if name == "decode":
        return 2**20
    if name == "selection":
        return 2**22
    # The queries scaled, and as the kernel takes them; of a plan the packed columns.
    columns = 2 * 2 * case.num_heads * case.num_columns * case.head_dim
    return 2**22 + 2 * query_bytes + (2 * columns if name == "sparse prefill" else 0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("generation", "model", "name"), MATRIX)
def test_a_kernel_compiles_at_what_a_device_holds_of_a_million_tokens(generation, model, name):
    mesh, memory = device(generation)
    check_fits(mesh, memory, name, MODELS[model].share(CONTEXT, memory))


@pytest.mark.tpu_aot
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("generation", tpu_compile.GENERATIONS)
def test_a_kv_head_with_a_million_tokens_compiles_for_one_device(generation, name):
    mesh, memory = device(generation)
    case = MODELS["7B"].served(CONTEXT, tensor=4, num_layers=14)
    check_fits(mesh, memory, name, case)


@pytest.mark.tpu_aot
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("generation", tpu_compile.GENERATIONS)
def test_a_quarter_of_each_page_compiles_for_one_of_four_devices(generation, name):
    _, memory = device(generation)
    mesh, count = tpu_compile.mesh(generation, 4), 4
    whole = MODELS["7B"].served(CONTEXT, tensor=4)
    case = dataclasses.replace(whole, context=CONTEXT // count, page=whole.page // count)

    def local(*args):
        shard = Shard(jax.lax.axis_index("seq"), case.page, count, "seq")
        return program(name, case, "mosaic_tpu", shard=shard)(*args)

    # What each device holds is described as the same on all.
    same = PartitionSpec()
    shards = jax.shard_map(local, mesh=mesh, in_specs=same, out_specs=same, check_vma=False)
    # What is handed on is as large as the votes by diagonal, and may be laid out anew.
    handed_on = 3 * 4 * 8 * case.context if name == "selection" else 0
    check_fits(mesh, memory, name, case, shards, handed_on)


@pytest.mark.tpu_aot
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("generation", tpu_compile.GENERATIONS)
def test_thirty_two_sequences_decode_in_one_step(generation):
    mesh, memory = device(generation)
    case = MODELS["7B"].served(32_768, tensor=4, num_seqs=32, num_pages=32 * 32 + 1)
    check_fits(mesh, memory, "decode", case)


@pytest.mark.tpu_aot
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("who", ["mosaic_tpu", "xla"])
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_what_an_engine_compares_at_first_contact_compiles(generation, name, who):
    mesh, _ = device(generation)
    shape = MODELS["7B"].compared(dtype="bfloat16", plan=budgets.TPU_TILES)
    for place in check.places(shape):
        _, _, args = next(iter(check.inputs(name, shape, place)))
        run = check.compiled(name, who, place.geometry, "tpu")
        if who == "xla":  # the truth that it is compared with
            exact = check.exact(name, place.truth, place.geometry)
            run = functools.partial(exact, head=jnp.int32(0))
        used = tpu_compile.compiled(mesh, run, args).memory
        assert used.argument_size_in_bytes < 2**28
        assert used.output_size_in_bytes + used.temp_size_in_bytes < 2**29


@pytest.mark.parametrize(
    ("memory", "model", "parts"),
    [
        (17_200_000_000, "7B", (4, 4)),
        (17_200_000_000, "14B", (8, 4)),
        (34_400_000_000, "7B", (4, 1)),
        (103_000_000_000, "14B", (4, 1)),
    ],
)
def test_a_share_leaves_room_and_is_the_smallest_that_does(memory, model, parts):
    case = MODELS[model].share(CONTEXT, memory)
    assert case.parts == parts
    weights = MODELS[model].weight_bytes // parts[0]
    assert case.cache_bytes + weights <= 0.6 * memory
    assert case.num_pages - 1 == -(-987 // parts[1])
