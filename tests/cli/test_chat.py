"""A conversation over stdin, and at a terminal that is a pipe."""

import io
import os
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from qwen_jax.cli import chat
from qwen_jax.text.tokenizer import Tokenizer


@pytest.fixture
def talk(tiny, monkeypatch, run):
    """Runs `chat` with these lines on stdin."""

    def talk(*lines, flags=()):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run("chat", tiny, *flags)

    return talk


def chat_ids(tokenizer, *turns):
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]
    return tuple(tokenizer.encode_chat(messages))


@pytest.fixture
def tokenizer(tiny):
    return Tokenizer.load(tiny)


def test_each_prompt_begins_with_the_conversation_so_far(fake, talk, tokenizer):
    fake.answer = tokenizer.encode_text("Yes.")
    code, out, _ = talk("One?", "", "Two?")
    assert code == 0
    assert out == "Yes.\nYes.\n"
    assert [request.prompt for request in fake.requests] == [
        chat_ids(tokenizer, "One?"),
        chat_ids(tokenizer, "One?", "Yes.", "Two?"),
    ]


def test_reset_forgets_and_quit_leaves(fake, talk, tokenizer):
    talk("One?", "/reset", "Two?", "/quit", "Three?")
    assert [request.prompt for request in fake.requests] == [
        chat_ids(tokenizer, "One?"),
        chat_ids(tokenizer, "Two?"),
    ]


def test_a_stopped_answer_stays_and_an_unborn_one_takes_its_question_along(fake, talk, tokenizer):
    fake.answer, fake.slice_len = (65,) * 9, 1000
    fake.interrupt_at = (3,)
    _, out, _ = talk("One?", "Two?")
    first = fake.requests[0].prompt
    assert out == "bbbb\n" + "b" * 9 + "\n"
    assert fake.requests[1].prompt[: len(first)] == first
    fake.requests.clear()
    fake.slice_len, fake.interrupt_at = 4, (fake.num_steps,)
    _, _, err = talk("One?", "Two?")
    assert "your message is not in the conversation" in err
    assert fake.requests[1].prompt == chat_ids(tokenizer, "Two?")


def test_files_go_before_the_next_message_only(fake, talk, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("Ants.")
    fake.answer = tokenizer.encode_text("Yes.")
    talk(f"/file {tmp_path / 'a.txt'}", "Who?", "And?")
    assert fake.requests[0].prompt == chat_ids(tokenizer, "Ants.\n\nWho?")
    assert fake.requests[1].prompt == chat_ids(tokenizer, "Ants.\n\nWho?", "Yes.", "And?")


def test_params_are_shown_and_changed(fake, talk):
    _, _, err = talk("/params temperature 0.5", "/params max_new_tokens 7", "Who?")
    assert "temperature 0.5" in err
    assert fake.requests[0].sampling.temperature == 0.5
    assert fake.requests[0].max_new_tokens == 7


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("/frob", "there is no /frob"),
        ("/file", "/file needs a path"),
        ("/file nowhere", "nowhere is missing"),
        ("/params heat 3", "there is no parameter 'heat'"),
        ("/params top_k many", "top_k must be a number"),
        ("/params top_p 3", "top_p=3.0 must be"),
        ("/params max_new_tokens 0", "max_new_tokens=0 must be"),
        ("word " * 3000, "it holds 2,048: /reset begins"),
        ("a lone surrogate \udc80", "lone surrogate"),
    ],
)
def test_a_mistake_does_not_end_the_conversation(fake, talk, tokenizer, line, fault):
    code, _, err = talk(line, "Who?")
    assert code == 0
    assert fault in err
    assert "Traceback" not in err
    assert [request.prompt for request in fake.requests] == [chat_ids(tokenizer, "Who?")]


def test_help_and_tokens_are_told(fake, talk, tokenizer):
    _, _, err = talk("/help", "/tokens")
    opening = len(tokenizer.open_chat())
    assert "/params [NAME VALUE]" in err
    assert f"{opening} tokens of 2,048" in err


def test_a_system_text_replaces_the_default(fake, talk, tokenizer):
    talk("Who?", flags=["--system", "Be brief."])
    system = {"role": "system", "content": "Be brief."}
    expected = tokenizer.encode_chat([system, {"role": "user", "content": "Who?"}])
    assert fake.requests[0].prompt == tuple(expected)


def test_the_last_answer_may_be_cut_but_says_so(fake, talk, tokenizer):
    room = len(chat_ids(tokenizer, "Who?")) + 3
    fake.answer = (65,) * 9
    _, out, err = talk("Who?", flags=["--max-len", room])
    assert out == "bbb\n"
    assert "cut off after 3 tokens" in err


def test_a_second_turn_reads_only_what_is_new(talk):
    flags = ["--max-new-tokens", 2, "--slice", 256, "--greedy"]
    code, _, err = talk("the other thing " * 100, "Who?", flags=flags)
    assert code == 0
    assert " from the cache), " in err  # whole pages: how many is the engine's choice


def test_the_terminal_keeps_a_history(tiny, fake, monkeypatch, tmp_path, run):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("half a li\x03One?\n/tokens\n\x04")
        code, _, err = run("chat", tiny)
    assert code == 0
    assert len(fake.requests) == 1
    assert "tokens of" in err
    assert "+One?" in (tmp_path / "qwen-jax" / "history").read_text()


def _homeless():
    raise RuntimeError("no home")


@pytest.mark.parametrize("state", ["file/state", "state", "zero", "missing"])
def test_without_a_place_for_a_history_there_is_none(tiny, fake, monkeypatch, tmp_path, run, state):
    (tmp_path / "file").touch()
    for name, kind in {"state": os.mkfifo, "zero": None}.items():
        (tmp_path / name / "qwen-jax").mkdir(parents=True)
        history = tmp_path / name / "qwen-jax" / "history"
        kind(history) if kind else history.symlink_to("/dev/zero")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / state))
    if state == "missing":
        monkeypatch.delenv("XDG_STATE_HOME")
        monkeypatch.setattr(Path, "home", _homeless)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("One?\nTwo?\n\x04")
        code, _, err = run("chat", tiny)
    assert code == 0
    assert len(fake.requests) == 2
    assert "error" not in err


def test_a_disk_that_fills_up_does_not_end_the_conversation(tiny, fake, monkeypatch, tmp_path, run):
    def full(self, string):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("prompt_toolkit.history.FileHistory.store_string", full)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("One?\nTwo?\n\x04")
        assert run("chat", tiny)[0] == 0
    assert len(fake.requests) == 2


def test_standard_input_that_is_no_text_is_refused(tiny, fake, monkeypatch, run):
    lines = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n/file -\nWho?\n"), encoding="ascii")
    monkeypatch.setattr("sys.stdin", lines)
    code, _, err = run("chat", tiny)
    assert code == 0
    assert "error: character" in err
    assert "standard input is the conversation itself" in err
    assert len(fake.requests) == 1


def test_a_line_without_an_end_is_refused(tiny, fake, monkeypatch, run):
    monkeypatch.setattr(chat, "LINE_CHARS", 1000)
    with Path("/dev/zero").open() as endless:
        monkeypatch.setattr("sys.stdin", endless)
        code, _, err = run("chat", tiny)
    assert code == 2
    assert "a line of standard input has over 1,000 characters" in err
