"""The engine's steps of the published 7B model, compiled for one TPU with the kernels inside.

On generations whose memory is too small for the whole model and a million tokens, of fewer
layers: they are compiled as one loop, so the program is the same.
"""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
import tpu_compile
from flax import nnx
from hlo import sizes

from pallas_kernels.dispatch import backend
from pallas_kernels.paged_kv import PagedKV
from qwen_jax.config import ModelConfig
from qwen_jax.engine import inputs
from qwen_jax.engine.model_runner import Steps, flatten
from qwen_jax.models import rope
from qwen_jax.models.families.qwen2 import Qwen2
from qwen_jax.models.steps import PrefillStep
from qwen_jax.planner.shapes import MODELS
from qwen_jax.sparse import budgets as sparse

pytestmark = pytest.mark.optimized

pytest.importorskip("libtpu", reason="the TPU compiler (pip install libtpu) is not installed")

CONTEXT, SLICE, PAGE = 1_010_000, 32_768, 1024
TABLE = -(-CONTEXT // PAGE)
LAYERS = {"v4": 3, "v5e": 3, "v5p": 28, "v6e": 8, "tpu7x": 28}
SOON = {("v5e", "decode")}
MATRIX = [
    pytest.param(generation, name, marks=() if (generation, name) in SOON else pytest.mark.tpu_aot)
    for generation in LAYERS
    for name in ("prefill", "prefill_sparse", "decode")
]

real = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
integer = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)


def config(num_layers):
    shape = MODELS["7B"]
    return ModelConfig(
        num_layers=num_layers,
        vocab_size=152_064,
        embed_dim=3584,
        mlp_dim=18_944,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        rope_theta=1e7,
        norm_eps=1e-6,
        tie_embeddings=False,
        max_len=CONTEXT,
        weights_dtype="bfloat16",
        dual_chunk=shape.geometry,
        original_len=262_144,
    )


def step_of(name, model):
    """The engine's function, its arguments, and which of them it may overwrite."""
    module = nnx.eval_shape(lambda: Qwen2(model, key=jax.random.key(0), dtype=jnp.bfloat16))
    tree = nnx.to_pure_dict(nnx.state(module))
    weights, structure = flatten(model, tree, jnp.bfloat16)
    steps = Steps(structure, None, backend.choose("tpu"))
    shape = model.num_layers, model.num_kv_heads, TABLE + 1, PAGE, model.head_dim
    cache = PagedKV(*[jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 2)
    table = (model.dual_chunk.chunk_size + 1, model.head_dim)
    args = [weights, rope.Table(real(table)), cache]
    scale = real(())
    if name == "decode":
        slots = inputs.decode_slots((), max_seqs=1, table_len=TABLE)
        token = inputs.decode(
            (), max_seqs=1, page_table=slots.page_table, scales=lambda _: (1.0, 1.0)
        )
        seen = jax.ShapeDtypeStruct((1, model.vocab_size), jnp.bool)
        return steps.decode, [*args, seen, slots.sampling, token], (2, 3)
    step = PrefillStep(
        tokens=integer((SLICE,)),
        start=integer(()),
        length=integer(()),
        page_table=integer((TABLE,)),
        query_scale=scale,
        key_scale=scale,
    )
    if name == "prefill":
        return steps.prefill, [*args, step], (2,)
    heads = integer((model.num_layers, model.num_heads))
    budgets = sparse.Budgets(
        vertical=heads,
        slash=heads,
        least_recall=scale,
        last_q=64,
        num_columns=MODELS["7B"].num_columns,
        tiles=sparse.TPU_TILES,
    )
    return steps.prefill_sparse, [*args, step, budgets], (2,)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("generation", "name"), MATRIX)
def test_a_step_over_a_million_tokens_fits_and_never_copies_the_cache(generation, name):
    model = config(LAYERS[generation])
    mesh = tpu_compile.mesh(generation)
    function, args, donated = step_of(name, model)
    compiled = tpu_compile.compiled(mesh, function, *args, donate_argnums=donated)
    used, text = compiled
    shape = args[2].keys.shape
    cache_bytes = 2 * 2 * math.prod(shape)
    assert used.alias_size_in_bytes >= cache_bytes
    assert used.argument_size_in_bytes + used.temp_size_in_bytes < tpu_compile.memory_of(mesh)
    assert text.count('custom_call_target="tpu_custom_call"') >= {"prefill": 2, "decode": 1}.get(
        name, 5
    )
    layer = math.prod(shape[1:])
    assert not sizes(text, "copy", "copy-start", "transpose") & {layer, math.prod(shape)}
    assert layer not in sizes(text)
