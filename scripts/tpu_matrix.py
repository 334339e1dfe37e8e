"""Memory and traffic of every kernel on five TPU generations at a million tokens.

The first table compiles each kernel for one device of the smallest mesh that holds model and
cache, and shows what it needs beside its arguments and results. The second counts what kernels
copy from the cache, by the loops that they run, against what they must.

Nothing is run, so no times are measured. Needs `pip install libtpu`.

    python scripts/tpu_matrix.py [--generations v5e,v6e] [--bytes]
"""

import argparse
import os
from collections.abc import Iterator

from tpu_compile import ENVIRONMENT, GENERATIONS, compiled, memory_of, mesh
from tpu_schedule import CONTEXT


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--generations", default=",".join(GENERATIONS))
    parser.add_argument("--bytes", action="store_true", help="the second table")
    args = parser.parse_args()
    print("\n".join(traffic()) if args.bytes else header(), flush=True)
    if not args.bytes:
        for generation in args.generations.split(","):
            for row in matrix(generation):
                print(row, flush=True)


def header() -> str:
    from pallas_kernels.programs import PROGRAMS

    names = "TPU", "model", "devices", "heads", "tokens", "cache", *PROGRAMS
    return f"| {' | '.join(names)} |\n{'|---' * len(names)}|"


def matrix(generation: str) -> Iterator[str]:
    """Yields a row for each model, and one for a KV head with all tokens on one device."""
    import jax

    from pallas_kernels.programs import PROGRAMS, inputs, program
    from qwen_jax.planner.shapes import MODELS

    device = mesh(generation)
    cases = {name: model.share(CONTEXT, memory_of(device)) for name, model in MODELS.items()}
    cases["7B, 14 layers"] = MODELS["7B"].served(CONTEXT, tensor=4, num_layers=14)
    for model, case in cases.items():
        temps = []
        for name in PROGRAMS:
            args = jax.eval_shape(lambda name=name, case=case: inputs(name, case))
            try:
                done = compiled(device, program(name, case, "mosaic_tpu"), *args)
                temps.append(f"{done.memory.temp_size_in_bytes / 1e6:,.1f} MB")
            except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
                temps.append(f"no: {str(error).splitlines()[0]}")
        cells = (
            generation,
            model,
            " x ".join(map(str, case.parts)) if model in MODELS else "a head",
            f"{case.num_heads} / {case.num_kv_heads}",
            f"{-(-CONTEXT // case.parts[1]) if model in MODELS else CONTEXT:,}",
            f"{case.cache_bytes / 1e9:.1f} GB",
            *temps,
        )
        yield f"| {' | '.join(cells)} |"


def traffic() -> Iterator[str]:
    """Yields rows of the keys that kernels copy from the cache per KV head, over the minimum."""
    import numpy as np

    from pallas_kernels.decode import mosaic_tpu as decode
    from pallas_kernels.prefill import mosaic_tpu as prefill
    from qwen_jax.planner.shapes import MODELS

    yield "| what | model | copied | least | ratio |"
    yield "|---|---|---|---|---|"
    for name, model in MODELS.items():
        token_bytes = 2 * model.num_kv_heads * model.head_dim
        for context in (1_000, 32_768, 100_001, CONTEXT):
            block = decode.block_of(1024, -(-context // 1024), token_bytes)
            blocks = np.arange(-(-context // block))
            copied = int(decode.fetched(context, blocks, page=1024, block=block).sum())
            least = context
            yield (
                f"| decode after {context:,} | {name} | {copied:,} keys | {least:,} keys "
                f"| {copied / least:.4f} |"
            )
    slice_len = 32_768
    for name, model in MODELS.items():
        sizes = prefill.TILES
        group = model.num_heads // model.num_kv_heads
        rows = max(sizes.q // group // prefill.LANES, 1) * prefill.LANES
        for end in (slice_len, CONTEXT):
            lasts = [
                min(end - slice_len + first + rows, end) for first in range(0, slice_len, rows)
            ]
            copied = sum(-(-last // sizes.k) * sizes.k for last in lasts)
            yield (
                f"| prefill of the last {slice_len:,} of {end:,}, {rows} positions a tile "
                f"| {name} | {copied:,} keys | {sum(lasts):,} keys | {copied / sum(lasts):.4f} |"
            )


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    main()
