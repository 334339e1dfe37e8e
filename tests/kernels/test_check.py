"""The comparison that tells right kernels from wrong ones, and that it tells them apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.broken_kernels import break_, install

from pallas_kernels import check
from pallas_kernels.check import LIMIT, Shape
from pallas_kernels.dispatch.backend import Unsupported
from pallas_kernels.dispatch.tiles import Tiles
from pallas_kernels.geometry import ChunkGeometry
from pallas_kernels.programs import DENSE, PROGRAMS
from qwen_jax.planner.shapes import MODELS

SHAPE = Shape(
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    page=32,
    dtype="bfloat16",
    geometry=ChunkGeometry(100, 20),
    plan=Tiles(24, 8),
    rows=50,
    far=False,
)
ONE_WINDOW = dataclasses.replace(SHAPE, geometry=None)
FAR = dataclasses.replace(SHAPE, geometry=ChunkGeometry(1300, 20), far=True)


def all_agree(shape, name, programs=tuple(PROGRAMS)):
    results = list(check.check(shape, name, programs=programs))
    assert [(each.program, each.verdict) for each in results] == [
        (program, "agrees") for program in programs * 2
    ]
    for each in results:
        assert each.error <= each.limit / 2, each
        assert each.lse_error is None or each.lse_error <= each.limit / 2, each
        assert (each.lse_error is None) == (each.program == "selection")
    return results


def test_right_kernels_agree_with_room_to_spare():
    all_agree(SHAPE, "xla", DENSE)


@pytest.mark.long
@pytest.mark.parametrize(
    "shape",
    [
        SHAPE,
        dataclasses.replace(SHAPE, dtype="float32", page=64, parts=2),
        FAR,
        dataclasses.replace(ONE_WINDOW, parts=4),
    ],
    ids=str,
)
def test_all_right_kernels_agree(shape):
    all_agree(shape, "xla")


def test_the_slices_and_sequences_lie_across_every_border():
    for place in check.places(SHAPE):
        chunk = place.geometry.chunk_len
        borders = {SHAPE.page, chunk, 2 * chunk}
        spans = [
            (int(args.rest[2]), length) for _, length, args in check.inputs("prefill", SHAPE, place)
        ]
        for border in borders:
            assert any(start < border < start + length for start, length in spans)
        assert (0, place.rows) in spans
        assert any(length < place.rows for _, length in spans)
        assert any(start + length == place.context for start, length in spans)
        ((_, _, args),) = check.inputs("decode", SHAPE, place)
        positions = set(args.rest[2].ravel().tolist())
        assert {-1, 0, place.context - 1} | borders | {each - 1 for each in borders} == positions


def test_the_models_are_compared_at_the_borders_of_their_own_chunks():
    for model in MODELS.values():
        short, long = check.places(model.compared(dtype="bfloat16"))
        assert long.geometry == model.geometry
        assert {model.geometry.chunk_len, 2 * model.geometry.chunk_len} < set(long.borders)
        assert short.context < 4096


def test_the_inputs_of_a_million_tokens_take_little_memory():
    shape = MODELS["7B"].compared(dtype="bfloat16")
    _, long = check.places(shape)
    _, _, args = next(iter(check.inputs("prefill", shape, long)))
    assert len(args.rest[1]) * shape.page > 500_000
    assert sum(x.nbytes for x in jax.tree.leaves(args)) < 80e6


def of_start(more):
    def change(run, q, *args, **options):
        *args, start, length = args
        return run(q, *args, start + more, length, **options)

    return change


def of_chunks(run, *args, geometry, **options):
    return run(
        *args, geometry=ChunkGeometry(geometry.chunk_size + 1, geometry.local_size), **options
    )


def of_views(run, q, *args, **options):
    return run(q[jnp.array([0, 2, 1])], *args, **options)


def of_scale(run, q, *args, **options):
    return run(q * jnp.asarray(1.4427, q.dtype), *args, **options)


def of_heads(run, q, *args, **options):
    return run(q[..., jnp.array([1, 0, 2, 3]), :], *args, **options)


def of_groups(run, q, cache, *args, **options):
    return run(q, dataclasses.replace(cache, keys=cache.keys[:, ::-1]), *args, **options)


def of_layer(run, q, cache, layer, *args, **options):
    return run(q, cache, layer - 1, *args, **options)


def of_a_page(run, q, cache, layer, table, *args, **options):
    return run(q, cache, layer, table.at[..., 1].set(table[..., 0]), *args, **options)


def of_the_result(change_out=lambda x: x, change_second=lambda x: x):
    def change(run, *args, **options):
        out, second = run(*args, **options)
        return change_out(out), change_second(second)

    return change


def of_plan(change_plan):
    def change(run, *args, plan, **options):
        return run(*args, plan=change_plan(plan), **options)

    return change


def without_a_block(plan):
    blocks = plan.blocks.at[1].set(plan.blocks[1] & (plan.blocks[1] - jnp.uint32(1)))
    return dataclasses.replace(plan, blocks=blocks)


def with_the_first_block(plan):
    return dataclasses.replace(plan, blocks=plan.blocks.at[3].set(plan.blocks[3] | jnp.uint32(1)))


def without_a_column(plan):
    return dataclasses.replace(plan, columns=plan.columns.at[0, :9].set(2**31 - 1))


def of_positions(more):
    def change(run, *args, **options):
        return run(*args[:-1], jnp.where(args[-1] < 0, args[-1], args[-1] + more), **options)

    return change


ALL = "prefill", "sparse prefill", "decode", "selection"
ATTEND = ALL[:3]
FAULTS = {
    "chunks one token longer": (ALL, SHAPE, of_chunks),
    "views of succ and inter swapped": (ALL, SHAPE, of_views),
    "logits to base 2 of those to base e": (ALL, ONE_WINDOW, of_scale),
    "heads swapped": (ALL, ONE_WINDOW, of_heads),
    "kv heads swapped": (ALL, ONE_WINDOW, of_groups),
    "another layer": (ALL, ONE_WINDOW, of_layer),
    "a stale page": (ALL, ONE_WINDOW, of_a_page),
    "a mask that is one token short": (("prefill", "selection"), ONE_WINDOW, of_start(-1)),
    "a mask that is one token long": (("prefill", "selection"), ONE_WINDOW, of_start(1)),
    "a mask that is one token short in decode": (("decode",), ONE_WINDOW, of_positions(-1)),
    "a mask that is one token long in decode": (("decode",), ONE_WINDOW, of_positions(1)),
    "a log-sum-exp to base 2": (
        ATTEND,
        ONE_WINDOW,
        of_the_result(change_second=lambda x: x * 1.4427),
    ),
    "a finite log-sum-exp of rows that read nothing": (
        ("sparse prefill", "decode"),
        ONE_WINDOW,
        of_the_result(change_second=lambda x: jnp.maximum(x, -1e30)),
    ),
    "an output of rows that read nothing": (
        ("sparse prefill", "decode"),
        ONE_WINDOW,
        of_the_result(lambda x: jnp.where(x == 0, jnp.asarray(1e-3, x.dtype), x)),
    ),
    "NaN in the padding": (
        ("prefill", "sparse prefill"),
        ONE_WINDOW,
        of_the_result(lambda x: x.at[-1].set(jnp.nan)),
    ),
    "one number that is NaN": (
        ATTEND,
        ONE_WINDOW,
        of_the_result(lambda x: x.at[0, ..., 0, 3].set(jnp.nan)),
    ),
    "a vote that is NaN": (
        ("selection",),
        ONE_WINDOW,
        of_the_result(change_second=lambda x: x.at[2, 1].set(jnp.nan)),
    ),
    "votes past the end": (
        ("selection",),
        ONE_WINDOW,
        of_the_result(lambda x: x.at[:, -1].add(1.0)),
    ),
    "diagonals one place off": (
        ("selection",),
        ONE_WINDOW,
        of_the_result(change_second=lambda x: jnp.roll(x, 1, axis=1)),
    ),
    "a plan without a block": (("sparse prefill",), ONE_WINDOW, of_plan(without_a_block)),
    "a plan with a block more": (("sparse prefill",), ONE_WINDOW, of_plan(with_the_first_block)),
    "a plan without a few columns": (("sparse prefill",), ONE_WINDOW, of_plan(without_a_column)),
}


def is_wrong(result):
    """With a distance from the limit that rounding does not take."""
    assert result.verdict == "differs"
    figures = [each for each in (result.error, result.lse_error) if each is not None]
    return "nan" in result.reason or "inf" in result.reason or max(figures) >= 2 * result.limit


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_kernel_is_told_from_a_right_one(fault, monkeypatch):
    programs, shape, change = FAULTS[fault]
    for program in programs:
        name = break_(monkeypatch, PROGRAMS[program], change)
        first = next(check.check(shape, name, programs=(program,)))
        assert is_wrong(first), first
        assert program in str(first)
        assert f"where {LIMIT['bfloat16']:g} is allowed" in first.reason


@pytest.mark.parametrize(
    ("fault", "programs"),
    [
        ("chunks one token longer", ("decode",)),
        *(
            pytest.param(fault, programs, marks=pytest.mark.long)
            for fault, programs in (
                ("chunks one token longer", ALL),
                ("heads swapped", ALL),
                ("a stale page", ATTEND),
            )
        ),
    ],
)
def test_a_wrong_kernel_is_told_at_a_border_that_is_far_away_too(fault, programs, monkeypatch):
    _, _, change = FAULTS[fault]
    for program in programs:
        name = break_(monkeypatch, PROGRAMS[program], change)
        far = list(check.check(FAR, name, programs=(program,)))[1]
        assert far.context > 2000
        assert is_wrong(far), far


def test_what_is_raised_is_a_verdict_and_a_refusal_another(monkeypatch):
    def crash(*args, **options):
        raise ValueError("no layout for f32[3]\nand more")

    def crash_later(queries, *args, **options):
        def fail(x):
            raise ArithmeticError("the device is on fire")

        shape = jax.ShapeDtypeStruct(queries.shape[1:], queries.dtype)
        return jax.pure_callback(fail, shape, queries), jnp.zeros(queries.shape[1:-1])

    def refuse(*args, **options):
        raise Unsupported("page=32 is odd")

    for crashing, said in (crash, "ValueError: no layout for f32[3]"), (crash_later, "on fire"):
        (first, _) = check.check(SHAPE, install(monkeypatch, decode=crashing), programs=("decode",))
        assert first.verdict == "fails"
        assert said in first.reason
        assert "\n" not in first.reason
        assert first.error is first.lse_error is None
    (first, _) = check.check(SHAPE, install(monkeypatch, select=refuse), programs=("selection",))
    assert first.verdict == "refuses"
    assert "page=32 is odd (xla takes every shape)" in first.reason


@pytest.mark.parametrize(
    "program",
    ["decode", *(pytest.param(each, marks=pytest.mark.long) for each in ALL if each != "decode")],
)
def test_products_of_few_bits_are_not_float32(program, monkeypatch):
    shape = dataclasses.replace(ONE_WINDOW, dtype="float32")

    def rounded(run, q, *args, **options):
        bits = jax.lax.bitcast_convert_type(q, jnp.uint32) & jnp.uint32(0xFFFFE000)  # TF32
        return run(jax.lax.bitcast_convert_type(bits, jnp.float32), *args, **options)

    name = break_(monkeypatch, PROGRAMS[program], rounded)
    first = next(check.check(shape, name, programs=(program,)))
    assert first.verdict == "differs", first


def test_every_file_of_the_kernels_is_in_their_digest(tmp_path, monkeypatch):
    (tmp_path / "prefill").mkdir()
    monkeypatch.setattr(check, "__file__", str(tmp_path / "check.py"))
    monkeypatch.setenv("PALLAS_KERNELS_TUNED", str(tmp_path / "elsewhere"))
    digests = [check.source()]
    for name in ("a.py", "prefill/xla.py", "t.json"):
        (tmp_path / name).write_text("1")
        digests.append(check.source())
    (tmp_path / "a.py").write_text("2")
    digests.append(check.source())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "triton.json").write_text("{}")
    digests.append(check.source())
    assert len(set(digests)) == len(digests)
    (tmp_path / "a.cpython-311.pyc").write_text("1")
    assert check.source() == digests[-1]


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_agrees_at_the_size_of_the_models(dtype):
    shape = dataclasses.replace(MODELS["7B"].compared(dtype=dtype).soon(), rows=130)
    assert np.all([each.error > 0 for each in all_agree(shape, "xla")])
