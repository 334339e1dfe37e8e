"""Arrays of one step, in numpy, padded to the few shapes that are compiled."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, Int32

from qwen_jax.engine.request import Sampling, Sequence
from qwen_jax.engine.sampler import Rows
from qwen_jax.models.steps import DecodeStep, PrefillStep


class SampleStep(NamedTuple):
    """How the token after a slice is chosen.

    Attributes:
        row: row of the sequence in decode batches.
        sampling: one row.
    """

    row: Int32[np.ndarray, ""]
    sampling: Rows


class DecodeSlots(NamedTuple):
    """Who decodes in which row: the part of a decode step that seldom changes.

    Attributes:
        page_table: as in `DecodeStep`; zeros in idle rows.
        sampling: its `position` is not used.
    """

    page_table: Int32[np.ndarray | jax.Array, "B P"]
    sampling: Rows


def prefill(
    tokens: tuple[int, ...],
    *,
    size: int,
    start: int,
    pages: list[int],
    table_len: int,
    scales: tuple[float, float],
) -> PrefillStep:
    """The slice of `tokens` that starts at position `start`, padded to `size`."""
    padded = np.zeros(size, np.int32)
    padded[: len(tokens)] = tokens
    return PrefillStep(
        tokens=padded,
        start=np.asarray(start, np.int32),
        length=np.asarray(len(tokens), np.int32),
        page_table=table(pages, table_len),
        query_scale=np.asarray(scales[0], np.float32),
        key_scale=np.asarray(scales[1], np.float32),
    )


def sample_step(sampling: Sampling, *, row: int, position: int) -> SampleStep:
    """The choice of the token at `position`."""
    rows = _rows(1, [(0, sampling)])
    rows.position[0] = position
    return SampleStep(row=np.asarray(row, np.int32), sampling=rows)


def decode_slots(sequences: Iterable[Sequence], *, max_seqs: int, table_len: int) -> DecodeSlots:
    """The roster of the sequences that decode."""
    tables = np.zeros((max_seqs, table_len), np.int32)
    settings = []
    for sequence in sequences:
        tables[sequence.row] = table(sequence.pages, table_len)
        settings.append((sequence.row, sequence.request.sampling))
    return DecodeSlots(page_table=tables, sampling=_rows(max_seqs, settings))


def decode(
    sequences: Iterable[Sequence],
    *,
    max_seqs: int,
    page_table: Int[np.ndarray | jax.Array, "B P"],
    scales: Callable[[int], tuple[float, float]],
) -> DecodeStep:
    """The last token of every answer; `scales` are those of the length with it."""
    step = DecodeStep(
        tokens=np.zeros(max_seqs, np.int32),
        positions=np.full(max_seqs, -1, np.int32),
        page_table=page_table,
        query_scale=np.ones(max_seqs, np.float32),
        key_scale=np.ones(max_seqs, np.float32),
    )
    for sequence in sequences:
        row = sequence.row
        step.tokens[row] = sequence.answer[-1]
        step.positions[row] = sequence.filled
        step.query_scale[row], step.key_scale[row] = scales(sequence.filled + 1)
    return step


def table(pages: list[int], table_len: int) -> Int[np.ndarray, " P"]:
    """Pages of a sequence in order; 0 beyond them."""
    padded = np.zeros(table_len, np.int32)
    padded[: len(pages)] = pages
    return padded


def _rows(count: int, settings: Iterable[tuple[int, Sampling]]) -> Rows:
    def full(value: float) -> Float[np.ndarray, " B"]:
        return np.full(count, value, np.float32)

    rows = Rows(
        temperature=full(0.0),
        top_k=np.zeros(count, np.int32),
        top_p_complement=full(0.0),
        min_p=full(0.0),
        penalty=full(1.0),
        seed=np.zeros(count, np.uint32),
        position=np.zeros(count, np.int32),
    )
    for row, sampling in settings:
        rows.temperature[row] = sampling.temperature
        rows.top_k[row] = sampling.top_k
        rows.top_p_complement[row] = 1 - sampling.top_p
        rows.min_p[row] = sampling.min_p
        rows.penalty[row] = sampling.repetition_penalty
        rows.seed[row] = sampling.seed
    return rows
