"""Decode in XLA operations, in tiles of several sizes, and the reference, against float64."""

from types import MappingProxyType

from support import sequences
from support.decode_cases import Decode, batch
from support.sequences import after

from pallas_kernels.cases import CASES
from pallas_kernels.decode import reference, xla


def batches():
    """Consecutive tokens lie on both sides of each border of chunks in some row."""
    for name, case in CASES.items():
        last = 11 * case.page - 1
        rows = [after(0), after(case.page - 1, 3), [], after(case.page, 2), after(last - 2, 3)]
        if case.geometry is not None:
            rows += [after(case.geometry.chunk_len * n - 1, 3) for n in (1, 2, 3)]
        shape = {
            "G": case.num_heads // case.num_kv_heads,
            "K": case.num_kv_heads,
            "H": case.head_dim,
            "page": case.page,
        }
        for dtype in ("float32", "bfloat16"):
            for count in (1, 3):
                cut = [row[:count] for row in rows]
                said = f"{name}, {count} tokens, {dtype}"
                yield batch(said, cut, case.geometry, dtype=dtype, **shape)
    case = CASES["tiles fit the chunk"]
    shape = {"K": case.num_kv_heads, "H": case.head_dim, "page": case.page}
    yield batch("an idle token after two", [after(17, 2), after(30, 3)], case.geometry, **shape)


BATCHES = tuple(batches())


class Reference(sequences.Sequences):
    function = staticmethod(reference.decode)


class Xla(sequences.Sequences):
    function = staticmethod(xla.decode)


class TestReference(Decode):
    sequences = Reference
    batches = BATCHES


class TestXla(Decode):
    sequences = Xla
    batches = BATCHES


class TestXlaInTiles(Decode):
    """Tiles so small that a page has several."""

    sequences = Xla
    batches = BATCHES
    usual = MappingProxyType({"tile": 4})
