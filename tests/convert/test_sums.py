"""Fingerprints of weights: every byte decides, and is read once."""

import contextlib
import os
import shutil
import time

import numpy as np
import pytest
from support.checkpoints import Tiny, write_shards

from convert import source, sums, weights
from qwen_jax.llm.sessions import weights_fingerprint
from qwen_jax.models import params
from qwen_jax.storage.manifest import CheckpointError

SHARD = "model.safetensors"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qwen-jax" / "sums"


def fingerprint(directory) -> str:
    return source.check(directory).fingerprint()


def read_bytes(directory) -> int:
    """Bytes that a fingerprint reads of tensors."""
    totals = [0]
    source.check(directory).fingerprint(lambda done, _: totals.append(done))
    return totals[-1]


def settle(directory) -> None:
    """Makes a directory's content old, as time does; the time of the entry follows the clock."""
    for path in directory.iterdir():
        os.utime(path, ns=(1_700_000_000_000_000_000, 1_700_000_000_000_000_000))


def test_any_byte_of_a_tensor_makes_another_fingerprint_but_not_how_it_is_dealt(tmp_path, cache):
    tiny = Tiny(layers=1, vocab=400)
    tensors = tiny.write(tmp_path / "hf")
    shutil.copytree(tmp_path / "hf", tmp_path / "same")
    write_shards(tmp_path / "same", tensors, 1)
    assert fingerprint(tmp_path / "hf") == fingerprint(tmp_path / "same")
    path = tmp_path / "same" / SHARD
    whole = path.read_bytes()
    outline, known = source.check(tmp_path / "hf").outline(), fingerprint(tmp_path / "hf")
    start = 8 + int.from_bytes(whole[:8], "little")
    seen = {known}
    for at in (start, start + 5000, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        seen.add(fingerprint(tmp_path / "same"))
    assert len(seen) == 4
    assert outline == source.check(tmp_path / "hf").outline()
    (tmp_path / "same" / SHARD).unlink()
    write_shards(tmp_path / "same", tensors, 3)
    assert fingerprint(tmp_path / "same") == known


@pytest.mark.parametrize(("stored", "same"), [("keep", True), ("bfloat16", False)])
def test_a_conversion_keeps_the_fingerprint_if_it_keeps_the_numbers(stored, same, tmp_path, cache):
    Tiny(layers=1, shards=2).write(tmp_path / "hf")
    weights.convert(tmp_path / "hf", tmp_path / "ours", dtype=stored)
    converted = params.read_manifest(tmp_path / "ours").fingerprint
    assert (converted == fingerprint(tmp_path / "hf")) == same


def test_sums_are_computed_once_until_a_file_changes(tmp_path, cache, monkeypatch):
    Tiny(layers=1, shards=2).write(tmp_path / "hf")
    settle(tmp_path / "hf")
    monkeypatch.setattr(sums, "SETTLED_NS", 0)
    total = source.check(tmp_path / "hf").num_bytes
    first = fingerprint(tmp_path / "hf")
    assert read_bytes(tmp_path / "hf") == 0
    assert fingerprint(tmp_path / "hf") == first
    assert cache.stat().st_mode & 0o777 == 0o700
    one, _ = sorted((tmp_path / "hf").glob("*.safetensors"))
    content = bytearray(one.read_bytes())
    content[-1] ^= 1
    before = one.stat().st_ctime_ns
    one.write_bytes(content)
    while one.stat().st_ctime_ns == before:  # the clock of the disk may be coarse
        one.touch()
    settle(tmp_path / "hf")  # the size and the time of the content are those that were
    assert fingerprint(tmp_path / "hf") != first
    for path in cache.iterdir():
        path.write_text('{"format": "qwen-jax sums 1"}')
    assert read_bytes(tmp_path / "hf") == total
    assert read_bytes(tmp_path / "hf") == 0


def test_sums_of_a_file_that_could_change_unseen_are_not_kept(tmp_path, cache):
    Tiny(layers=1).write(tmp_path / "hf")
    for _ in range(2):  # the file is younger than the times of files can tell
        assert read_bytes(tmp_path / "hf") > 0
    assert not cache.exists() or not list(cache.iterdir())


def test_without_a_cache_directory_sums_are_computed(tmp_path, monkeypatch):
    Tiny(layers=1).write(tmp_path / "hf")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    settle(tmp_path / "hf")
    monkeypatch.setattr(sums, "SETTLED_NS", 0)
    assert fingerprint(tmp_path / "hf") == fingerprint(tmp_path / "hf")
    assert read_bytes(tmp_path / "hf") > 0


def test_a_file_that_changes_while_it_is_summed_is_an_error(tmp_path, cache):
    Tiny(layers=1).write(tmp_path / "hf")
    checked = source.check(tmp_path / "hf")
    os.utime(tmp_path / "hf" / SHARD)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        checked.fingerprint()
    checked = source.check(tmp_path / "hf")

    def touch(*_):
        os.utime(tmp_path / "hf" / SHARD, ns=(time.time_ns(), 1))

    with pytest.raises(CheckpointError, match="changed while it was read"):
        checked.fingerprint(touch)


def alike(directory, tensors) -> None:
    """A source that differs from another in one byte in the last part, outside of all samples."""
    changed = {name: tensor.copy() for name, tensor in tensors.items()}
    changed["model.embed_tokens.weight"].view(np.uint8)[0] ^= 1
    write_shards(directory, changed, 1)


def test_a_stopped_conversion_is_not_continued_from_another_source(tmp_path, cache):
    tensors = Tiny(layers=2, vocab=400).write(tmp_path / "hf")
    shutil.copytree(tmp_path / "hf", tmp_path / "other")
    alike(tmp_path / "other", tensors)
    assert source.check(tmp_path / "hf").outline() == source.check(tmp_path / "other").outline()

    def stop(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        weights.convert(tmp_path / "hf", tmp_path / "ours", progress=stop)
    assert list((tmp_path / "ours.partial" / "parts").iterdir())
    with pytest.raises(CheckpointError, match=r"made from another source, whose model\.embed_tok"):
        weights.convert(tmp_path / "other", tmp_path / "ours", resume=True)
    weights.convert(tmp_path / "hf", tmp_path / "ours", resume=True)
    assert params.read_manifest(tmp_path / "ours").fingerprint == fingerprint(tmp_path / "hf")


def test_a_finished_conversion_of_another_source_or_tokenizer_is_not_taken_for_this(
    tmp_path, cache
):
    tensors = Tiny(layers=1, vocab=400).write(tmp_path / "hf")
    weights.convert(tmp_path / "hf", tmp_path / "ours")
    weights.convert(tmp_path / "hf", tmp_path / "ours", resume=True)
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="ours exists"):
        weights.convert(tmp_path / "hf", tmp_path / "ours", resume=True)
    (tmp_path / "hf" / "tokenizer.json").write_text('{"version": "1.0"}\n')
    weights.convert(tmp_path / "hf", tmp_path / "ours", resume=True)
    alike(tmp_path / "hf", tensors)
    with pytest.raises(CheckpointError, match="ours exists"):
        weights.convert(tmp_path / "hf", tmp_path / "ours", resume=True)


def test_parameters_that_are_not_those_of_the_manifest_have_no_fingerprint(tmp_path, cache):
    Tiny(hidden=256, mlp=512, vocab=2000).write(tmp_path / "hf")
    manifest = weights.convert(tmp_path / "hf", tmp_path / "checkpoint")
    known = weights_fingerprint(tmp_path / "checkpoint")
    assert known == weights_fingerprint(tmp_path / "hf")
    names = [name for name in manifest.files if name.startswith("params/")]
    for name in sorted(names, key=lambda name: -manifest.files[name].size)[:3]:
        path = tmp_path / "checkpoint" / name
        whole = path.read_bytes()
        assert len(whole) > 1 << 20
        for at in (0, len(whole) // 3, len(whole) - 1):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(CheckpointError, match="is damaged"):
                weights_fingerprint(tmp_path / "checkpoint")
        path.write_bytes(whole)
    assert weights_fingerprint(tmp_path / "checkpoint") == known


def test_parameters_are_read_once_and_again_when_they_changed(tmp_path, cache, monkeypatch):
    Tiny(hidden=256, mlp=512, vocab=2000).write(tmp_path / "hf")
    manifest = weights.convert(tmp_path / "hf", tmp_path / "checkpoint")

    def num_bytes() -> int:
        totals = [0]
        sums.check_parameters(
            tmp_path / "checkpoint", manifest, lambda done, _: totals.append(done)
        )
        return totals[-1]

    params_files = {n: file.size for n, file in manifest.files.items() if n.startswith("params/")}
    small = sum(size for size in params_files.values() if size <= 1 << 20)
    monkeypatch.setattr(sums, "SETTLED_NS", -(1 << 62))
    assert num_bytes() == sum(params_files.values())
    assert num_bytes() == small
    largest = max(params_files, key=lambda name: params_files[name])
    (tmp_path / "checkpoint" / largest).touch()
    assert num_bytes() == small + params_files[largest]
