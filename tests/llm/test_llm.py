"""LLM against its own engine, transformers, and what may go wrong."""

import dataclasses
import os
import shutil
import signal

import numpy as np
import pytest

from qwen_jax import LLM, EngineConfig, Request, Sampling
from qwen_jax.config import ConfigError
from qwen_jax.engine import memory as budget
from qwen_jax.engine.request import EngineError, RequestError
from qwen_jax.llm.documents import DocumentError
from qwen_jax.text.tokenizer import Tokenizer, TokenizerError

PROMPTS = ["Once upon a time", "the key", [5, 6, 7, 8], np.array([9, 10], np.uint16)]


def ids_of(llm, prompt) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return tuple(llm.tokenizer.encode_prompt(prompt))
    return tuple(map(int, prompt))


def test_a_mixed_batch_is_answered_in_order_as_the_engine_answers(llm):
    prompts = [*PROMPTS, *PROMPTS[::-1]]
    answers = llm.generate(prompts, max_new_tokens=7)
    requests = [Request(prompt=ids_of(llm, each), max_new_tokens=7) for each in prompts]
    assert [list(each.token_ids) for each in answers] == llm.engine.run(requests)
    assert [each.timings.prompt_tokens for each in answers] == [
        len(each.prompt) for each in requests
    ]
    assert all(each.finish_reason == "length" and each.sparse is None for each in answers)
    assert [each.text for each in answers] == [
        llm.tokenizer.decode(each.token_ids) for each in answers
    ]


@pytest.mark.parametrize("prompt", PROMPTS, ids=["text", "text again", "list", "array"])
def test_one_prompt_gives_one_answer(llm, prompt):
    answer = llm.generate(prompt, max_new_tokens=3)
    assert answer.token_ids == llm.generate([prompt], max_new_tokens=3)[0].token_ids
    assert llm.generate([]) == []


@pytest.mark.torch
def test_answers_log_probabilities_and_scores_are_those_of_transformers(llm, checkpoint):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)

    def rows_of(tokens):
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0].double().log_softmax(-1).numpy()

    for prompt in PROMPTS:
        theirs = list(ids_of(llm, prompt))
        for _ in range(8):  # ids over the tokenizer's are padding
            theirs.append(int(rows_of(theirs)[-1, : llm.tokenizer.size].argmax()))
        answer = llm.generate(prompt, max_new_tokens=8, ignore_eos=True, logprobs=3)
        assert list(answer.token_ids) == theirs[-8:]
        rows = rows_of(theirs)
        for token, found, row in zip(answer.token_ids, answer.logprobs, rows[-9:-1], strict=True):
            assert found.logprob == pytest.approx(row[token], abs=1e-4)
            likeliest = sorted(row, reverse=True)[:3]
            assert [value for _, value in found.top] == pytest.approx(likeliest, abs=1e-4)
        expected = [row[token] for row, token in zip(rows[:-1], theirs[1:], strict=True)]
        np.testing.assert_allclose(llm.score(np.array(theirs)), expected, atol=1e-4)


def test_the_score_of_a_text_is_that_of_its_ids(llm):
    text = "the key of the room"
    np.testing.assert_array_equal(llm.score(text), llm.score(ids_of(llm, text)))
    assert llm.score(text).dtype == np.float32
    assert llm.count_tokens(text) == len(llm.tokenizer.encode_text(text))


def test_a_stop_string_across_tokens_ends_the_answer_before_it(llm):
    whole = llm.generate("the key", max_new_tokens=12).text
    assert len(whole) > 6
    stop = whole[3:5]
    answer = llm.generate("the key", max_new_tokens=12, stop=stop)
    assert (answer.text, answer.finish_reason) == (whole[: whole.index(stop)], "stop")
    first, second = llm.generate(["the key"] * 2, max_new_tokens=12, stop=["never", stop])
    assert first.text == second.text == answer.text
    assert not llm.server.is_busy


def test_sampling_is_what_its_arguments_say_and_the_same_for_a_seed(llm):
    more = {"max_new_tokens": 8, "temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.01}
    answer = llm.generate("the key", seed=7, repetition_penalty=1.2, **more)
    assert (
        answer.token_ids
        == llm.generate("the key", seed=7, repetition_penalty=1.2, **more).token_ids
    )
    sampling = Sampling(
        temperature=1.5, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=7
    )
    request = Request(prompt=ids_of(llm, "the key"), max_new_tokens=8, sampling=sampling)
    assert [list(answer.token_ids)] == llm.engine.run([request])
    assert answer.token_ids != llm.generate("the key", greedy=True, max_new_tokens=8).token_ids


def test_defaults_are_those_of_generation_config(checkpoint, tmp_path):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    ends = LLM(checkpoint, max_len=64, max_seqs=1)
    first = ends.generate("the key", max_new_tokens=4).token_ids
    (model / "generation_config.json").write_text(f'{{"eos_token_id": {first[2]}}}')
    llm = LLM(model, max_len=64, max_seqs=1)
    answer = llm.generate("the key", max_new_tokens=4)
    assert (answer.token_ids, answer.finish_reason) == (first[:2], "stop")
    assert llm.generate("the key", max_new_tokens=4, ignore_eos=True).token_ids == first


def test_a_stream_gives_the_text_piece_by_piece_and_the_answer_at_its_end(llm):
    whole = llm.generate("the key", max_new_tokens=9)
    stream = llm.stream("the key", max_new_tokens=9)
    assert stream.answer is None
    pieces = list(stream)
    assert "".join(pieces) == whole.text
    assert len(pieces) > 1
    assert stream.answer.token_ids == whole.token_ids
    assert list(stream) == []


@pytest.mark.parametrize("how", ["close", "with", "collected"])
def test_a_stream_that_is_left_cancels_its_request_and_no_other(llm, how):
    other = llm.stream("the key", max_new_tokens=6)
    stream = llm.stream("Once", max_new_tokens=400, ignore_eos=True)
    next(stream)
    if how == "close":
        stream.close()
        assert next(stream, None) is None
    elif how == "with":
        with stream:
            pass
    else:
        del stream
    text = "".join(other)
    assert text == llm.generate("the key", max_new_tokens=6).text
    assert not llm.server.is_busy
    assert not llm.engine.busy


def test_streams_and_calls_run_together(llm):
    alone = [llm.generate(each, max_new_tokens=6).text for each in PROMPTS]
    streams = [llm.stream(each, max_new_tokens=6) for each in PROMPTS[:2]]
    first = next(streams[0])
    answers = llm.generate(PROMPTS, max_new_tokens=6)
    assert [each.text for each in answers] == alone
    assert [first + "".join(streams[0]), "".join(streams[1])] == alone[:2]


def test_chat_asks_in_the_chat_format(llm, tmp_path):
    question = llm.tokenizer.encode_chat([{"role": "user", "content": "Who?"}])
    answer = llm.chat(" Who? ", max_new_tokens=5)
    assert answer.token_ids == llm.generate(question, max_new_tokens=5).token_ids
    assert "".join(llm.chat("Who?", stream=True, max_new_tokens=5)) == answer.text
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    system = llm.chat("Who?", system="Be brief.", max_new_tokens=5)
    assert system.token_ids == llm.chat(messages, max_new_tokens=5).token_ids
    (tmp_path / "a.txt").write_text("A text.")
    (tmp_path / "b.py").write_text("code")
    message = [{"role": "user", "content": "A text.\n\nWho?"}]
    for files in (tmp_path / "a.txt", str(tmp_path / "a.txt"), [tmp_path]):
        exclude = ["*.py"] if isinstance(files, list) else None
        answer = llm.chat("Who?", files=files, exclude=exclude, max_new_tokens=5)
        assert answer.token_ids == llm.chat(message, max_new_tokens=5).token_ids


def test_a_session_goes_on_after_its_files(llm, tmp_path):
    (tmp_path / "a.txt").write_text("A text about the key of a room.")
    text, kv = tmp_path / "a.txt", tmp_path / "kv"
    session = llm.prefill(files=text, out=kv, save_every=16)
    answer = session.chat("Who?", max_new_tokens=6)
    assert (
        answer.token_ids == llm.chat("Who?", files=tmp_path / "a.txt", max_new_tokens=6).token_ids
    )
    assert answer.timings.computed_tokens < answer.timings.prompt_tokens
    assert session.documents[0][0] == str(tmp_path / "a.txt")
    again = llm.open_session(str(tmp_path / "kv"))
    assert "".join(again.chat("Who?", stream=True, max_new_tokens=6)) == answer.text
    assert (
        llm.prefill(files=tmp_path / "a.txt", out=tmp_path / "kv").num_tokens == session.num_tokens
    )


def test_a_session_of_raw_text_is_continued(llm, tmp_path):
    session = llm.prefill("the key of the room", out=tmp_path / "kv")
    ids = (*ids_of(llm, "the key of the room"), 5, 6)
    assert session.generate([5, 6], max_new_tokens=6).token_ids == (
        llm.generate(ids, max_new_tokens=6).token_ids
    )
    with pytest.raises(ConfigError, match="prefill with files"):
        session.chat("Who?")


def test_a_session_is_asked_a_question_and_no_more(llm, tmp_path):
    (tmp_path / "a.txt").write_text("A text.")
    session = llm.prefill(files=tmp_path / "a.txt", out=tmp_path / "kv")
    with pytest.raises(ConfigError, match="the session holds its text already"):
        session.chat("Who?", system="Be brief.")
    with pytest.raises(ConfigError, match="not a list of messages"):
        session.chat([{"role": "user", "content": "Who?"}])
    with pytest.raises(TypeError, match="did you mean temperature"):
        session.chat("Who?", temprature=1.0)


def test_what_prefill_tells_may_end_it_and_nothing_is_lost(checkpoint, tmp_path):
    llm, told = LLM(checkpoint, max_len=256, max_seqs=1, slice=64), []

    def told_twice(done, total):
        told.append((done, total))
        if len(told) == 2:
            raise KeyboardInterrupt

    ids = [7] * 200
    with pytest.raises(KeyboardInterrupt):
        llm.prefill(ids, out=tmp_path / "kv", progress=told_twice)
    assert told == [(0, 200), (64, 200)]
    again = []
    session = llm.prefill(ids, out=tmp_path / "kv", progress=lambda *done: again.append(done))
    assert again[0] == told[1]
    assert again[-1] == (200, 200)
    assert session.num_tokens == 200


def test_ctrl_c_ends_the_call_and_nothing_else(llm, monkeypatch):
    expected = llm.generate("the key", max_new_tokens=6).text
    other = llm.stream("the key", max_new_tokens=6)
    step, steps = llm.engine.step, []

    def interrupted():
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["Once", "upon"], max_new_tokens=400, ignore_eos=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(steps) == 3
    monkeypatch.undo()
    assert "".join(other) == expected
    assert not llm.engine.busy
    assert llm.generate("the key", max_new_tokens=6).text == expected


def test_a_progress_bar_is_shown_only_where_it_is_asked_for(llm, capfd):
    llm.generate("the key", max_new_tokens=3)
    assert capfd.readouterr() == ("", "")
    assert llm.generate("the key", max_new_tokens=3, progress=True).text
    assert "answers" in capfd.readouterr().out


ARGUMENTS = {
    "max_new_tokens": (0, "max_new_tokens 0 must be at least 1"),
    "temperature": (-1.0, r"temperature -1.0 must be from 0"),
    "top_p": ("high", "top_p='high' must be a number or None"),
    "top_k": (True, "top_k=True must be an integer or None"),
    "seed": (-1, "seed -1 must be from 0"),
    "logprobs": (21, "logprobs 21 must be from 0 to 20"),
    "stop": ([""], "stop: a stop string has 1 to"),
    "greedy": (1, "greedy=1 must be True or False"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_errors_name_the_argument_of_an_answer(llm, name, unchecked):
    value, said = ARGUMENTS[name]
    with pytest.raises(ConfigError, match=said):
        llm.generate("the key", **{name: value})
    assert not llm.engine.busy


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ("", "prompts is empty"),
        (["x", ""], r"prompts\[1\] is empty"),
        ([[1, 2], [3, 320]], r"prompts\[1\]\[1\]=320 is not a token id"),
        (np.array([1.5]), r"prompts\[0\]=1.5 is not a token id"),
        (["x", [1.5]], r"prompts\[1\]\[0\]=1.5 is not a token id"),
        (["x", 7], r"prompts\[1\] must be"),
        (7, "prompts must be texts or token ids, got int"),
        (
            ["x", [1] * 510],
            r"prompts\[1\]: 510 prompt tokens.*lower max_new_tokens or raise max_len",
        ),
    ],
)
def test_errors_name_the_prompt(llm, prompts, said, unchecked):
    with pytest.raises((ConfigError, RequestError), match=said):
        llm.generate(prompts, max_new_tokens=4)
    assert not llm.engine.busy


OPTIONS = {
    "max_seqs": (0, "max_seqs 0 must be at least 1"),
    "max_len": ("long", "max_len='long' must be an integer or None"),
    "dtype": ("f16", "dtype='f16' must be 'f32' or 'bf16' or None"),
    "dense_tail": (-1, "dense_tail -1 must be at least 0"),
    "dca_chunk": (64, "dca_chunk has no effect.*add dca on"),
    "sparse": ("on", "sparse on: .*give sparse_config FILE"),
    "kernels": ("fast", "kernels='fast'"),
    "mesh": ("rows=2", "rows"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_errors_name_the_argument_of_a_model(checkpoint, name, unchecked):
    value, said = OPTIONS[name]
    with pytest.raises(ConfigError, match=said):
        _ = LLM(checkpoint, **{name: value}).engine


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("temprature", "there is no argument 'temprature'; did you mean temperature?"),
        ("progres", "did you mean progress?"),
        ("stream", "there is no argument 'stream': the method `stream` yields"),
        ("zzz", "there is no argument 'zzz'$"),
    ],
)
def test_an_unknown_argument_is_named_with_what_was_meant(llm, typed, said):
    with pytest.raises(TypeError, match=said.replace("?", r"\?")):
        llm.generate("the key", **{typed: 1})
    with pytest.raises(TypeError, match="did you mean system"):
        llm.chat("x", sytem="y")


def test_the_cache_of_a_session_counts_beside_that_of_the_model(llm, tmp_path, monkeypatch):
    session = llm.prefill("the key of the room", out=tmp_path / "kv", progress=True)
    _ = llm.engine
    totals, memory = [], budget.memory

    def noted(*arguments):
        totals.append(memory(*arguments).total)
        return memory(*arguments)

    monkeypatch.setattr(budget, "memory", noted)
    _ = session.engine
    monkeypatch.setattr("qwen_jax.planner.devices.host_bytes", lambda: totals[0])
    with pytest.raises(ConfigError, match=r"beside .* of caches of other engines, take .* close"):
        _ = llm.open_session(tmp_path / "kv").engine


def test_arguments_that_contradict_each_other_are_refused(llm, tmp_path):
    for arguments, said in (
        ({"greedy": True, "temperature": 1.0}, "greedy contradicts temperature"),
        ({"top_k": 5}, "top_k has no effect on greedy answers: give a temperature"),
    ):
        with pytest.raises(ConfigError, match=said):
            llm.generate("the key", **arguments)
    with pytest.raises(
        ConfigError, match="system goes with a question alone: put it into messages"
    ):
        llm.chat([{"role": "user", "content": "x"}], system="y")
    with pytest.raises(ConfigError, match="question is empty"):
        llm.chat(" ")
    with pytest.raises(DocumentError, match="exclude is for directories, and no files names one"):
        llm.chat("x", exclude=["*.py"])
    with pytest.raises(ConfigError, match="give one of text and files"):
        llm.prefill(out=tmp_path)
    with pytest.raises(ConfigError, match="system goes with files"):
        llm.prefill("x", system="y", out=tmp_path)
    with pytest.raises(RequestError, match="text has one token"):
        llm.score([5])


def test_paths_are_expanded_and_hub_ids_looked_up(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    assert LLM(f"~/{checkpoint.name}", max_len=64).max_len == 64
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="qwen-jax download Qwen/Tiny"):
        LLM("Qwen/Tiny")
    snapshot = tmp_path / "models--Qwen--Tiny" / "snapshots" / "0123"
    shutil.copytree(checkpoint, snapshot)
    assert LLM("Qwen/Tiny").max_len == 2048


def test_without_a_tokenizer_ids_are_answered_with_ids(checkpoint, tmp_path):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    (model / "tokenizer.json").unlink()
    llm = LLM(model, max_len=64, max_seqs=1)
    answer = llm.generate([5, 6, 7], max_new_tokens=3)
    assert (len(answer.token_ids), answer.text) == (3, None)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        llm.generate("the key")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        llm.generate([5], stop="x")


def test_what_is_closed_says_so(checkpoint):
    with LLM(checkpoint, max_len=64, max_seqs=1) as llm:
        llm.generate([5], max_new_tokens=1)
    with pytest.raises(EngineError, match="closed"):
        llm.generate([5], max_new_tokens=1)
    llm.close()


def test_a_failure_of_the_engine_names_the_prompt(llm, monkeypatch):
    step = llm.engine.step

    def failing():
        return [
            dataclasses.replace(each, finish="error", error="not finite", tokens=())
            if each.finish
            else each
            for each in step()
        ]

    monkeypatch.setattr(llm.engine, "step", failing)
    with pytest.raises(RequestError, match=r"prompts\[0\]: not finite"):
        llm.generate(["x", "y"], max_new_tokens=2)
    assert not llm.server.is_busy


def test_the_engine_of_ids_is_configured_as_the_model_is(llm):
    assert llm.engine.max_seqs == 4
    assert EngineConfig(max_len=llm.max_len).max_len == 512
    assert Tokenizer.load(llm.tokenizer.directory).size == llm.tokenizer.size
