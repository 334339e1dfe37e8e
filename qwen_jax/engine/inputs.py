"""Inputs of one step as numpy arrays, padded to the few shapes that are compiled."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, Int32

from qwen_jax.engine.request import Sampling, Sequence
from qwen_jax.engine.sampler import Rows
from qwen_jax.models.steps import DecodeStep, PrefillStep


class SampleStep(NamedTuple):
    """Inputs for sampling the token after a slice.

    Attributes:
        row: row of the sequence in decode batches.
        sampling: its sampling settings, a batch of one row.
    """

    row: Int32[np.ndarray, ""]
    sampling: Rows


class DecodeSlots(NamedTuple):
    """Assignment of sequences to decode rows: the part of a decode step that seldom changes.

    Attributes:
        page_table: as in `DecodeStep`; zeros in idle rows.
        sampling: sampling settings of each row, whose `position` is not used.
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
    """Builds the prefill step of a slice.

    Args:
        tokens: token ids of the slice, at most `size`.
        size: padded length of the slice.
        start: position of its first token in the sequence.
        pages: cache pages of the sequence, in order.
        table_len: length to which the page table is padded.
        scales: factors on queries and keys.
    """
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
    """Builds the inputs for sampling the token at `position` of the sequence in `row`."""
    rows = _rows(1, [(0, sampling)])
    rows.position[0] = position
    return SampleStep(row=np.asarray(row, np.int32), sampling=rows)


def decode_slots(sequences: Iterable[Sequence], *, max_seqs: int, table_len: int) -> DecodeSlots:
    """Builds the page tables and sampling settings of the sequences that decode.

    Each takes its own row of `max_seqs`; `table_len` is the padded length of a page table.
    """
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
    """Builds a decode step, whose input is the last token of every answer.

    Args:
        page_table: that of `decode_slots` for the same sequences.
        scales: maps a sequence's length in tokens to the factors on queries and keys.
    """
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
    """Pads the pages of a sequence with zeros to an int32 page table."""
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
