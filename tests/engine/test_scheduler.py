"""The scheduler: fixed shapes, fair turns, arrival order."""

import itertools

import numpy as np
import pytest

from qwen_jax.engine.layout import EngineLayout
from qwen_jax.engine.page_pool import Pages
from qwen_jax.engine.request import Request, Sequence, Sparseness
from qwen_jax.engine.scheduler import Decode, Scheduler, Slice
from qwen_jax.sparse.budgets import TILES

PAGE = 4
numbers = itertools.count()


def layout_of(slices, boundary):
    return EngineLayout(
        page=PAGE,
        slices=slices,
        boundary=boundary,
        table_len=100,
        num_pages=101,
        columns=None,
        slice_len=slices[0],
        tiles=TILES,
    )


def scheduler(
    num_pages=101,
    max_seqs=4,
    slices=(16, 8, 2),
    boundary=None,
    dense_tail=0,
    whole_slices=False,
    scales=lambda n: (1, 1),
):
    pages = Pages(num_pages)
    return pages, Scheduler(
        pages,
        layout=layout_of(slices, boundary),
        max_seqs=max_seqs,
        dense_tail=dense_tail,
        whole_slices=whole_slices,
        scales=scales,
    )


def sequence(length, new=4, first=0):
    prompt = tuple(range(first, first + length))
    return Sequence(id=next(numbers), request=Request(prompt=prompt, max_new_tokens=new))


def run(scheduler, steps):
    """Run some steps with answers that never end; returns what each did."""
    done = []
    for _ in range(steps):
        work = scheduler.next()
        done.append(work)
        if isinstance(work, Slice):
            scheduler.prefilled(work)
            if work.is_last:
                work.sequence.answer.append(0)
        elif isinstance(work, Decode):
            for each in work.sequences:
                scheduler.decoded(each)
                each.answer.append(0)
    return done


@pytest.mark.parametrize("boundary", [None, 16, 24, 40])
@pytest.mark.parametrize("length", [1, 2, 3, 8, 9, 16, 17, 23, 24, 25, 95, 96, 97])
def test_slices_cover_the_prompt_in_compiled_shapes_within_the_boundary(length, boundary):
    start = 0
    while start < length:
        taken, size = layout_of((16, 8, 2), boundary).slice_bounds(start, length)
        assert 1 <= taken <= size
        assert size in (16, 8, 2)
        assert not any(smaller >= taken for smaller in (16, 8, 2) if smaller < size)
        if boundary is not None:
            assert start // boundary == (start + taken - 1) // boundary
        start += taken
    assert start == length


def test_decode_and_prefill_take_turns():
    _, queue = scheduler()
    short = sequence(3, new=60)
    queue.add(short)
    run(queue, 1)
    queue.add(sequence(160, new=60))
    kinds = [type(work).__name__ for work in run(queue, 20)]
    assert kinds == ["Decode", "Slice"] * 10


def test_every_sequence_that_decodes_gets_a_token_in_each_decode_step():
    _, queue = scheduler()
    short = [sequence(3, new=60, first=10 * i) for i in range(3)]
    for each in short:
        queue.add(each)
    run(queue, 5)
    queue.add(sequence(160, new=60))
    for work in run(queue, 10):
        if isinstance(work, Decode):
            assert set(work.sequences) == set(short)


def test_a_short_prompt_does_not_wait_for_a_long_one():
    _, queue = scheduler()
    long, short = sequence(160), sequence(5)
    queue.add(long)
    run(queue, 2)
    queue.add(short)
    run(queue, 2)
    assert short.filled == 5
    assert long.filled < 160


def test_prompts_that_prefill_together_take_turns():
    _, queue = scheduler()
    first, second = sequence(64, first=0), sequence(64, first=100)
    queue.add(first)
    queue.add(second)
    owners = [work.sequence for work in run(queue, 6)]
    assert owners == [first, second] * 3


def test_requests_start_in_the_order_of_arrival_even_if_a_later_one_would_fit():
    pages, queue = scheduler(num_pages=15, max_seqs=3)
    holder, large, small = sequence(20, new=20), sequence(36, new=20), sequence(4, new=4)
    for each in (holder, large, small):
        queue.add(each)
    run(queue, 10)
    assert (holder.row, large.row, small.row) == (0, -1, -1)
    assert pages.used == 10
    queue.finish(holder)
    run(queue, 10)
    assert (large.row, small.row) == (0, -1)


def test_no_more_sequences_run_than_there_are_rows():
    _, queue = scheduler(max_seqs=2)
    waiting = [sequence(3, new=50, first=10 * i) for i in range(5)]
    for each in waiting:
        queue.add(each)
    run(queue, 20)
    assert [each.row for each in waiting] == [0, 1, -1, -1, -1]
    queue.finish(waiting[0])
    run(queue, 5)
    assert [each.row for each in waiting] == [-1, 1, 0, -1, -1]


def test_a_sequence_holds_all_pages_it_may_need_from_its_start():
    pages, queue = scheduler()
    queue.add(sequence(5, new=8))
    run(queue, 1)
    assert pages.used == 4
    run(queue, 7)
    assert pages.used == 4


def test_equal_beginnings_share_full_pages_and_recompute_the_last_token():
    pages, queue = scheduler()
    first, second = sequence(8), sequence(8)
    queue.add(first)
    run(queue, 1)
    queue.add(second)
    run(queue, 1)
    (work,) = [w for w in run(queue, 1) if isinstance(w, Slice)]
    assert (work.sequence, work.start, work.length) == (second, 4, 4)
    assert second.pages[0] == first.pages[0]
    assert second.pages[1] != first.pages[1]
    assert pages.used == 5


def test_pages_of_an_ended_sequence_are_still_shared():
    _, queue = scheduler()
    first, second = sequence(17), sequence(17)
    queue.add(first)
    run(queue, 2)
    queue.finish(first)
    queue.add(second)
    (work,) = run(queue, 1)
    assert (work.start, work.length, work.size) == (16, 1, 2)


def test_two_that_prefill_the_same_prompt_share_the_work():
    _, queue = scheduler()
    first, second = sequence(65), sequence(65)
    queue.add(first)
    queue.add(second)
    starts = [work.start for work in run(queue, 7) if isinstance(work, Slice)]
    assert starts == [0, 16, 32, 48, 64, 64]
    assert first.pages[:16] == second.pages[:16]


def test_a_conversation_goes_on_from_the_pages_of_its_answer():
    _, queue = scheduler()
    first = sequence(6, new=20)
    queue.add(first)
    run(queue, 12)
    assert first.filled == 17
    said = first.span(0, 17)
    queue.finish(first)
    queue.add(Sequence(id=99, request=Request(prompt=(*said, 1, 2), max_new_tokens=4)))
    (work,) = run(queue, 1)
    assert work.start == 16


@pytest.mark.parametrize(
    ("length", "is_sparse", "slices"),
    [
        (38, True, [(0, 16, 16, True), (16, 12, 16, True), (28, 10, 16, False)]),
        (11, True, [(0, 1, 2, True), (1, 10, 16, False)]),
        (10, True, [(0, 10, 16, False)]),
        (18, False, [(0, 16, 16, False), (16, 2, 2, False)]),
    ],
)
def test_the_end_of_a_sparse_prompt_is_a_dense_slice_of_its_own(length, is_sparse, slices):
    _, queue = scheduler(dense_tail=10)
    each = sequence(length, new=1)
    each.sparse = Sparseness() if is_sparse else None
    queue.add(each)
    found = [work for work in run(queue, len(slices)) if isinstance(work, Slice)]
    assert [(work.start, work.length, work.size, work.is_sparse) for work in found] == slices
    assert found[-1].is_last


def test_whole_slices_share_what_longer_prompts_would_compute_alike():
    _, queue = scheduler(whole_slices=True)
    starts = {}
    for length in (40, 33, 32, 40, 50):
        each = sequence(length)
        queue.add(each)
        starts[length] = queue.next().start
        while each.filled < length:
            taken, size = layout_of((16, 8, 2), None).slice_bounds(each.filled, length)
            queue.prefilled(Slice(sequence=each, start=each.filled, length=taken, size=size))
        queue.finish(each)
    # The last slice of 40 is shared with none, nor is the last one of 32.
    assert starts == {40: 32, 33: 32, 32: 16, 50: 32}


def origins(queue, steps, written):
    """Runs some steps; notes for each page what filled it. Returns the prompt tokens computed."""
    computed = 0

    def fill(page, is_new, start, how):
        if is_new:
            written[page] = {}
        written[page][start] = how

    for _ in range(steps):
        work = queue.next()
        if isinstance(work, Slice):
            each, start, stop = work.sequence, work.start, work.start + work.length
            for page in range(start // PAGE, -(-stop // PAGE)):
                how = work.length, work.size, work.is_sparse
                fill(each.pages[page], start <= page * PAGE, start, how)
            queue.prefilled(work)
            computed += work.length
            if work.is_last:
                each.origins = [dict(written[page]) for page in each.pages[: -(-stop // PAGE)]]
        elif isinstance(work, Decode):
            for each in work.sequences:
                place = each.filled
                fill(each.pages[place // PAGE], place % PAGE == 0, place, "decoded")
                queue.decoded(each)
        done = [work.sequence] if isinstance(work, Slice) else getattr(work, "sequences", ())
        for each in done:
            if each.filled >= each.prompt_len:
                each.answer.append(0)
                if len(each.answer) == each.request.max_new_tokens:
                    queue.finish(each)
    return computed


class Observed(Sequence):
    """A sequence with a place for what its pages came from."""

    origins = None


@pytest.mark.parametrize("boundary", [None, 24])
@pytest.mark.parametrize("dense_tail", [0, 5, 20])
def test_company_does_not_change_the_slices_of_a_prompt(boundary, dense_tail):
    settings = {"boundary": boundary, "dense_tail": dense_tail, "whole_slices": True}
    rng = np.random.default_rng(dense_tail)

    def made(length, new, is_sparse):
        return Observed(
            id=next(numbers),
            request=Request(prompt=(0,) * length, max_new_tokens=new),
            sparse=Sparseness() if is_sparse else None,
        )

    computed = total = 0
    for _ in range(20):
        _, queue = scheduler(num_pages=60, **settings)
        together = [
            made(int(rng.integers(1, 80)), int(rng.integers(1, 40)), bool(rng.integers(2)))
            for _ in range(12)
        ]
        written = {}
        for each in together:
            queue.add(each)
            computed += origins(queue, int(rng.integers(8)), written)
        computed += origins(queue, 800, written)
        assert not queue.busy
        for each in together:
            _, queue = scheduler(**settings)
            alone = made(each.prompt_len, 1, each.sparse is not None)
            queue.add(alone)
            total += origins(queue, 20, {})
            assert each.origins == alone.origins
    assert computed < 0.9 * total


def test_pages_are_not_shared_between_different_scales():
    _, queue = scheduler(scales=lambda n: (1.0 if n <= 40 else n / 40, 1.0))
    for length, start in [(40, 0), (44, 0), (44, 40), (45, 0), (39, 36)]:
        each = sequence(length, new=1)
        queue.add(each)
        assert queue.next().start == start, length
        while each.filled < length:
            taken, size = layout_of((16, 8, 2), None).slice_bounds(each.filled, length)
            queue.prefilled(Slice(sequence=each, start=each.filled, length=taken, size=size))
        queue.finish(each)


def test_an_answer_decoded_at_other_scales_is_not_shared():
    _, queue = scheduler(scales=lambda n: (1.0 if n <= 10 else n / 10, 1.0))
    first = sequence(6, new=20)
    queue.add(first)
    run(queue, 12)
    assert first.filled == 17
    assert first.num_shared_pages == 2


def test_cancelled_sequences_free_their_rows_and_pages_wherever_they_are():
    pages, queue = scheduler(max_seqs=2)
    each = [sequence(5, first=0), sequence(40, first=50), sequence(5, first=100)]
    for one in each:
        queue.add(one)
    run(queue, 2)
    for one in each:
        one.cancelled = True
    assert sorted(one.id for one in queue.cancelled()) == [one.id for one in each]
    assert not queue.busy
    assert pages.used == 0
    assert queue.next() is None
