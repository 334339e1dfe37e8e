"""Dense against sparse prefill with Dual Chunk Attention, on the demo model and a real text.

Budgets are those of docs/demo, calibrated on other texts; the text is Python's own language
reference, as the interpreter carries it. The two take turns in one process, in float32. Then
attention alone: the operations of single layers, on what the model computes for the last slice.

    python scripts/bench_sparse.py
        [--lengths 8192,16384,32768] [--repeats 1] [--layers 3,12,21] [--slice 4096]
"""

import argparse
import dataclasses
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version

import demo_model
import jax
import jax.numpy as jnp
from bench import commit
from demo_long import BUDGETS

from convert import weights
from pallas_kernels import plan
from pallas_kernels.dispatch.backend import compiler_options
from pallas_kernels.dispatch.tiles import Tiles, of_page
from pallas_kernels.prefill import prefill
from pallas_kernels.select import select
from qwen_jax.cli.bench import run
from qwen_jax.engine.engine import Engine, EngineConfig
from qwen_jax.engine.layout import EngineLayout
from qwen_jax.models import rope
from qwen_jax.models.configs import model_config, sparse_config
from qwen_jax.models.decoder import Decoder
from qwen_jax.sparse import budgets as sparse
from qwen_jax.text.tokenizer import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", default="8192,16384,32768")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--layers", default="3,12,21")
    parser.add_argument("--slice", type=int, help="prompt tokens computed at a time")
    args = parser.parse_args()
    lengths = [int(text) for text in args.lengths.split(",")]
    layers = [int(text) for text in args.layers.split(",")]
    directory = demo_model.cache_dir()
    demo_model.fetch(directory)
    ids = Tokenizer.load(directory).encode_text(reference_text())
    model = model_config(directory)
    found = sparse_config(directory, model, BUDGETS)
    assert found is not None
    budgets = dataclasses.replace(found, threshold=0)
    tree = weights.load(directory, dtype=jnp.dtype("float32"))
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; "
        f"Python {platform.python_version()}, jax {version('jax')}; commit {commit()}\n"
    )
    layout = EngineLayout.resolve(
        model, EngineConfig(max_len=max(lengths), sparse=budgets), platform=jax.default_backend()
    )
    slices = layout.slices
    if args.slice is not None:
        slices = (args.slice,)

    def engine(found):
        settings = EngineConfig(max_len=max(lengths) + 2, sparse=found, slices=slices)
        return Engine(model, tree, settings)

    ways = {"dense": engine(None), "sparse": engine(budgets)}
    print(ways["sparse"].describe(), file=sys.stderr)
    for way in ways.values():
        run(way, tuple(ids[: min(slices[0] + 1, max(lengths))][::-1]), 2)  # compiles
    print("| prefill | dense | sparse | ratio |\n|---|---|---|---|")
    for length in lengths:
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(args.repeats):
            # Another text each time, lest its pages are found in the cache.
            text = tuple(ids[repeat + 1 : repeat + 1 + length])
            for name, way in ways.items():
                seconds[name].append(run(way, text, 1)[0])
        dense, short = (statistics.median(seconds[name]) for name in ways)
        print(f"| {length:,} | {dense:.1f} s | {short:.1f} s | {dense / short:.2f} |", flush=True)
    del ways
    print(
        "\n| attention of the last slice, layer | dense | sparse | of it selection | density "
        "| ratio x density |\n|---|---|---|---|---|---|"
    )
    longest = max(lengths)
    for row in attention(model, tree, budgets, tuple(ids[:longest]), layers, slices):
        print(f"| {longest:,}, {row}", flush=True)


def reference_text() -> str:
    """Python's language reference, in prose."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def attention(model, tree, budgets, ids, layers, slices):
    """A row of the table for each layer, medians of 5 calls that take turns."""
    engine = Engine(model, tree, EngineConfig(max_len=len(ids), slices=slices, sparse=budgets))
    *_, (start, length, step) = _prefilled(engine, ids)
    runner, last_q = engine.runner, budgets.last_q
    on_device = sparse.budgets(budgets)
    options = compiler_options(jax.default_backend())
    geometry = model.dual_chunk
    at = jnp.int32(start), jnp.int32(length)
    page_table = jnp.asarray(step.page_table)
    cache = runner.cache
    T = len(step.tokens)
    tiles = Tiles(min(T, on_device.tiles.q), of_page(cache.page, on_device.tiles.k))

    def inputs(leaves, cache, rotary, step, layer):
        decoder: Decoder = runner._steps._model(leaves)
        votes = decoder._voter_angles(step, rotary, last_q)
        context = decoder._context(step, rotary, None)

        def attend(module, x, state, context):
            i = context.layer
            out, cache = module.prefill(x, state[0], context)
            scale = step.query_scale * jnp.float32(module.scale)
            query = module.q(x)
            queries = rope.rotate_views(query, context.angles.query, scale)
            tail = jax.lax.dynamic_slice_in_dim(query, length - last_q, last_q)
            voters = rope.rotate_views(tail, votes, scale)
            kept = jax.tree.map(
                lambda new, old: jnp.where(i == layer, new, old), (queries, voters), state[1]
            )
            return out, (cache, kept)

        N, H = model.num_heads, model.head_dim
        empty = jnp.zeros((3, T, N, H)), jnp.zeros((3, last_q, N, H))
        _, (_, kept) = decoder._layers(context, (cache, empty), attend, skip=0)
        return kept

    def choose(voters, cache, layer):
        found = select(
            voters,
            cache,
            layer,
            page_table,
            *at,
            on_device.vertical[layer],
            on_device.slash[layer],
            geometry=geometry,
        )
        return plan.build(
            *found,
            *at,
            num_queries=T,
            num_columns=on_device.num_columns,
            tiles=tiles,
        )

    def attend(queries, cache, layer, listed=None):
        return prefill(
            queries,
            cache,
            layer,
            page_table,
            *at,
            geometry=geometry,
            plan=listed,
        )

    jit = jax.jit
    capture = jit(inputs, compiler_options=options)
    calls = {
        "dense": jit(lambda q, v, c, i: attend(q, c, i), compiler_options=options),
        "sparse": jit(
            lambda q, v, c, i: attend(q, c, i, choose(v, c, i)), compiler_options=options
        ),
        "selection": jit(lambda q, v, c, i: choose(v, c, i), compiler_options=options),
    }
    for number in layers:
        layer = jnp.int32(number)
        queries, voters = capture(runner.weights, cache, runner.rotary, step, layer)
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(6):
            for name, call in calls.items():
                begin = time.perf_counter()
                jax.block_until_ready(call(queries, voters, cache, layer))
                if turn:
                    seconds[name].append(time.perf_counter() - begin)
        dense, short, chosen = (1e3 * statistics.median(each) for each in seconds.values())
        listed = calls["selection"](queries, voters, cache, layer)
        density = float(plan.density(listed, *at).mean())
        yield (
            f"{number} | {dense:.0f} ms | {short:.0f} ms | {chosen:.0f} ms ({chosen / short:.0%}) "
            f"| {density:.3f} | {dense / short * density:.2f} |"
        )


def _prefilled(engine: Engine, ids: tuple[int, ...]):
    """Start, length and step of each slice, run on the engine's cache but for the last."""
    cuts = [(start, length, step) for start, length, step in engine.cuts(ids)]
    for start, length, step in cuts:
        if start + length < len(ids):
            engine.runner.prefill_sparse(step)
        yield start, length, step


if __name__ == "__main__":
    main()
