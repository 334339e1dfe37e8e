"""Manifests whose checksum is right and whose content is a stranger's: refused in one line."""

import copy
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import Tiny, write_shards
from support.json_mutants import mutated

from convert import weights
from convert.describe import describe
from convert.export import export
from qwen_jax.config import ConfigError
from qwen_jax.models import params
from qwen_jax.storage import manifest
from qwen_jax.storage.manifest import CheckpointError

SHARD = "model.safetensors"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A tied checkpoint with an alias and a rotary buffer."""
    directory = tmp_path_factory.mktemp("converted")
    tensors = Tiny(layers=1, tied=True).write(directory / "hf")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    write_shards(directory / "hf", tensors, 1)
    weights.convert(directory / "hf", directory / "ours")
    return directory / "ours"


def body_of(directory: Path) -> dict:
    body = json.loads((directory / "manifest.json").read_text())
    del body["sha256"], body["format"]
    return body


def reseal(directory: Path, body: dict) -> None:
    (directory / "manifest.json").write_bytes(manifest.seal(manifest.FORMAT, body))


def put(*path, value):
    """Sets the value at a path of keys and indices."""

    def change(body):
        *inner, last = path
        for key in inner:
            body = body[key]
        body[last] = value

    return change


def drop(*path):
    def change(body):
        *inner, last = path
        for key in inner:
            body = body[key]
        del body[last]

    return change


def in_header(change):
    def changed(body):
        header = json.loads(body["shards"][0]["header"])
        change(header)
        body["shards"][0]["header"] = json.dumps(header)

    return changed


def twice(name):
    return lambda body: body[name].append(copy.deepcopy(body[name][0]))


def rename_file(old, new):
    return lambda body: body["files"].update({new: body["files"].pop(old)})


FILE = r"shards\[0\]\.file must be the name of a \.safetensors file"
HOSTILE = {
    # what is changed: how, and what the error says
    "an absolute file": (put("shards", 0, "file", value="/tmp/x.safetensors"), FILE),
    "a file above": (put("shards", 0, "file", value="../x.safetensors"), FILE),
    "a file below": (put("shards", 0, "file", value="a/x.safetensors"), FILE),
    "a hidden file": (put("shards", 0, "file", value=".safetensors"), FILE),
    "our own file": (put("shards", 0, "file", value="config.json"), FILE),
    "a control character": (put("shards", 0, "file", value="a\x1b[2J.safetensors"), FILE),
    "a line break": (put("shards", 0, "file", value="a.safetensors\n"), FILE),
    "a zero byte": (put("shards", 0, "file", value="a\0.safetensors"), FILE),
    "look-alike letters": (put("shards", 0, "file", value="mod\u0435l.safetensors"), FILE),
    "a number": (put("shards", 0, "file", value=7), r"shards\[0\]\.file must be a text"),
    "a file twice": (twice("shards"), "shards has two of one file"),
    "a shard without header": (drop("shards", 0, "header"), r"shards\[0\]\.header is missing"),
    "no header": (put("shards", 0, "header", value="["), "header is not valid JSON"),
    "a list as header": (put("shards", 0, "header", value="[]"), r"header: it must be an object"),
    "a deep header": (put("shards", 0, "header", value="[" * 9999), "header is not valid JSON"),
    "a number as metadata": (
        in_header(lambda header: header.update(__metadata__={"format": 1})),
        r"__metadata__: \[...\] must be a text",
    ),
    "a gap between tensors": (
        in_header(lambda header: header[NORM]["data_offsets"].reverse()),
        "does not begin where another ends",
    ),
    "another shape": (in_header(lambda header: header[NORM].update(shape=[8, 2])), "not of the"),
    "another dtype": (in_header(lambda header: header[NORM].update(dtype="BF16")), "not of the"),
    "a strange tensor": (
        in_header(lambda header: header.update(x=header.pop(NORM))),
        "x is neither stored nor dropped",
    ),
    "a file of ours above": (rename_file("tokenizer.json", "../x"), "must be the name of a file"),
    "a file of ours elsewhere": (rename_file("tokenizer.json", "/etc/x"), "must be the name"),
    "a dot as folder": (rename_file("tokenizer.json", "params/embed/./x"), "must be the name"),
    "our manifest": (rename_file("tokenizer.json", "manifest.json"), "must be the name"),
    "a file over a shard": (rename_file("tokenizer.json", SHARD), "must be the name"),
    "no configuration": (rename_file("config.json", "x.json"), "files lacks config.json"),
    "a part of no tensor": (
        rename_file("tokenizer.json", "params/block_007/x"),
        "files and tensors disagree about block_007",
    ),
    "no such part": (put("tensors", 0, "part", value="../x"), r"tensors\[0\]\.part must be"),
    "a short sum": (put("files", "config.json", "sha256", value="ab"), "must be a SHA-256"),
    "a negative size": (put("files", "config.json", "size", value=-1), "must be an integer"),
    "a fraction of a byte": (put("files", "config.json", "size", value=1.0), "must be an integer"),
    "no list of tensors": (put("tensors", value={}), "tensors must be a list"),
    "a tensor twice": (twice("tensors"), "tensors has two of one name"),
    "a size of nothing": (
        put("tensors", 0, "shape", value=[]),
        "shape must be a list of length >= 1",
    ),
    "another size": (put("tensors", 0, "shape", value=[3, 5]), "different numbers of elements"),
    "a dtype that none has": (put("tensors", 0, "dtype", value="int8"), "dtype must be"),
    "a dtype that was kept": (put("tensors", 0, "dtype", value="bfloat16"), "dtypes were kept"),
    "a vector transposed": (put("tensors", 1, "transposed", value=True), "that of a matrix"),
    "1 for true": (put("tensors", 0, "transposed", value=1), "must be true or false"),
    "two sums of one tensor": (put("tensors", 0, "sha256", value="0" * 64), "dtype was kept"),
    "an alias of itself": (put("aliases", "lm_head.weight", value="lm_head.weight"), "aliases"),
    "an alias of nothing": (put("aliases", "lm_head.weight", value="x"), "aliases: lm_head"),
    "an alias that is stored": (put("aliases", NORM, value=NORM), "aliases: model.norm.weight"),
    "dropped and stored": (lambda body: body["dropped"].append(NORM), "dropped names a tensor"),
    "another count": (put("num_parameters", value=5), "num_parameters is not the sum"),
    "an unknown field": (put("more", value=1), "more is no field"),
    "a missing field": (drop("aliases"), "aliases is missing"),
    "a lone surrogate": (put("versions", "jax", value="\ud800"), "damaged or was edited"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_no_conversion_writes_is_refused_by_its_field(case, converted):
    change, message = HOSTILE[case]
    whole = (converted / "manifest.json").read_bytes()
    body = body_of(converted)
    change(body)
    try:
        reseal(converted, body)
        with pytest.raises(CheckpointError, match=message) as caught:
            manifest.read(converted / "manifest.json")
        assert str(caught.value).isprintable()
        assert str(converted / "manifest.json") in str(caught.value)
        with pytest.raises(CheckpointError):
            export(converted, converted.parent / "back")
        assert not (converted.parent / "back").exists()
    finally:
        (converted / "manifest.json").write_bytes(whole)


def test_a_manifest_that_repeats_a_key_or_is_no_regular_file_is_refused(converted, tmp_path):
    content = (converted / "manifest.json").read_bytes()
    (tmp_path / "manifest.json").write_bytes(content.replace(b"{", b'{"format": 1,', 1))
    with pytest.raises(CheckpointError, match="damaged or was edited"):
        manifest.read(tmp_path / "manifest.json")
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(CheckpointError, match="is a directory, not a regular file"):
        manifest.read(tmp_path / "manifest.json")


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.long)])
def test_mutants_with_a_right_checksum_are_used_or_refused_in_a_line(count, converted, tmp_path):
    directory = tmp_path / "ours"
    shutil.copytree(converted, directory)
    body = body_of(directory)
    rng = random.Random(count)
    accepted = []
    for _ in range(count):
        mutant = mutated(body, rng)
        reseal(directory, mutant)
        if refusal(manifest.read, directory / "manifest.json") is None:
            accepted.append(mutant)
    assert len(accepted) < count / 2
    for mutant in accepted[: 4 if count < 1000 else 60]:
        reseal(directory, mutant)
        for use in (params.verify, describe, weights.load):
            refusal(use, directory)
        refusal(export, directory, tmp_path / "back", overwrite=True)
        assert {path.name for path in tmp_path.iterdir()} <= {"ours", "back", "back.partial"}


def refusal(use, *arguments, **options) -> str | None:
    """The one line in which something is refused, None if it is not."""
    text = None
    try:
        use(*arguments, **options)
    except (CheckpointError, ConfigError) as error:
        text = str(error)
    assert text is None or text.isprintable()
    return text
