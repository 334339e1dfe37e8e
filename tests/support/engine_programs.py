"""Every program of an engine that is given the cache, compiled as the engine compiles it."""

import contextlib
import dataclasses
import inspect
import math

import jax
import numpy as np
from hlo import copies

from pallas_kernels.geometry import ChunkGeometry
from qwen_jax.config import SparseConfig
from qwen_jax.distributed import sharding
from qwen_jax.engine import inputs
from qwen_jax.engine.engine import Engine, EngineConfig
from qwen_jax.models import params
from qwen_jax.sparse import budgets
from qwen_jax.sparse.recall import Grid
from support import random_models

LAYERS = 48  # so many that one array of the cache is larger than all that a step needs
CONFIG = dataclasses.replace(
    random_models.config(
        heads=(4, 2),
        head_dim=48,
        vocab_size=64,
        dual_chunk=ChunkGeometry(208, 52),
        original_len=128,
    ),
    num_layers=LAYERS,
)
PAGE, SLICE, WINDOW = 104, 128, 160  # no product of which is the size of a layer of the cache
BUDGETS = SparseConfig(vertical=((40,) * 4,) * LAYERS, slash=((40,) * 4,) * LAYERS, last_q=16)
GRID = Grid(vertical=(8, 16), slash=(8, 16), last_q=8, tiles=budgets.TILES)


def engine(pages: int, rows: int, shape: sharding.MeshShape | None = None) -> Engine:
    """One whose sequences have so many pages, of float32."""
    if shape is None:
        weights, seq = jax.device_put(random_models.weights(CONFIG)), 1
    else:
        mesh = sharding.make_mesh(jax.devices()[: shape.size], **dataclasses.asdict(shape))
        places, seq = params.shardings(CONFIG, mesh), shape.seq
        weights = jax.device_put(random_models.weights(CONFIG), places)
    page = PAGE * seq
    return Engine(
        CONFIG,
        weights,
        EngineConfig(
            max_len=pages * page, max_seqs=rows, page=page, slices=(SLICE,), sparse=BUDGETS
        ),
    )


def check(engine: Engine, *names: str) -> set[str]:
    """Asserts that programs copy neither the cache nor a layer of it; all, if none are named.

    Returns:
        The names of those that were looked at.
    """
    cache = engine.runner.cache.keys
    shape = cache.sharding.shard_shape(cache.shape)
    one_array = math.prod(shape) * cache.dtype.itemsize
    checked = set()
    for name, compiled in programs(engine, names):
        text, memory = compiled.as_text(), compiled.memory_analysis()
        assert not copies(text, shape), (name, copies(text, shape))
        in_place = name != "extract_kv"
        assert memory.alias_size_in_bytes >= in_place * 2 * one_array, name
        # Two pages are on their way from one place to the other.
        on_the_way = 2 * one_array // shape[2] if name == "copy_page" else 0
        assert memory.temp_size_in_bytes < max(one_array, 1.1 * on_the_way), name
        checked.add(name)
    return checked


def programs(engine: Engine, names: tuple[str, ...]):
    """The name of each program, and what the compiler made of it."""
    runner = engine.runner
    for name, args, options in calls(engine):
        if not names or name in names:
            program = jitted(getattr(runner.programs, name))
            mesh = contextlib.nullcontext() if runner.mesh is None else jax.set_mesh(runner.mesh)
            with mesh:
                yield name, program.lower(*args, **options).compile()


def calls(engine: Engine):
    """Name, arguments and options of each program, as the engine calls it."""
    runner, table_len, max_seqs = engine.runner, engine.layout.table_len, engine.max_seqs
    cache, model = runner.cache, (runner.weights, runner.rotary, runner.cache)
    number, table = np.int32(0), np.zeros(table_len, np.int32)
    shape = runner.window(WINDOW)
    step = inputs.prefill(
        (0,) * SLICE, size=SLICE, start=0, pages=[], table_len=table_len, scales=(1.0, 1.0)
    )
    slots = runner.place(inputs.decode_slots((), max_seqs=max_seqs, table_len=table_len))
    token = inputs.decode(
        (), max_seqs=max_seqs, page_table=slots.page_table, scales=lambda _: (1.0, 1.0)
    )
    yield "prefill", (*model, step), {}
    yield "prefill_sparse", (*model, step, runner.budgets), {}
    yield "score", (*model, step), {}
    yield "score_sparse", (*model, step, runner.budgets), {}
    yield "decode", (*model, runner.seen, slots.sampling, token), {}
    yield "decode_logprobs", (*model, runner.seen, slots.sampling, token), {}
    yield "extract_kv", (cache, table, number), {"size": WINDOW}
    yield "insert_kv", (cache, shape, shape, table, number, number), {}
    yield "copy_page", (cache, number, number), {}
    if runner.mesh is None:
        yield "sparse_plan", (*model, step, runner.budgets), {"layer": 1}
        yield "survey", (*model, step), {"grid": GRID}


def jitted(function):
    """Unwraps a program of the runner to the jitted function."""
    return inspect.unwrap(function, stop=lambda each: hasattr(each, "lower"))
