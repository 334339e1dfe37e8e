"""Which backend runs where, with which tile sizes, and what is refused."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode import decode
from pallas_kernels.dispatch import backend, tiles
from pallas_kernels.dispatch.backend import Backends, Unsupported
from pallas_kernels.paged_kv import PagedKV

PLATFORMS = tuple(backend.PREFERRED)
QUERY = np.zeros((1, 128))


def token(head_dim=128):
    """Arguments of a decode step."""
    cache = jnp.zeros((1, 1, 2, 128, head_dim))
    return (
        jnp.zeros((1, 1, 1, 8, head_dim)),
        PagedKV(cache, cache),
        jnp.int32(0),
        jnp.ones((1, 1), jnp.int32),
        jnp.zeros((1, 1), jnp.int32),
    )


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_preferred_backends_run_on_their_device(platform):
    preferred = backend.choose(platform)
    assert set(preferred) <= set(backend.on(platform))
    assert backend.choose(platform, preferred) == preferred


@pytest.mark.parametrize("operation", backend.FUNCTIONS)
@pytest.mark.parametrize("name", backend.NAMES)
def test_every_backend_has_every_operation(name, operation):
    if name == "triton":
        pytest.importorskip("triton", reason="Triton (pip install triton) is not installed")
    assert callable(getattr(backend.load(operation, name), backend.FUNCTIONS[operation]))


def test_heads_that_do_not_fill_registers_get_operations_of_xla_unless_told_otherwise():
    assert set(backend.choose("tpu", head_dim=128)) == {"mosaic_tpu"}
    assert set(backend.choose("tpu", head_dim=64)) == {"xla"}
    assert set(backend.choose("tpu", head_dim=256)) == {"xla"}
    assert set(backend.choose("tpu", "mosaic_tpu", head_dim=64)) == {"mosaic_tpu"}


def test_a_gpu_gets_triton_if_it_works_and_operations_of_xla_otherwise(monkeypatch):
    monkeypatch.setattr(backend, "triton_fault", lambda: None)
    assert set(backend.choose("gpu")) == {"triton"}
    assert set(backend.choose("gpu", kind="NVIDIA L40S")) == {"triton"}
    assert set(backend.choose("gpu", head_dim=64)) == {"triton"}
    assert set(backend.choose("gpu", head_dim=96)) == {"xla"}
    assert backend.unavailable("triton", head_dim=96) == (
        "heads of 96 are none of 16, 32, 64, 128, 256"
    )
    monkeypatch.setattr(backend, "triton_fault", lambda: "triton is not installed")
    assert set(backend.choose("gpu")) == {"xla"}
    assert backend.unavailable("triton") == "triton is not installed"
    with pytest.raises(Unsupported, match=r"^backend 'triton': triton is not installed$"):
        backend.choose("gpu", "triton")


def test_a_choice_is_never_replaced():
    assert backend.choose("tpu", "reference") == Backends(*["reference"] * 3)
    mixed = Backends("mosaic_tpu", "mosaic_tpu", "xla")
    assert backend.choose("tpu", mixed) is mixed
    assert str(mixed) == "prefill mosaic_tpu, decode mosaic_tpu, select xla"


@pytest.mark.parametrize(
    ("platform", "choice", "text"),
    [
        ("abacus", None, "no backend for 'abacus'; there is cpu, gpu, tpu"),
        (
            "cpu",
            "cuda",
            "no backend 'cuda'; there are mosaic_tpu, mosaic_gpu, triton, xla, reference",
        ),
        ("cpu", "mosaic_tpu", "'mosaic_tpu' runs on tpu; on this device .cpu. there are xla"),
        ("gpu", Backends("xla", "mosaic_tpu", "xla"), "'mosaic_tpu' runs on tpu"),
    ],
)
def test_what_cannot_run_is_refused_with_what_can(platform, choice, text):
    with pytest.raises(Unsupported, match=text):
        backend.choose(platform, choice)


def test_an_operation_refuses_a_backend_of_another_device():
    with pytest.raises(Unsupported, match="runs on tpu"):
        jax.eval_shape(lambda: decode(*token(), geometry=None, backend_name="mosaic_tpu"))


@pytest.fixture
def fake(monkeypatch):
    """A backend that records its keywords."""
    seen = {}

    def function(*args, **keywords):
        seen.update(keywords)
        if seen.get("tile") == 3:
            raise Unsupported("tile=3 is odd")

    module = types.SimpleNamespace(vote=function)
    monkeypatch.setattr(backend, "load", lambda operation, name: module)
    monkeypatch.setattr(backend, "RUNS_ON", {"fake": ("cpu",)})
    monkeypatch.setattr(backend, "NAMES", ("fake",))
    return seen


def test_tuned_sizes_go_to_the_backend_and_a_caller_wins(fake, monkeypatch, tmp_path):
    kind = jax.devices()[0].device_kind
    table = {
        "other": {"device_kinds": ["abacus"], "select": {"tile": 1}},
        "this": {"device_kinds": ["x", kind], "select": {"tile": 2, "tiles": {"q": 3, "k": 4}}},
    }
    (tmp_path / "fake.json").write_text(json.dumps(table))
    monkeypatch.setenv(tiles.VARIABLE, str(tmp_path))
    backend.call("select", "fake", QUERY)
    assert fake == {"tile": 2, "tiles": tiles.Tiles(q=3, k=4)}
    backend.call("select", "fake", QUERY, tile=5)
    assert fake["tile"] == 5
    with pytest.raises(Unsupported, match=r"^select by fake: tile=3 is odd .xla takes every"):
        backend.call("select", "fake", QUERY, tile=3)


def test_an_unknown_device_gets_the_defaults():
    assert tiles.tuned("mosaic_tpu", "prefill", "TPU v99", "bfloat16", 128) == {}
    assert tiles.tuned("xla", "prefill", "cpu", "bfloat16", 128) == {}


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "[" * 100_000,
        "[]",
        '{"v5e": {}}',
        '{"v5e": []}',
        '{"v5e": {"device_kinds": 1}}',
        '{"v5e": {"device_kinds": [1]}}',
        '{"v5e": {"device_kinds": ["x"], "head_dim": "64"}}',
        '{"v5e": {"device_kinds": ["x"], "prefill": 1}}',
        '{"v5e": {"device_kinds": ["x"], "prefill": {"tiles": {"q": 1}}}}',
        '{"v5e": {"device_kinds": ["x"], "prefill": {"tiles": {"q": 1, "k": "64"}}}}',
        '{"v5e": {"device_kinds": ["x"], "prefill": {"tile": -1}}}',
        None,
    ],
)
def test_a_table_that_cannot_be_read_is_refused_by_name(fake, monkeypatch, tmp_path, text):
    directory = tmp_path / "tables" if text is None else tmp_path
    if text is not None:
        (directory / "fake.json").write_text(text)
    monkeypatch.setenv(tiles.VARIABLE, str(directory))
    with pytest.raises(Unsupported, match=r"fake.json is no table of tile sizes"):
        backend.call("select", "fake", QUERY)


def test_a_program_is_traced_for_the_mesh_in_use():
    here = jax.devices()[0]
    assert backend.device() == (here.platform, here.device_kind)
    described = jax.sharding.AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=described)
    with jax.sharding.use_abstract_mesh(mesh):
        assert backend.device() == ("tpu", "TPU v6 lite")


def test_the_preferred_backends_are_told_by_kind_of_device():
    told = backend.preferences()
    assert told["cpu"] == Backends("xla", "xla", "xla")
    assert [kind for kind in told if kind.startswith("tpu")] == [
        f"tpu {generation}" for generation in ("v4", "v5e", "v5p", "v6e", "7x")
    ]
    assert {"mosaic_tpu"} == set(told["tpu v5e"])
