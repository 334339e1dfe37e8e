"""The compiled sparse step of the published 7B shape with a million tokens of cache."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from support.random_models import smallest

from pallas_kernels.dispatch.backend import compiler_options
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.paged_kv import PagedKV
from qwen_jax.models import rope
from qwen_jax.models.families.qwen2 import Qwen2
from qwen_jax.models.steps import PrefillStep
from qwen_jax.sparse import budgets as sparse

pytestmark = pytest.mark.optimized

# The attention of the 7B model; all else is small, so that what is measured is attention.
MODEL = smallest(
    num_layers=28,
    vocab_size=300,
    embed_dim=256,
    mlp_dim=64,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    rope_theta=1e7,
    max_len=1_010_000,
    weights_dtype="float32",
    dual_chunk=ChunkGeometry(chunk_size=262144, local_size=8192),
    original_len=262144,
)
SLICE, PAGE, TABLE = 256, 1024, 987


@pytest.mark.usefixtures("unchecked")
def test_a_sparse_step_indexes_its_cache_in_place_and_holds_votes_but_no_scores():
    assert MODEL.max_len <= TABLE * PAGE
    module = nnx.eval_shape(lambda: Qwen2(MODEL, key=jax.random.key(0), dtype=jnp.float32))
    graph, state = nnx.split(module)
    number = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    integer = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    shape = MODEL.num_layers, MODEL.num_kv_heads, TABLE + 1, PAGE, MODEL.head_dim
    heads = MODEL.num_layers, MODEL.num_heads
    step = PrefillStep(
        tokens=integer((SLICE,)),
        start=integer(()),
        length=integer(()),
        page_table=integer((TABLE,)),
        query_scale=number(()),
        key_scale=number(()),
    )
    budgets = sparse.Budgets(
        vertical=integer(heads),
        slash=integer(heads),
        least_recall=number(()),
        last_q=64,
        num_columns=22032,
        tiles=sparse.TILES,
    )
    rotary = rope.Table(number((MODEL.dual_chunk.chunk_size + 1, MODEL.head_dim)))

    def run(state, cache, step, rotary, budgets):
        return nnx.merge(graph, state).prefill_sparse(cache, step, rotary, budgets)

    compiled = (
        jax.jit(run, donate_argnames="cache")
        .lower(state, PagedKV(number(shape), number(shape)), step, rotary, budgets)
        .compile(compiler_options=compiler_options("cpu"))
    )
    memory = compiled.memory_analysis()
    cache_bytes = 2 * 4 * math.prod(shape)
    assert memory.alias_size_in_bytes >= cache_bytes
    votes = MODEL.num_heads * TABLE * PAGE
    assert memory.temp_size_in_bytes < 10 * 4 * votes < cache_bytes / 80

    # The cache keeps its five dimensions, each indexed for itself: no index comes near 2^31.
    # Nothing else is larger than a number for each head and key, of which diagonals reach past
    # the end of their page, but for the rotary table.
    found = re.findall(r"\b[a-z]\w*\[([\d,]+)\]", compiled.as_text())
    sizes = {tuple(map(int, dims.split(","))) for dims in found}
    assert math.prod(shape) > 6 * 2**31
    assert shape in sizes
    others = sizes - {shape, rotary.rows.shape}
    past = (PAGE + budgets.last_q) / PAGE
    assert votes <= max(math.prod(dims) for dims in others) < 1.01 * past * votes
