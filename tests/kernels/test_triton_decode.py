"""Decode in Triton's interpreter: unread memory holds nan, as does what no kernel writes."""

from types import MappingProxyType

import jax.numpy as jnp
import pytest
from hypothesis import strategies as st
from support import sequences
from support.decode_cases import AnyBatch, Sharded, batch
from support.sequences import after
from support.triton_interpreter import interpreted  # noqa: F401

from pallas_kernels.dispatch.backend import Unsupported
from pallas_kernels.geometry import ChunkGeometry

triton = pytest.importorskip("pallas_kernels.decode.triton")
pytestmark = pytest.mark.usefixtures("interpreted")


class Sequences(sequences.Sequences):
    function = staticmethod(triton.decode)


SHAPES = {
    "tiles of a page": {"page": 32},
    "heads that share keys": {"page": 64, "K": 2, "G": 7},
    "pages smaller than a tile": {"page": 8, "G": 1, "K": 3},
    "pages of no whole number of tiles": {"page": 24, "G": 3},
    "bfloat16": {"page": 32, "K": 2, "dtype": "bfloat16"},
}


LENGTHS = [
    after(0),
    [],
    after(14),
    after(15),
    [],
    after(16),
    after(63),
    after(64),
    after(95, 3),
    [],
]
RUNS = [after(3), after(700), [], after(77, 2), after(170)]  # up to 44 runs of a tile
SERVED = {"page": 128, "G": 7, "H": 128, "options": {"tile": None}}


def across(length):
    """One to eight tokens across a border of chunks of this length."""
    first = 32 // length * length + 2 * length
    rows = [after(first - 1 - n // 2, n) for n in range(1, 9)]
    return batch(f"across a border of chunks of {length}", rows, ChunkGeometry(length + 3, 3))


class TestDecode(AnyBatch, Sharded):
    sequences = Sequences
    usual = MappingProxyType({"tile": 16})
    batches = (
        *(
            batch(name, LENGTHS, ChunkGeometry(43, 11), options={"programs": 8}, **shape)
            for name, shape in SHAPES.items()
        ),
        batch("one window", [after(255), [], after(130, 2)], None, options={"tile": 32}),
        *map(across, (32, 41, 5)),
        batch(
            "more rows than one product has", [after(37, 12), after(5)], ChunkGeometry(40, 8), G=7
        ),
        *(
            batch(
                f"sizes that are served, {dtype}",
                [after(300), after(70)],
                ChunkGeometry(160, 32),
                dtype=dtype,
                **SERVED,
            )
            for dtype in ("float32", "bfloat16")
        ),
        *(
            batch(
                f"{programs} programs",
                RUNS,
                ChunkGeometry(100, 36),
                G=14,
                options={"programs": programs, "num_stages": 1},
            )
            for programs in (1, 5, 64)
        ),
    )
    cuts = (None, ChunkGeometry(420, 84), ChunkGeometry(100, 20), ChunkGeometry(30, 19))
    cut_rows = (after(0), [], after(30, 4), after(95), after(290), after(306, 3))
    part = 32
    drawn = MappingProxyType(
        {
            "page": st.sampled_from([4, 16, 40, 64]),
            "dtype": st.sampled_from(["float32", "bfloat16"]),
        }
    )
    drawn_options = MappingProxyType(
        {"tile": st.sampled_from([16, 32]), "programs": st.integers(1, 20)}
    )
    most = 180, 4, 4


def test_what_no_product_takes_is_refused():
    with pytest.raises(Unsupported, match="head_dim=24 must be one of 16, 32"):
        Sequences([after(5)], None, H=24).decode()
    batch = Sequences([after(5)], None)
    batch.queries = batch.queries.astype(jnp.bfloat16)
    with pytest.raises(Unsupported, match="queries are bfloat16, keys float32"):
        batch.decode()
