"""Steps: inputs of one call of the model, passed from the scheduler down to attention.

Their arrays are NumPy or JAX arrays, or `ShapeDtypeStruct`s.
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrefillStep:
    """A slice of one sequence.

    Attributes:
        tokens: token ids, padded with zeros to a length that is compiled.
        start: position of the first token.
        length: tokens that are not padding.
        page_table: pages of the sequence, in order; 0 where none is needed yet.
        query_scale: temperature factor on queries, beside `1 / sqrt(head_dim)`.
        key_scale: temperature factor on keys before they are cached.
    """

    tokens: Int[Any, " T"]
    start: Int[Any, ""]
    length: Int[Any, ""]
    page_table: Int[Any, " P"]
    query_scale: Float[Any, ""]
    key_scale: Float[Any, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStep:
    """The next token of each of B sequences.

    Attributes:
        tokens: the last token of each answer; 0 in idle rows.
        positions: position of each token; -1 marks an idle row.
        page_table: pages of each sequence, in order; 0 where none is needed yet.
        query_scale: temperature factor on queries, beside `1 / sqrt(head_dim)`.
        key_scale: temperature factor on keys before they are cached.
    """

    tokens: Int[Any, " B"]
    positions: Int[Any, " B"]
    page_table: Int[Any, "B P"]
    query_scale: Float[Any, " B"]
    key_scale: Float[Any, " B"]
