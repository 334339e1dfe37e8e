"""Random tiny Hugging Face checkpoints, written with the safetensors library alone."""

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tiny:
    """A model of a few thousand parameters; `shards` files, an index if there are several."""

    layers: int = 2
    hidden: int = 16
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 24
    vocab: int = 40
    tied: bool = False
    dtype: str = "float32"
    shards: int = 1

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def config(self) -> dict:
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
            "torch_dtype": self.dtype,
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Written out from the model card, not from the package under test."""
        D, F, V, H = self.hidden, self.mlp, self.vocab, self.head_dim
        N, K = self.heads * H, self.kv_heads * H
        shapes = {"model.embed_tokens.weight": (V, D)}
        for layer in range(self.layers):
            for name, shape in {
                "input_layernorm.weight": (D,),
                "self_attn.q_proj.weight": (N, D),
                "self_attn.q_proj.bias": (N,),
                "self_attn.k_proj.weight": (K, D),
                "self_attn.k_proj.bias": (K,),
                "self_attn.v_proj.weight": (K, D),
                "self_attn.v_proj.bias": (K,),
                "self_attn.o_proj.weight": (D, N),
                "post_attention_layernorm.weight": (D,),
                "mlp.gate_proj.weight": (F, D),
                "mlp.up_proj.weight": (F, D),
                "mlp.down_proj.weight": (D, F),
            }.items():
                shapes[f"model.layers.{layer}.{name}"] = shape
        shapes["model.norm.weight"] = (D,)
        if not self.tied:
            shapes["lm_head.weight"] = (V, D)
        return shapes

    def tensors(self, seed: int = 0) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {
            name: rng.standard_normal(shape, np.float32).astype(DTYPES[self.dtype])
            for name, shape in self.shapes().items()
        }

    def write(self, directory: Path, seed: int = 0) -> dict[str, np.ndarray]:
        """Write the checkpoint; returns its tensors."""
        tensors = self.tensors(seed)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config(), indent=2))
        (directory / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
        (directory / "tokenizer.json").write_text('{"version": "1.0"}\n')
        write_shards(directory, tensors, self.shards)
        return tensors


def write_shards(directory: Path, tensors: dict[str, np.ndarray], shards: int) -> None:
    """Deal the tensors to files in runs, as transformers does."""
    metadata = {"format": "pt"}
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata)
        return
    names = np.array_split(np.array(list(tensors)), shards)
    files = [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    weight_map = {}
    for file, run in zip(files, names, strict=True):
        save_file({str(name): tensors[str(name)] for name in run}, directory / file, metadata)
        weight_map |= {str(name): file for name in run}
    total = sum(tensor.nbytes for tensor in tensors.values())
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
    )


def expected_tree(tiny: Tiny, tensors: dict[str, np.ndarray]) -> dict:
    """Our parameter tree for Hugging Face tensors, from its definition, one einsum label at a time.

    A projection is stored `[out, in]`; ours takes its input axes first, and heads have an axis.
    """
    D, H, N, K = tiny.hidden, tiny.head_dim, tiny.heads, tiny.kv_heads

    def stack(name: str, shape: tuple[int, ...], axes: tuple[int, ...]) -> np.ndarray:
        layers = [tensors[f"model.layers.{layer}.{name}"] for layer in range(tiny.layers)]
        return np.stack([np.transpose(layer.reshape(shape), axes) for layer in layers])

    def scale(name: str) -> dict:
        return {"scale": stack(f"{name}.weight", (D,), (0,))}

    def heads(name: str, count: int) -> dict:
        return {
            "kernel": stack(f"self_attn.{name}_proj.weight", (count, H, D), (2, 0, 1)),
            "bias": stack(f"self_attn.{name}_proj.bias", (count, H), (0, 1)),
        }

    def mlp(name: str, shape: tuple[int, int]) -> dict:
        return {"kernel": stack(f"mlp.{name}_proj.weight", shape, (1, 0))}

    tree = {
        "embed": {"embedding": tensors["model.embed_tokens.weight"]},
        "blocks": {
            "attention_norm": scale("input_layernorm"),
            "attention": {
                "q": heads("q", N),
                "k": heads("k", K),
                "v": heads("v", K),
                "o": {"kernel": stack("self_attn.o_proj.weight", (D, N, H), (1, 2, 0))},
            },
            "mlp_norm": scale("post_attention_layernorm"),
            "mlp": {
                "gate": mlp("gate", (tiny.mlp, D)),
                "up": mlp("up", (tiny.mlp, D)),
                "down": mlp("down", (D, tiny.mlp)),
            },
        },
        "norm": {"scale": tensors["model.norm.weight"]},
    }
    if not tiny.tied:
        tree["head"] = {"kernel": tensors["lm_head.weight"].T}
    return tree


def assert_trees_equal(actual: dict, expected: dict) -> None:
    """Same keys, dtypes and bits."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_trees_equal(actual[key], value)
        else:
            array = np.asarray(actual[key])
            assert (array.dtype, array.shape) == (value.dtype, value.shape), key
            assert array.tobytes() == np.ascontiguousarray(value).tobytes(), key


def write_large(directory: Path, model: Tiny, shards: int) -> None:
    """Write a bfloat16 checkpoint whose tensors are the same numbers, each from another on."""
    Tiny(layers=1).write(directory)
    (directory / "model.safetensors").unlink()
    (directory / "config.json").write_text(json.dumps(model.config()))
    sizes = {name: int(np.prod(shape)) for name, shape in model.shapes().items()}
    count = max(sizes.values()) + len(sizes)
    noise = np.random.default_rng(0).integers(0, 2**14, count, np.uint16)  # finite bfloat16
    tensors = {
        name: noise[number : number + size].view(ml_dtypes.bfloat16).reshape(model.shapes()[name])
        for number, (name, size) in enumerate(sizes.items())
    }
    write_shards(directory, tensors, shards)
