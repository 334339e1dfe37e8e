"""Batches from end to end, on an engine whose answers are right only if its cache is."""

import json
import resource

import numpy as np
import pytest
from support.batches import (
    END,
    FAULTY,
    MAX_LEN,
    SETTINGS,
    completion,
    engine,
    expected,
    mixed,
    read,
    reader,
    requests,
    run,
    write,
)
from support.fake_runner import VOCAB

from qwen_jax.batch import run as batches
from qwen_jax.batch.lines import BatchError, Input
from qwen_jax.batch.results import Results
from qwen_jax.storage.jsonl import JournalError


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tokenizer):
    """A file of requests and the records of a run that nothing disturbs."""
    directory = tmp_path_factory.mktemp("undisturbed")
    source = write(directory / "in", mixed(0))
    run(source, directory / "out", tokenizer)
    return source, read(directory / "out"), (directory / "out").read_bytes()


@pytest.mark.parametrize(("count", "max_seqs"), [(1, 1), (1, 4), (3, 2)])
def test_every_line_gets_the_answer_that_it_gets_alone(count, max_seqs, tmp_path, tokenizer):
    lines = mixed(1, 20)
    source = write(tmp_path / "in", lines)
    serving = engine(count, max_seqs=max_seqs)
    done = run(source, tmp_path / "out", tokenizer, serving=serving)
    found = read(tmp_path / "out")
    assert len(found) == len(lines)
    prompts = answers = failures = 0
    for each in lines:
        if each in FAULTY:
            continue
        text, finish, length = expected(tokenizer, each)
        response = found[each["custom_id"]]["response"]
        assert response["status_code"] == (500 if finish == "error" else 200)
        if finish == "error":
            failures += 1
            continue
        (choice,) = response["body"]["choices"]
        assert (choice["text"], choice["finish_reason"]) == (text, finish)
        prompt = len(each["body"]["prompt"])
        assert response["body"]["usage"] == {
            "prompt_tokens": prompt,
            "completion_tokens": length,
            "total_tokens": prompt + length,
        }
        prompts, answers = prompts + prompt, answers + length
    assert (done.prompt_tokens, done.new_tokens) == (prompts, answers)
    assert (done.answered, done.refused) == (20 - failures, len(FAULTY) + failures)
    assert failures < 10
    assert not serving.busy


def test_lines_without_an_answer_have_a_record_that_says_why(undisturbed):
    source, records, _ = undisturbed
    errors = [each for each in records.values() if each["response"]["status_code"] != 200]
    assert len(errors) >= len(FAULTY)
    lines = source.read_bytes().splitlines()
    for record in errors:
        assert record["error"] is None
        error = record["response"]["body"]["error"]
        assert list(error) == ["message", "type", "param", "code"]
        number = int(error["message"].removeprefix("line ").partition(":")[0])
        name = record["custom_id"]
        assert name is None or json.loads(lines[number - 1])["custom_id"] == name
    by_name = {record["custom_id"]: record["response"] for record in errors}
    assert by_name["poisoned"]["status_code"] == 500
    assert by_name["refused"]["status_code"] == 400
    assert by_name["long"]["body"]["error"]["code"] == "context_length_exceeded"


def test_wherever_the_output_is_cut_a_new_run_completes_it(undisturbed, tmp_path, tokenizer):
    source, records, whole = undisturbed
    rng = np.random.default_rng(0)
    ends = [0, *(end + 1 for end, byte in enumerate(whole) if byte == ord("\n"))]
    cuts = {*rng.integers(0, len(whole), 30).tolist(), *ends, *(end - 1 for end in ends[1:])}
    Results(tmp_path / "out", SETTINGS).__exit__()
    serving = engine()
    for cut in sorted(cuts):
        (tmp_path / "out").write_bytes(whole[:cut])
        done = run(source, tmp_path / "out", tokenizer, serving=serving)
        kept = max(end for end in ends if end <= cut)
        assert (tmp_path / "out").read_bytes()[:kept] == whole[:kept]
        assert done.lines == len(records) - whole[:kept].count(b"\n")
        assert read(tmp_path / "out") == records


@pytest.mark.parametrize("steps", [0, 1, 5, 12, 20, 30])
@pytest.mark.parametrize("count", [1, 2])
def test_a_run_that_is_stopped_is_continued(count, steps, undisturbed, tmp_path, tokenizer):
    source, records, _ = undisturbed
    left = [steps]

    def stopped():
        left[0] -= 1
        return left[0] < 0

    run(source, tmp_path / "out", tokenizer, serving=engine(count), stopped=stopped)
    first = (tmp_path / "out").read_bytes()
    assert first.count(b"\n") < len(records)
    run(source, tmp_path / "out", tokenizer, serving=engine(count))
    assert (tmp_path / "out").read_bytes().startswith(first)
    assert read(tmp_path / "out") == records


def test_no_more_prompts_are_held_than_can_run_soon(tmp_path, tokenizer):
    source = write(tmp_path / "in", requests(np.random.default_rng(2), 100))
    asked = batches.items(Input(source), reader(tokenizer, vocab_size=VOCAB, max_len=MAX_LEN))
    taken = 0

    def counted():
        nonlocal taken
        for each in asked:
            taken += 1
            yield each

    held = []
    with Results(tmp_path / "out", SETTINGS) as kept:
        batches.run(
            engine(max_seqs=3),
            tokenizer,
            counted(),
            kept,
            model="tiny",
            on_step=lambda done: held.append(taken - done.lines),
        )
    assert max(held) == 6


def test_a_stop_text_ends_an_answer_before_it(tmp_path, tokenizer):
    lines = [completion(f"r{i}", (i, 1), max_tokens=20) for i in range(6)]
    run(write(tmp_path / "in", lines), tmp_path / "out", tokenizer)
    for name, record in read(tmp_path / "out").items():
        body = record["response"]["body"]
        text = body["choices"][0]["text"]
        if len(text) < 3:
            continue
        each = lines[int(name[1:])]
        each["body"]["stop"] = text[1:3]
        at = text.find(text[1:3])
        run(write(tmp_path / "in 2", [each]), tmp_path / f"out {name}", tokenizer)
        (stopped,) = read(tmp_path / f"out {name}").values()
        (choice,) = stopped["response"]["body"]["choices"]
        assert (choice["text"], choice["finish_reason"]) == (text[:at], "stop")
        assert stopped["response"]["body"]["usage"]["completion_tokens"] == at + 2
        return
    raise AssertionError("every answer is too short")


def test_a_full_disk_keeps_what_is_there_and_a_new_run_goes_on(undisturbed, tmp_path, tokenizer):
    source, records, whole = undisturbed
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = []
    for room in range(500, len(whole), 997):
        before = (tmp_path / "out").read_bytes() if sizes else b""
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
            with pytest.raises(JournalError, match="free space and start again"):
                run(source, tmp_path / "out", tokenizer)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        kept = (tmp_path / "out").read_bytes()
        assert kept.startswith(before)
        assert kept == b"" or kept.endswith(b"\n")
        sizes.append(len(kept))
    assert len(set(sizes)) > 3
    run(source, tmp_path / "out", tokenizer)
    assert read(tmp_path / "out") == records


def test_two_lines_of_one_name_are_refused_with_both_numbers(tmp_path, tokenizer):
    lines = [completion("a"), b"", completion("b"), completion("a", (5,))]
    asked = batches.items(Input(write(tmp_path / "in", lines)), reader(tokenizer))
    with pytest.raises(BatchError, match=r"in: lines 1 and 4 have one custom_id, 'a'"):
        list(asked)


def test_a_line_that_asks_something_else_than_its_result_is_refused(tmp_path, tokenizer):
    source = write(tmp_path / "in", [completion("a"), completion("b")])
    run(source, tmp_path / "out", tokenizer)
    write(source, [completion("new"), completion("a"), completion("b", (1, 2), max_tokens=1)])
    with pytest.raises(BatchError, match=r"result of custom_id 'b', but line 3 of the input"):
        run(source, tmp_path / "out", tokenizer)
    write(source, [completion("b"), completion("c")])
    assert run(source, tmp_path / "out", tokenizer).lines == 1
    assert set(read(tmp_path / "out")) == {"a", "b", "c"}


def test_results_of_other_settings_are_refused_and_kept(tmp_path, tokenizer):
    source = write(tmp_path / "in", [completion("a")])
    run(source, tmp_path / "out", tokenizer)
    before = (tmp_path / "out").read_bytes()
    with pytest.raises(JournalError, match=r"out holds results of other settings \(seed 0 -> 1\)"):
        run(source, tmp_path / "out", tokenizer, settings=SETTINGS | {"seed": 1})
    assert (tmp_path / "out").read_bytes() == before
    (tmp_path / "out").write_bytes(before[:-1])  # the only line is torn: nothing is kept
    run(source, tmp_path / "out", tokenizer, settings=SETTINGS | {"seed": 1})


META = '{"format": "qwen-jax batch 1", "settings": {}}'


@pytest.mark.parametrize(
    ("content", "meta", "message"),
    [
        (b"notes", None, "out is not the output of a batch, .*out.meta is missing"),
        (b"{}\n", META, "line 1 is not a result, id is missing"),
        (b"\n", META, "line 1 is not a result, Expecting value"),
        (b'{"id": "x", "custom_id": "x"}\n', META, "line 1 is not a result, id must be the id"),
        (b"{}\n", "{", "out.meta is not valid JSON.*: name another output than"),
        (b"{}\n", "[]", "out.meta must hold a JSON object, got a list: name another output"),
        (b"{}\n", "{}", "out.meta does not belong to a batch, format is missing"),
        (b"", "mine", "out.meta is not valid JSON"),
        (b"", '{"seed": 1}', "out.meta does not belong to a batch"),
        (None, '{"format": "mine"}', "out.meta does not belong to a batch"),
    ],
)
def test_a_file_that_is_none_of_ours_is_left_alone(content, meta, message, tmp_path):
    given = {"out": content, "out.meta": None if meta is None else meta.encode()}
    given = {name: data for name, data in given.items() if data is not None}
    for name, data in given.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(JournalError, match=message):
        Results(tmp_path / "out", {})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == given


def test_a_second_result_of_a_line_is_seen(tmp_path, tokenizer):
    run(write(tmp_path / "in", [completion("a")]), tmp_path / "out", tokenizer)
    (tmp_path / "out").write_bytes((tmp_path / "out").read_bytes() * 2)
    with pytest.raises(JournalError, match="line 2 is a second result of custom_id 'a'"):
        Results(tmp_path / "out", SETTINGS)


LONG_PROMPTS = {
    "ids": ([1, 2, 3] * 1_200_000, 3_600_000),
    "text": ("in the other thing " * 550_000, 6_600_000),
}


@pytest.mark.parametrize("kind", ["ids", pytest.param("text", marks=pytest.mark.long)])
def test_a_line_of_10_mb_is_answered_or_refused_with_numbers(kind, tmp_path, tokenizer):
    prompt, count = LONG_PROMPTS[kind]
    lines = [
        completion("fits", (4, 5), max_tokens=2, metadata={"text": "x" * 10_000_000}),
        completion("too long", prompt),
    ]
    source = write(tmp_path / "in", lines)
    assert min(map(len, source.read_bytes().splitlines())) > 10_000_000
    run(source, tmp_path / "out", tokenizer)
    found = read(tmp_path / "out")
    assert found["fits"]["response"]["status_code"] == 200
    error = found["too long"]["response"]["body"]["error"]
    assert error["code"] == "context_length_exceeded"
    assert f"line 2: {count:,} prompt tokens and up to 16 new ones do not fit" in error["message"]


def test_work_is_counted_token_by_token(undisturbed, tmp_path, tokenizer):
    source, _, _ = undisturbed
    seen = []
    run(source, tmp_path / "out", tokenizer, on_step=lambda done: seen.append(done.work))
    assert seen == sorted(seen)
    asked = batches.items(
        Input(source), reader(tokenizer, vocab_size=VOCAB, max_len=MAX_LEN, eos_ids=(END,))
    )
    assert seen[-1] == sum(each.size for _, each in asked if isinstance(each, batches.ParsedLine))
