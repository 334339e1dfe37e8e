"""Hugging Face name <-> our path and transform, both directions, for all layers of a model."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.models.families import family
from qwen_jax.storage.manifest import transpose

if TYPE_CHECKING:
    from qwen_jax.models.family import Place

# Buffers that old files carry; they follow from config.json.
DROPPED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Mapping of a Hugging Face tensor to an array of the parameter tree.

    Attributes:
        name: name of the tensor.
        source_shape: shape of the tensor.
        part: part of the converted checkpoint that holds the array.
        path: keys of the array in the parameter tree.
        shape: shape of the array; a layer's has no layer axis.
        transposed: whether the tensor, `[out, in]`, is transposed before it is reshaped.
    """

    name: str
    source_shape: tuple[int, ...]
    part: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """Return the array of a tensor; a view if it is only reshaped."""
        return (transpose(tensor) if self.transposed else tensor).reshape(self.shape)

    def piece(
        self, index: tuple[slice, ...], read: Callable[[tuple[slice, ...]], np.ndarray]
    ) -> np.ndarray:
        """Read a part of the array, from only the rows and columns of the tensor that it needs.

        Args:
            index: a slice with start and stop for each axis of the array.
            read: returns the part of the tensor at a tuple of such slices.
        """
        cuts, shape, rest, axis = [], [], [], 0
        for size in self.source_shape[::-1] if self.transposed else self.source_shape:
            # Axes of the array that make up this one of the tensor; the first of them is cut.
            axes = [axis]
            while math.prod(self.shape[each] for each in axes) < size:
                axes.append(axes[-1] + 1)
            first, inner = index[axis], size // self.shape[axis]
            cuts.append(slice(first.start * inner, first.stop * inner))
            shape += [first.stop - first.start, *(self.shape[each] for each in axes[1:])]
            rest += [slice(None), *(index[each] for each in axes[1:])]
            axis = axes[-1] + 1
        found = transpose(read(tuple(cuts[::-1]))) if self.transposed else read(tuple(cuts))
        return found.reshape(shape)[tuple(rest)]


def table(config: ModelConfig, embedding: str | None = None) -> dict[str, Entry]:
    """Every tensor of a model by its Hugging Face name, in the order of our parts.

    Args:
        embedding: the tensor that holds the embedding, if not the one that should: a tied model
            may keep it under the name of the head alone.
    """
    places = family(config.model_type).tensors(config)
    rows = [
        *_rows("embed", places, ("embed",)),
        *(
            row
            for layer in range(config.num_layers)
            for row in _rows(f"block_{layer:03d}", places, ("blocks",), layer)
        ),
        *_rows("final", places, ("norm",) if config.tie_embeddings else ("norm", "head")),
    ]
    if embedding is not None:
        rows[0] = dataclasses.replace(rows[0], name=embedding)
    return {entry.name: entry for entry in rows}


def _rows(
    part: str, places: Mapping[str, "Place"], keys: tuple[str, ...], layer: int = 0
) -> Iterator[Entry]:
    """The entries of a part, whose paths begin with one of these keys."""
    for name, place in places.items():
        path = tuple(place.path.split("."))
        if path[0] in keys:
            yield Entry(
                name=name.format(layer=layer),
                source_shape=place.source_shape,
                part=part,
                path=path,
                shape=place.shape,
                transposed=path[-1] == "kernel",
            )


def embedding_and_head(config: ModelConfig) -> tuple[str, str]:
    """The tensors of the embedding and of the head.

    Tied models may repeat the embedding under the second name, or keep it under that one alone.
    """
    places = family(config.model_type).tensors(config)
    names = {place.path: name for name, place in places.items()}
    return names["embed.embedding"], names["head.kernel"]
