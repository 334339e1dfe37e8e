"""An engine whose kernels were never seen at work on a device compares them first, once."""

import dataclasses
import functools
import importlib.metadata
import os
import types

import jax
import jax.numpy as jnp
import pytest
from support import random_models
from support.broken_kernels import break_, install
from support.random_models import weights

from pallas_kernels import check
from pallas_kernels.check import Result
from pallas_kernels.dispatch import backend
from pallas_kernels.dispatch.backend import Unsupported
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.programs import DENSE, PROGRAMS
from qwen_jax.config import ConfigError, SparseConfig
from qwen_jax.engine import first_contact
from qwen_jax.engine.engine import Engine, EngineConfig, kernels
from qwen_jax.files import user_cache

DEVICE = jax.local_devices()[0]
MODEL = dataclasses.replace(
    random_models.config(
        heads=(4, 2), head_dim=16, dual_chunk=ChunkGeometry(40, 8), original_len=100
    ),
    num_layers=2,
)
SPARSE = SparseConfig(vertical=((8,) * 4,) * 2, slash=((8,) * 4,) * 2, last_q=8, threshold=0)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(first_contact, "agreed_here", set())


@pytest.fixture
def compared(monkeypatch):
    """Programs that were compared, all of which agree, in no time."""
    seen = []

    def agree(shape, choice, *, programs, device):
        seen.extend(programs)
        for program in programs:
            yield Result(
                program=program,
                backend=choice,
                context=9,
                truth="xla",
                verdict="agrees",
                error=0.001,
                lse_error=None,
                limit=0.02,
            )

    monkeypatch.setattr(check, "check", agree)
    return seen


@pytest.fixture
def name(monkeypatch):
    return install(monkeypatch)


def start(name, *, model=MODEL, dtype="float32", say=print, **fields):
    config = EngineConfig(**{"max_len": 64, "page": 32, "backend": name} | fields)
    return kernels(model, config, device=DEVICE, dtype=dtype, mesh=None, say=say)


def start_anew(*args, **fields):
    """Starts like a new process, which knows only what is stored."""
    first_contact.agreed_here.clear()
    return start(*args, **fields)


def kept():
    return sorted(user_cache.directory("kernels").iterdir())


def test_the_truth_itself_is_not_compared(compared):
    for name in (None, "xla", "reference"):
        start(name)
    assert compared == kept() == []


def test_what_an_engine_will_run_is_compared_once(compared, name):
    said = []
    start(name, say=said.append)
    assert compared == list(DENSE)
    assert said == [f"{name}: comparing with xla on {DEVICE.device_kind}, once"]
    start(name, say=said.append)
    start_anew(name, say=said.append)
    assert compared == list(DENSE)
    assert len(said) == 1
    start_anew(name, sparse=SPARSE)
    assert compared == [*DENSE, *PROGRAMS]
    start_anew(name, sparse=SPARSE, attention=False)
    assert compared == [*DENSE, *PROGRAMS, "selection"]


def test_another_device_version_shape_or_source_is_compared_again(compared, name, monkeypatch):
    start(name)
    other_heads = dataclasses.replace(MODEL, num_kv_heads=4)
    other_chunks = dataclasses.replace(MODEL, dual_chunk=None)
    for fields in (
        {"dtype": "bfloat16"},
        {"model": other_heads},
        {"model": other_chunks},
        {"page": 64},
    ):
        compared.clear()
        start_anew(name, **fields)
        assert compared, fields
    version = importlib.metadata.version
    for target, attribute, changed in (
        (check, "source", lambda: "another"),
        (importlib.metadata, "version", lambda package: version(package) + ".1"),
        (first_contact, "versions", lambda device: {"driver": "another"}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, attribute, changed)
            compared.clear()
            start_anew(name)
            assert compared, attribute
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " ")
        compared.clear()
        start_anew(name)
        assert compared
    compared.clear()
    start_anew(name)
    assert not compared


def damage(path, how):
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "a pipe":
        path.unlink()
        os.mkfifo(path)
    elif how == "a directory":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(
            {
                "empty": b"",
                "cut": content[:-9],
                "no JSON": b"\xff{",
                "a list": b"[]",
                "edited": content.replace(b"0.001", b"0.002"),
                "of another key": content.replace(b"cpu", b"tpu"),
                "huge": content + b" " * first_contact.MAX_BYTES,
            }[how]
        )


@pytest.mark.parametrize(
    "how",
    "gone|a pipe|a directory|empty|cut|no JSON|a list|edited|of another key|huge".split("|"),
)
def test_a_damaged_result_is_no_result(how, compared, name):
    start(name)
    (path,) = kept()
    damage(path, how)
    compared.clear()
    start_anew(name)
    assert compared == list(DENSE)
    compared.clear()
    start_anew(name)
    assert compared == (list(DENSE) if how == "a directory" else [])


def test_where_nothing_can_be_kept_a_process_compares_once(compared, name, monkeypatch):
    monkeypatch.setattr(user_cache, "directory", lambda name: None)
    start(name)
    start(name)
    assert compared == list(DENSE)


def wrong(run, *args, **options):
    out, second = run(*args, **options)
    return out, second + 1


def nan(run, *args, **options):
    out, second = run(*args, **options)
    return out.at[0].set(jnp.nan), second


def crash(run, *args, **options):
    raise RuntimeError("Mosaic failed to compile TPU kernel\nlong story")


@pytest.mark.parametrize(
    ("operation", "program", "change", "said"),
    [
        ("prefill", "prefill", wrong, "a log-sum-exp by 1"),
        ("decode", "decode", nan, "wrong by nan of its norm"),
        ("select", "selection", wrong, "a row is wrong by"),
        ("prefill", "prefill", crash, "RuntimeError: Mosaic failed to compile TPU kernel"),
        ("select", "selection", crash, "Mosaic failed to compile"),
    ],
)
def test_an_engine_with_a_broken_kernel_refuses_to_start(
    operation, program, change, said, monkeypatch, capsys
):
    name = break_(monkeypatch, operation, change)
    config = EngineConfig(max_len=64, backend=name, sparse=SPARSE)
    with pytest.raises(ConfigError) as caught:
        Engine(MODEL, jax.device_put(weights(MODEL), DEVICE), config)
    text = str(caught.value)
    assert text.startswith(f"{program} by {name} ")
    assert said in text
    assert "choose other kernels (--kernels xla)" in text
    assert "\n" not in text
    assert kept() == []


def test_what_failed_is_compared_again_at_the_next_start(compared, name, monkeypatch):
    agree = check.check

    def fail(*args, **options):
        for result in agree(*args, **options):
            yield dataclasses.replace(result, verdict="fails", reason="RuntimeError: no memory")

    with monkeypatch.context() as patch:
        patch.setattr(check, "check", fail)
        for _ in range(2):
            compared.clear()
            with pytest.raises(ConfigError, match=r"^prefill by .* fails on .*: no memory"):
                start(name)
            assert compared
            assert kept() == []
    start(name)
    assert len(kept()) == 1


@pytest.mark.long
def test_a_plan_that_is_read_wrong_refuses_a_sparse_engine_alone(monkeypatch):
    def change(run, *args, plan=None, **options):
        return (run if plan is None else functools.partial(wrong, run))(*args, plan=plan, **options)

    name = break_(monkeypatch, "prefill", change)
    with pytest.raises(ConfigError, match=r"^sparse prefill by "):
        start(name, sparse=SPARSE)
    start(name)
    assert len(kept()) == 1


def test_a_kernel_that_cannot_take_the_shape_says_so(monkeypatch):
    def refuse(*args, **options):
        raise Unsupported("page=32 is odd")

    name = install(monkeypatch, decode=refuse)
    with pytest.raises(Unsupported, match=f"^decode by {name}: page=32 is odd .xla takes every"):
        start(name)
    assert kept() == []


def test_the_ways_out_are_what_could_run_there(monkeypatch):
    monkeypatch.setattr(backend, "triton_fault", lambda: None)
    gpu = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    result = Result(
        program="decode",
        backend="mosaic_gpu",
        context=9,
        truth="xla",
        verdict="differs",
        error=0.5,
        lse_error=0.1,
        limit=0.02,
        reason="a row is wrong by 0.5",
    )
    with pytest.raises(ConfigError, match="--kernels triton, --kernels xla") as caught:
        first_contact.refuse(result, gpu)
    assert str(caught.value).startswith("decode by mosaic_gpu differs on NVIDIA H200: a row is ")
    assert "qwen-jax doctor --kernels" in str(caught.value)
