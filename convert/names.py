"""Table of tensor names: Hugging Face name to parameter path and transform, and back."""

import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.storage.manifest import transpose

# Buffers that old files carry; they follow from config.json.
DROPPED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
# Tied models may repeat the embedding under the first name, or keep it under that one alone.
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


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


def table(config: ModelConfig, embedding: str = EMBEDDING) -> dict[str, Entry]:
    """Return the entries of a model by Hugging Face name, in the order of the parts.

    Args:
        embedding: name of the tensor with the embedding; a tied model may store it as `HEAD`.
    """
    D, F, V = config.embed_dim, config.mlp_dim, config.vocab_size
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    block = {
        "input_layernorm.weight": ("attention_norm.scale", (D,), (D,)),
        "self_attn.q_proj.weight": ("attention.q.kernel", (N * H, D), (D, N, H)),
        "self_attn.q_proj.bias": ("attention.q.bias", (N * H,), (N, H)),
        "self_attn.k_proj.weight": ("attention.k.kernel", (K * H, D), (D, K, H)),
        "self_attn.k_proj.bias": ("attention.k.bias", (K * H,), (K, H)),
        "self_attn.v_proj.weight": ("attention.v.kernel", (K * H, D), (D, K, H)),
        "self_attn.v_proj.bias": ("attention.v.bias", (K * H,), (K, H)),
        "self_attn.o_proj.weight": ("attention.o.kernel", (D, N * H), (N, H, D)),
        "post_attention_layernorm.weight": ("mlp_norm.scale", (D,), (D,)),
        "mlp.gate_proj.weight": ("mlp.gate.kernel", (F, D), (D, F)),
        "mlp.up_proj.weight": ("mlp.up.kernel", (F, D), (D, F)),
        "mlp.down_proj.weight": ("mlp.down.kernel", (D, F), (F, D)),
    }
    rows: list[tuple[str, str, str, tuple[int, ...], tuple[int, ...]]] = [
        (embedding, "embed", "embed.embedding", (V, D), (V, D))
    ]
    for layer in range(config.num_layers):
        rows.extend(
            (f"model.layers.{layer}.{name}", f"block_{layer:03d}", f"blocks.{path}", theirs, ours)
            for name, (path, theirs, ours) in block.items()
        )
    rows.append(("model.norm.weight", "final", "norm.scale", (D,), (D,)))
    if not config.tie_embeddings:
        rows.append((HEAD, "final", "head.kernel", (V, D), (D, V)))
    return {
        name: Entry(
            name=name,
            source_shape=theirs,
            part=part,
            path=tuple(path.split(".")),
            shape=ours,
            transposed=path.endswith(".kernel"),
        )
        for name, part, path, theirs, ours in rows
    }
