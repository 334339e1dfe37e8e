import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from support.checkpoints import Tiny

from convert import source, weights
from qwen_jax.config import ConfigError
from qwen_jax.storage.manifest import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def split(content: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header: bytes | dict, data: bytes) -> bytes:
    if isinstance(header, dict):
        header = json.dumps(header, separators=(",", ":")).encode()
    return len(header).to_bytes(8, "little") + header + data


def mutations(content: bytes, number: int, rng: np.random.Generator):
    """Damaged versions of a safetensors file, of every kind in turn."""
    length = int.from_bytes(content[:8], "little")
    names = [name for name in split(content)[0] if name != "__metadata__"]
    lengths = [0, 1, 2, 7, length - 1, length + 1, len(content) - 8, len(content), 2**24, 2**31]
    lengths += [2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 9, 2**64 - 8, 2**64 - 1]

    def pick(values):
        return values[rng.integers(len(values))]

    def edited(change):
        header, data = split(content)
        change(header, pick(names))
        return join(header, data)

    def shift(header, name):
        ends = header[name]["data_offsets"]
        ends[rng.integers(2)] += pick([-(2**40), -8, -2, -1, 1, 2, 8, 2**40, 2**63])

    def exchange(header, name):
        other = pick(names)
        header[name], header[other] = header[other], header[name]

    def replace(field, values):
        def change(header, name):
            header[name][field] = pick(values)

        return change

    def rename(header, name):
        header[pick([name + "x", "", "../x", "\u202e", "\x1b[2J", "model"])] = header.pop(name)

    def flip_bits():
        damaged = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(8 + length)] ^= 1 << rng.integers(8)
        return bytes(damaged)

    def flip_data():
        damaged = bytearray(content)
        damaged[rng.integers(8 + length, len(content))] ^= 1 << rng.integers(8)
        return bytes(damaged)

    def duplicate_key():
        header, data = split(content)
        name = pick(names)
        text = json.dumps(header, separators=(",", ":"))
        again = json.dumps({name: header[name]}, separators=(",", ":"))
        return join((text[:-1] + "," + again[1:]).encode(), data)

    def deep():
        depth = pick([100, 127, 128, 129, 1000, 100_000])
        text = '{"__metadata__":' + "[" * depth + "]" * depth + "}"
        return join(text.encode(), content[8 + length :])

    dtypes = ["F16", "F64", "I32", "U8", "BOOL", "F8_E4M3", "BF16", "f32", "", None, 4, "X" * 999]
    shapes = [[], [0], [-1], [2**63], [2**32, 2**32], [1, 2, 3], None, "16", [1.5], [[1]]]
    kinds = [
        flip_bits,
        flip_bits,
        flip_data,
        lambda: content[: rng.integers(len(content))],
        lambda: content[: rng.integers(8 + length)],
        lambda: content + bytes(rng.integers(1, 9)),
        lambda: pick(lengths).to_bytes(8, "little") + content[8:],
        lambda: edited(shift),
        lambda: edited(exchange),
        lambda: edited(replace("dtype", dtypes)),
        lambda: edited(replace("shape", shapes)),
        lambda: edited(replace("data_offsets", [[], [0], [1, 0], None, [0, 0, 0], ["0", "4"]])),
        lambda: edited(lambda header, name: header.pop(name)),
        lambda: edited(rename),
        lambda: edited(lambda header, _: header.update(__metadata__={"format": "x" * 50})),
        duplicate_key,
        deep,
    ]
    for i in range(number):
        yield kinds[i % len(kinds)]()


def test_a_damaged_file_is_refused_or_read_exactly_as_safetensors_reads_it(tmp_path):
    Tiny(layers=1, tied=True).write(tmp_path)
    path = tmp_path / SINGLE
    rng = np.random.default_rng(0)
    refused: list[str] = []
    exact = 0
    for content in mutations(path.read_bytes(), 2000, rng):
        path.write_bytes(content)
        try:
            checked = source.check(tmp_path)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        with safe_open(path, "numpy") as reader:
            assert sorted(reader.keys()) == sorted(checked.tensors)
            for name in reader.keys():  # noqa: SIM118
                array, _ = checked.read(name)
                assert array.tobytes() == reader.get_tensor(name).tobytes()
        exact += 1
    assert len(refused) > 1500
    assert exact > 150
    for text in refused:
        assert str(tmp_path) in text
        assert text.isprintable()
        assert len(text) < 2000


def test_what_safetensors_refuses_is_never_accepted(tmp_path):
    Tiny(layers=1, tied=True).write(tmp_path)
    path = tmp_path / SINGLE
    both = 0
    for content in mutations(path.read_bytes(), 500, np.random.default_rng(1)):
        path.write_bytes(content)
        try:
            with safe_open(path, "numpy"):
                continue
        except (SafetensorError, OSError):
            both += 1
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            source.check(tmp_path)
    assert both > 200


def edit_index(directory: Path, change) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index)
    (directory / INDEX).write_text(json.dumps(index))


def put(file):
    """An index that says the final norm is in `file`."""
    return lambda directory: edit_index(
        directory, lambda index: index["weight_map"].update({"model.norm.weight": file})
    )


def shard(number: int) -> str:
    return f"model-{number:05d}-of-00003.safetensors"


def link_out(directory: Path) -> None:
    outside = directory.parent / "outside.safetensors"
    shutil.move(directory / shard(2), outside)
    (directory / shard(2)).symlink_to(outside)


def link_config_out(directory: Path) -> None:
    shutil.move(directory / "config.json", directory.parent / "secret.json")
    (directory / "config.json").symlink_to(directory.parent / "secret.json")


def swap(directory: Path) -> None:
    (directory / shard(1)).rename(directory / "t")
    (directory / shard(2)).rename(directory / shard(1))
    (directory / "t").rename(directory / shard(2))


def fifo(name: str):
    def make(directory: Path) -> None:
        (directory / name).unlink()
        os.mkfifo(directory / name)

    return make


def of_another_model(directory: Path) -> None:
    Tiny(layers=3, shards=3, hidden=32).write(directory.parent / "other")
    shutil.copy(directory.parent / "other" / shard(2), directory / shard(2))


def with_a_twin(directory: Path) -> None:
    """The same tensor in two shards."""
    one, two = (load_file(directory / shard(number)) for number in (1, 2))
    name = next(iter(one))
    save_file(two | {name: one[name]}, directory / shard(2))


def remove(name: str):
    return lambda directory: (directory / name).unlink()


def text(name: str, content: str):
    return lambda directory: (directory / name).write_text(content)


HOSTILE = {
    "parent directory": (put("../outside.safetensors"), "no file name"),
    "parent directory, deeper": (put("a/../../outside.safetensors"), "no file name"),
    "absolute path": (put("/etc/passwd.safetensors"), "no file name"),
    "no safetensors": (put("config.json"), "no file name"),
    "not a name": (put(7), "no file name"),
    "empty name": (put(""), "no file name"),
    "line break": (put("a.safetensors\n"), "no file name"),
    "null byte": (put("a\0.safetensors"), "no file name"),
    "look-alike letters": (put("mod\u0435l.safetensors"), "no file name"),
    "a list": (put([shard(1)]), "no file name"),
    "link to outside": (link_out, "is a link to"),
    "configuration linked to outside": (link_config_out, "is a link to"),
    "pipe for a shard": (fifo(shard(2)), "not a regular file"),
    "pipe for the index": (fifo(INDEX), "not a regular file"),
    "pipe for the configuration": (fifo("config.json"), "not a regular file"),
    "pipe for the tokenizer": (fifo("tokenizer.json"), "not a regular file"),
    "missing shard": (remove(shard(3)), "is missing"),
    "missing index": (remove(INDEX), "is missing"),
    "missing configuration": (remove("config.json"), "is missing"),
    "swapped shards": (swap, "against the index"),
    "shard of another model": (of_another_model, "config.json asks for"),
    "tensor twice": (with_a_twin, "against the index"),
    "empty index": (text(INDEX, "{}"), "no weight_map"),
    "index of no object": (text(INDEX, "[1]"), "must hold a JSON object, got a list"),
    "index twice": (text(INDEX, '{"weight_map": {"a": "b", "a": "c"}}'), "twice"),
    "deep index": (text(INDEX, "[" * 100_000), "not valid JSON"),
    "index not text": (
        lambda directory: (directory / INDEX).write_bytes(b"\xff\xfe{"),
        "not valid JSON",
    ),
    "endless index": (
        lambda directory: os.truncate(directory / INDEX, 1 << 40),
        "more than the 8,388,608 allowed",
    ),
    "a hundred thousand entries": (
        lambda directory: edit_index(
            directory,
            lambda index: index["weight_map"].update(
                {f"x{number}": shard(1) for number in range(100_000)}
            ),
        ),
        "lacks x",
    ),
    "a second set of weights": (text(SINGLE, ""), "remove one"),
    "directory for a shard": (
        lambda directory: (
            (directory / shard(1)).unlink(),
            (directory / shard(1)).mkdir(),
        ),
        "not a regular file",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_and_broken_directories_are_refused_before_anything_is_made(case, tmp_path):
    change, message = HOSTILE[case]
    inside = tmp_path / "hf"
    Tiny(layers=3, shards=3).write(inside)
    change(inside)
    opened: list[str] = []
    watch.paths = opened
    try:
        with pytest.raises((CheckpointError, ConfigError), match=message):
            weights.convert(inside, tmp_path / "made", overwrite=True)
    finally:
        watch.paths = None
    assert not [name for name in os.listdir(tmp_path) if name.startswith("made")]
    assert [path for path in opened if "outside" in path or "secret" in path] == []


def watch(event: str, arguments: tuple) -> None:
    """Audit hook: notes the paths that are opened."""
    if watch.paths is not None and event == "open" and isinstance(arguments[0], (str, bytes, Path)):
        watch.paths.append(os.fsdecode(arguments[0]))


watch.paths = None
sys.addaudithook(watch)


def test_a_snapshot_of_a_hugging_face_cache_may_link_to_its_blobs(tmp_path):
    tiny = Tiny(layers=2, shards=2)
    snapshot = tmp_path / "models--Qwen--tiny" / "snapshots" / "0123abcd"
    expected = tiny.write(snapshot)
    blobs = tmp_path / "models--Qwen--tiny" / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        shutil.move(path, blobs / f"{number:064x}")
        path.symlink_to(f"../../blobs/{number:064x}")
    checked = source.check(snapshot)
    for name, tensor in expected.items():
        assert checked.read(name)[0].tobytes() == tensor.tobytes()
    with pytest.raises(CheckpointError, match=r"is damaged: its SHA-256 is not its blob's name"):
        source.verify_blobs(checked)
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to("../../../secret")
    (tmp_path / "secret").write_text("{}")
    with pytest.raises(CheckpointError, match="is a link to"):
        source.check(snapshot)


def test_all_wrong_tensors_are_named_at_once(tmp_path):
    tensors = Tiny(layers=1).write(tmp_path)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 4), np.float32)
    tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((3, 4), np.float32)
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError) as caught:
        source.check(tmp_path)
    for part in (
        "model.norm.weight is missing",
        "model.layers.0.mlp.up_proj.weight has shape [3, 4], config.json asks for [24, 16]",
        "model.layers.7.mlp.up_proj.weight is no tensor of this model",
    ):
        assert part in str(caught.value)


def test_a_file_that_changes_after_the_check_is_not_read(tmp_path):
    Tiny(layers=1).write(tmp_path)
    checked = source.check(tmp_path)
    os.utime(tmp_path / SINGLE, ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        checked.read("model.norm.weight")
    os.unlink(tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight cannot be read: No such file"):
        checked.read("model.norm.weight")


def test_fine_tunes_of_one_model_have_different_fingerprints(tmp_path):
    for seed in (0, 1, 0):
        Tiny(shards=2).write(tmp_path / f"{seed}", seed)
    one, other = (source.check(tmp_path / f"{seed}").fingerprint() for seed in (0, 1))
    Tiny(shards=2).write(tmp_path / "again", 0)
    assert one != other
    assert one == source.check(tmp_path / "again").fingerprint()


@pytest.mark.parametrize("name", source.COMPANIONS)
def test_a_file_to_copy_is_not_larger_than_any_that_is_read(name, tmp_path):
    Tiny(layers=1).write(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    with (tmp_path / name).open("w") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} has 1,099,511,627,776 bytes"):
        source.check(tmp_path)
