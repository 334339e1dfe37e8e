"""Mutants of the JSON that ships with weights: read, or refused in one line that names the file."""

import json
import shutil
from pathlib import Path

import pytest
from support.checkpoints import Tiny
from support.damaged import limits, mutants, processor_time

from convert import source
from convert.describe import describe
from qwen_jax.config import ConfigError
from qwen_jax.models import configs
from qwen_jax.storage.manifest import CheckpointError

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"
TINY = Tiny(layers=2, shards=2)
SECONDS = 20.0  # of a processor, for one file
BYTES = 2 << 30

CONFIG = {
    **TINY.config(),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "layer_types": ["full_attention"] * 2,
    "use_sliding_window": False,
    "sliding_window": 512,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "rope_parameters": None,
    "quantization_config": None,
    "unsloth_version": "2025.1.1",
    "num_beams": 1,
}
DUAL_CHUNK = {
    **{name: value for name, value in CONFIG.items() if name != "rope_scaling"},
    "dual_chunk_attention_config": {
        "chunk_size": 64,
        "local_size": 16,
        "original_max_position_embeddings": 64,
        "sparse_attention_enabled": True,
        "sparse_attention_threshold": 100,
        "sparse_attention_last_q": 16,
    },
}
GENERATION = {
    "bos_token_id": 1,
    "pad_token_id": 1,
    "do_sample": True,
    "eos_token_id": [3, 5],
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "min_p": 0.1,
    "max_new_tokens": 2048,
    "num_beams": 1,
    "suppress_tokens": None,
    "transformers_version": "4.45.2",
}
BUDGETS = [
    {str(head): ["vertical_and_slash", 100, 800, 0.5] for head in range(TINY.heads)}
    for _ in range(TINY.layers)
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A checkpoint that is as it should be."""
    directory = tmp_path_factory.mktemp("whole") / "hf"
    TINY.write(directory)
    return directory


def read_configuration(directory: Path) -> None:
    model = configs.model_config(directory)
    configs.sparse_config(directory, model)
    configs.generation_config(directory)
    configs.last_q(directory)
    configs.notes(directory)


def read_headers(directory: Path) -> None:
    checked = source.check(directory)
    for name in checked.tensors:
        checked.read(name)
    describe(directory)


def header(path: Path) -> dict:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


# Name -> file, what is mutated, what reads it.
FORMATS = {
    "config.json": ("config.json", lambda _: CONFIG, read_configuration),
    "config.json with Dual Chunk": ("config.json", lambda _: DUAL_CHUNK, read_configuration),
    "generation_config.json": (
        "generation_config.json",
        lambda _: GENERATION,
        read_configuration,
    ),
    "sparse_attention_config.json": (
        "sparse_attention_config.json",
        lambda _: BUDGETS,
        read_configuration,
    ),
    "the index": (INDEX, lambda whole: json.loads((whole / INDEX).read_text()), read_headers),
    "a header": (SHARD, lambda whole: header(whole / SHARD), read_headers),
}


@pytest.mark.parametrize(
    "count", [pytest.param(200, id="some"), pytest.param(10_000, id="all", marks=pytest.mark.long)]
)
@pytest.mark.parametrize("name", FORMATS)
def test_no_mutant_gives_more_than_one_line(name, count, whole, tmp_path):
    file, base, read = FORMATS[name]
    directory = Path(shutil.copytree(whole, tmp_path / "hf"))
    path = directory / file
    original = path.read_bytes() if file == SHARD else b""
    tensors = original[8 + int.from_bytes(original[:8], "little") :]
    refused = 0
    with limits(BYTES):
        for data in mutants(base(whole), count, seed=len(name)):
            path.write_bytes(
                len(data).to_bytes(8, "little") + data + tensors if file == SHARD else data
            )
            said = None
            try:
                with processor_time(SECONDS):
                    read(directory)
            except (ConfigError, CheckpointError) as error:
                said = str(error)
            except BaseException as error:
                raise AssertionError(f"untyped {error!r}: {data[:2000]!r}") from error
            if said is not None:
                refused += 1
                assert said.isprintable(), data[:2000]
                assert len(said) < 4000, data[:2000]
                assert said.count(str(directory)) == 1, (said, data[:2000])
    assert count / 4 < refused < count


def test_hard_links_to_one_long_header_are_read_within_the_limit_of_all_headers(tmp_path):
    TINY.write(tmp_path)
    rows = {f"x{number}": {"dtype": "F32", "shape": [0]} for number in range(60_000)}
    rows = {name: {**row, "data_offsets": [0, 0]} for name, row in rows.items()}
    text = json.dumps(rows).encode()
    (tmp_path / SHARD).write_bytes(len(text).to_bytes(8, "little") + text)
    names = {f"y{number}": f"{number}.safetensors" for number in range(4)}
    for file in names.values():
        (tmp_path / file).hardlink_to(tmp_path / SHARD)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(
        CheckpointError, match=r"and those of all 4 files may have 8,388,608 togeth"
    ):
        source.check(tmp_path)


def test_layers_are_counted_against_the_tensors_before_they_are_listed(tmp_path):
    Tiny(layers=1, tied=True).write(tmp_path)
    raw = Tiny(layers=1000, tied=True).config()
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"num_hidden_layers=1000, and .* hold 14 tensors"):
        source.check(tmp_path)
