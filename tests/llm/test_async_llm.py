"""AsyncLLM: many requests at once, on a thread of its own."""

import asyncio
import threading
from unittest import mock

import numpy as np
import pytest

from qwen_jax import AsyncLLM
from qwen_jax.config import ConfigError
from qwen_jax.engine.request import EngineError, RequestError
from qwen_jax.llm import async_llm
from qwen_jax.llm.async_llm import AsyncSession

PROMPTS = ["Once upon a time", "the key", [5, 6, 7, 8], "x", [9, 10]]


@pytest.fixture
def shared(llm):
    """An AsyncLLM over the model that is loaded already."""
    with mock.patch.object(async_llm, "LLM", return_value=llm):
        return AsyncLLM("not loaded")


def test_concurrent_requests_are_batched_and_equal_the_synchronous_ones(llm, shared, monkeypatch):
    expected = [llm.generate(each, max_new_tokens=8).token_ids for each in PROMPTS]
    step, most, threads = llm.engine.step, [], set()

    def seen():
        threads.add(threading.current_thread())
        events = step()
        most.append(len(events))
        return events

    monkeypatch.setattr(llm.engine, "step", seen)

    async def main():
        calls = [shared.generate(each, max_new_tokens=8) for each in PROMPTS]
        return await asyncio.gather(*calls)

    answers = asyncio.run(main())
    assert [each.token_ids for each in answers] == expected
    assert max(most) == 4
    assert len(threads) == 1
    assert threads != {threading.main_thread()}


def test_all_methods_give_what_the_synchronous_ones_give(llm, shared, tmp_path):
    (tmp_path / "a.txt").write_text("A text about a key.")
    session = llm.prefill(files=tmp_path / "a.txt", out=tmp_path / "kv")

    async def main():
        several = await shared.generate(PROMPTS[:2], max_new_tokens=5)
        assert [each.text for each in several] == [
            each.text for each in llm.generate(PROMPTS[:2], max_new_tokens=5)
        ]
        assert (await shared.chat("Who?", max_new_tokens=5)).text == (
            llm.chat("Who?", max_new_tokens=5).text
        )
        np.testing.assert_array_equal(await shared.score("the key"), llm.score("the key"))
        assert await shared.count_tokens("the key") == llm.count_tokens("the key")
        assert await shared.engine() is llm.engine
        for opened in (
            await shared.open_session(tmp_path / "kv"),
            await shared.prefill(files=tmp_path / "a.txt", out=tmp_path / "kv"),
        ):
            assert isinstance(opened, AsyncSession)
            assert opened.num_tokens == session.num_tokens
            answer = await opened.chat("Who?", max_new_tokens=5)
            assert answer.text == session.chat("Who?", max_new_tokens=5).text
            await opened.close()

    asyncio.run(main())


def test_a_stream_gives_pieces_and_the_answer(llm, shared):
    async def main():
        stream = await shared.stream("the key", max_new_tokens=9)
        pieces = [piece async for piece in stream]
        chat = await shared.chat("Who?", stream=True, max_new_tokens=5)
        return pieces, stream.answer, "".join([piece async for piece in chat])

    pieces, answer, chat = asyncio.run(main())
    assert "".join(pieces) == answer.text == llm.generate("the key", max_new_tokens=9).text
    assert len(pieces) > 1
    assert chat == llm.chat("Who?", max_new_tokens=5).text


async def until(condition) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_cancelled_task_takes_its_request_with_it_and_no_other(llm, shared):
    async def main():
        other = asyncio.create_task(shared.generate("the key", max_new_tokens=60))
        task = asyncio.create_task(shared.generate("Once", max_new_tokens=400, ignore_eos=True))
        await until(lambda: llm.server.is_busy)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        answer = await other
        await until(lambda: not llm.engine.busy)
        return answer

    assert asyncio.run(main()).text == llm.generate("the key", max_new_tokens=60).text


def test_a_stream_that_is_closed_cancels_its_request(llm, shared):
    async def main():
        async with await shared.stream("x", max_new_tokens=400, ignore_eos=True) as stream:
            await anext(stream)
        assert [piece async for piece in stream] == []
        await until(lambda: not llm.engine.busy)

    asyncio.run(main())


def test_errors_reach_who_waits_and_leave_the_others(llm, shared):
    async def main():
        good = asyncio.create_task(shared.generate("the key", max_new_tokens=20))
        with pytest.raises(ConfigError, match="max_new_tokens 0"):
            await shared.generate("x", max_new_tokens=0)
        with pytest.raises(RequestError, match=r"prompts\[1\]\[0\]"):
            await shared.generate(["x", [320]], max_new_tokens=4)
        return await good

    assert asyncio.run(main()).text == llm.generate("the key", max_new_tokens=20).text


def test_a_step_that_fails_reaches_all_who_wait_and_the_engine_lives_on(llm, shared, monkeypatch):
    def broken():
        raise OSError("the device is gone")

    async def main():
        await shared.front()
        with monkeypatch.context() as patch:
            patch.setattr(llm.engine, "step", broken)
            calls = [shared.generate(each, max_new_tokens=5) for each in PROMPTS]
            found = await asyncio.gather(*calls, return_exceptions=True)
            assert [str(each) for each in found] == ["the device is gone"] * 5
        return await shared.generate("the key", max_new_tokens=5)

    assert asyncio.run(main()).text == llm.generate("the key", max_new_tokens=5).text


def test_the_loop_goes_on_while_the_engine_steps(llm, shared, monkeypatch):
    step, ticked = llm.engine.step, threading.Event()

    def waiting():
        assert ticked.wait(60)  # never, if the loop waited for this step
        return step()

    monkeypatch.setattr(llm.engine, "step", waiting)

    async def main():
        task = asyncio.create_task(shared.generate("the key", max_new_tokens=3))
        await until(lambda: llm.server.is_busy)
        ticked.set()
        return await task

    assert asyncio.run(main()).timings.new_tokens == 3


def test_who_waits_when_it_is_closed_is_told(llm, checkpoint):
    async def main():
        async with AsyncLLM(checkpoint, max_len=512, max_seqs=1) as model:
            task = asyncio.create_task(model.generate("x", max_new_tokens=500, ignore_eos=True))
            opened = await model.front()
            await until(lambda: opened.engine.busy)
        with pytest.raises(EngineError, match="closed"):
            await task
        with pytest.raises(EngineError, match="closed"):
            await model.generate("x")

    asyncio.run(main())


def test_it_loads_once_closes_and_names_what_is_wrong(checkpoint, tmp_path):
    async def main():
        async with AsyncLLM(checkpoint, max_len=64, max_seqs=1) as llm:
            assert await llm.front() is await llm.llm()
            assert (await llm.generate([5], max_new_tokens=1)).timings.new_tokens == 1
        with pytest.raises(ConfigError, match="dense_tail -1"):
            await AsyncLLM(checkpoint, dense_tail=-1).count_tokens("x")

    asyncio.run(main())
