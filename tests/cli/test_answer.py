"""The answer loop against an engine that plays a script."""

import itertools
import signal

import pytest
from support.fake_engine import FakeEngine

from qwen_jax.cli.answer import answer
from qwen_jax.cli.progress import LINE_S, Progress
from qwen_jax.engine.request import Request, RequestError
from qwen_jax.text.tokenizer import Stream, Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny) -> Tokenizer:
    return Tokenizer.load(tiny)


def ask(engine, tokenizer, *, prompt=10, max_new_tokens=100, stop=(), clock=None):
    """The answer, and the pieces of text that were written."""
    pieces: list[str] = []
    done = answer(
        engine,
        Request(prompt=tuple(range(1, prompt + 1)), max_new_tokens=max_new_tokens, eos_ids=(290,)),
        stream=tokenizer and Stream(tokenizer, stop=stop),
        write=pieces.append,
        clock=clock or itertools.count(0.0).__next__,
    )
    return done, pieces


def test_text_is_written_as_it_comes_and_returned_whole(tokenizer):
    text = "A répondre: 漢字 👩🏽‍🚀."
    engine = FakeEngine([*tokenizer.encode_text(text), 290])
    done, pieces = ask(engine, tokenizer)
    assert done.text == "".join(pieces) == text
    assert done.token_ids == tuple(tokenizer.encode_text(text))
    assert done.finish_reason == "stop"
    assert len([piece for piece in pieces if piece]) > 10


def test_the_answer_ends_at_its_longest_length(tokenizer):
    done, _ = ask(FakeEngine(range(65, 80)), tokenizer, max_new_tokens=5)
    assert done.token_ids == tuple(range(65, 70))
    assert done.finish_reason == "length"


def test_without_a_tokenizer_there_are_only_ids():
    done, pieces = ask(FakeEngine([70, 71]), None)
    assert (done.token_ids, done.text, pieces) == ((70, 71), None, [])


def test_a_stop_string_ends_the_answer_and_frees_the_engine(tokenizer):
    engine = FakeEngine(tokenizer.encode_text("one two STOP three four"))
    done, pieces = ask(engine, tokenizer, stop=["STOP"])
    assert done.text == "".join(pieces) == "one two "
    assert done.finish_reason == "stop"
    assert not engine.busy


def test_an_end_token_first_gives_an_empty_answer(tokenizer):
    done, _ = ask(FakeEngine([290]), tokenizer)
    assert (done.text, done.token_ids, done.finish_reason) == ("", (), "stop")
    assert str(done.timings)


@pytest.mark.parametrize(("step", "tokens"), [(0, 0), (1, 0), (7, 5)])
def test_ctrl_c_cancels_the_answer_and_keeps_what_was_said(tokenizer, step, tokens):
    before = signal.getsignal(signal.SIGINT)
    engine = FakeEngine([65] * 50, interrupt_at=[step])
    done, _ = ask(engine, tokenizer)
    assert done.finish_reason == "cancelled"
    assert len(done.token_ids) == tokens + (step == 7)
    assert not engine.busy
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_interrupts_at_once(tokenizer):
    before = signal.getsignal(signal.SIGINT)
    engine = FakeEngine([65] * 50, interrupt_at=[3, 4])
    with pytest.raises(KeyboardInterrupt):
        ask(engine, tokenizer)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_failure_of_the_engine_is_an_error(tokenizer):
    with pytest.raises(RequestError, match="the weights are damaged"):
        ask(FakeEngine(error="the weights are damaged"), tokenizer)


def test_speeds_count_computed_tokens_and_tokens_after_the_first(tokenizer):
    # The clock is read at the start, at the first token and at each new token.
    times = iter([100.0, 104.0, 104.0, 104.5, 105.0, 105.5])
    engine = FakeEngine([65, 66, 67, 68], slice_len=5)
    done, _ = ask(engine, tokenizer, prompt=20, clock=lambda: next(times))
    assert done.timings.ttft_s == 4.0
    assert done.timings.prefill_tokens_per_s == 5.0
    assert done.timings.decode_tokens_per_s == 2.0
    assert "20 prompt tokens, first token after 4.00 s" in str(done.timings)


def test_progress_without_a_terminal_is_a_line_now_and_then():
    now, lines = [0.0], []
    progress = Progress(1000, say=lines.append, clock=lambda: now[0])
    for done in range(0, 1001, 10):
        now[0] = done / 10
        progress.update(done)
    assert len(lines) == 100 / LINE_S - 1
    assert lines[0] == "read 100 of 1,000 tokens, 10 tokens/s, 90 s left"


def test_a_bar_on_a_terminal_goes_away_when_the_answer_begins(tokenizer, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    done, _ = ask(FakeEngine(tokenizer.encode_text("Hi")), tokenizer)
    assert done.text == "Hi"
    assert "Hi" not in capsys.readouterr().err
