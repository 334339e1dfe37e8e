"""Lines of a batch file: what is read, what is refused, and how a line is known again."""

import json
import os
import random

import pytest
from support.batches import chat, completion, line, reader, write
from support.json_mutants import mutated

from qwen_jax.batch import lines
from qwen_jax.batch.lines import BatchError, Input, parse
from qwen_jax.batch.openai_schema import APIError

GOOD = completion("a")
FAULTS = {
    # what is wrong: the line, the error, its code, the field
    "no JSON": (b"{", "not valid JSON", "invalid_json", None),
    "half a line": (json.dumps(GOOD).encode()[:-3], "not valid JSON", "invalid_json", None),
    "no UTF-8": (b'{"custom_id": "\xff"}', "not UTF-8 (byte 15)", "invalid_json", None),
    "a list": (b"[]", "the line is a list, not an object", "invalid_json", None),
    "null": (b"null", "the line is null, not an object", "invalid_json", None),
    "no number": (b'{"custom_id": NaN}', "NaN is no number", "invalid_json", None),
    "a long number": (b"1" * 9999, "not valid JSON", "invalid_json", None),
    "deep": (b"[" * 100_000, "not valid JSON", "invalid_json", None),
    "a number beyond all": (b'{"x": 1e999}', "too large a number", "invalid_json", None),
    "half a character": (b'{"custom_id": "\\ud800"}', "lone surrogate", "invalid_json", None),
    "many keys": (
        b'{"x": {%s "a": 1, "a": 1}}' % b"".join(b'"%d": 1,' % n for n in range(50_000)),
        "'a' is given twice",
        "invalid_json",
        "a",
    ),
    "a name that moves the cursor": (
        GOOD | {"\x1b[2J\n": 1},
        "'\\\\x1b[2J\\\\n' is no field",
        "invalid_request",
        "\\x1b[2J\\n",
    ),
    "a field twice": (b'{"url": 1, "url": 2}', "'url' is given twice", "invalid_json", "url"),
    "no name": (line(None, "x", {}), "custom_id must be", "invalid_request", "custom_id"),
    "an empty name": (line("", "x", {}), "custom_id must be", "invalid_request", "custom_id"),
    "a number as name": (line(7, "x", {}), "custom_id must be", "invalid_request", "custom_id"),
    "a field too many": (GOOD | {"x": 1}, "'x' is no field", "invalid_request", "x"),
    "another method": (GOOD | {"method": "GET"}, "got 'GET'", "invalid_request", "method"),
    "another url": (GOOD | {"url": "/v1/embeddings"}, "embeddings'", "invalid_url", "url"),
    "a list as url": (GOOD | {"url": []}, "url must be", "invalid_url", "url"),
    "no body": (GOOD | {"body": None}, "an object, got null", "invalid_request", "body"),
    "a list as body": (GOOD | {"body": []}, "an object, got a list", "invalid_request", "body"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_line_that_is_wrong_says_what_is(fault, tmp_path):
    raw, message, code, param = FAULTS[fault]
    write(tmp_path / "in", [GOOD, raw])
    first, second = Input(tmp_path / "in").lines()
    assert (first.custom_id, first.error) == ("a", None)
    assert message in str(second.error)
    assert (second.number, second.error.code, second.error.param) == (2, code, param)
    named = isinstance(raw, dict) and isinstance(raw["custom_id"], str) and raw["custom_id"]
    assert second.custom_id == (raw["custom_id"] if named else None)


def test_blank_lines_count_and_are_left_out(tmp_path):
    (tmp_path / "in").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\n  \n[]")
    found = list(Input(tmp_path / "in").lines())
    assert [(each.number, each.custom_id) for each in found] == [(1, "a"), (4, None)]


def test_an_id_is_that_of_all_that_a_line_says():
    raw = json.dumps(GOOD).encode()
    known = parse(1, raw).id
    assert parse(9, raw.replace(b", ", b" ,\t")).id == known
    assert parse(1, json.dumps(dict(reversed(GOOD.items()))).encode()).id == known
    others = [completion("b"), completion("a", (1, 3)), GOOD | {"method": "GET"}]
    ids = {parse(1, json.dumps(each).encode()).id for each in others}
    ids |= {parse(number, b"{").id for number in (1, 2)} | {parse(1, b"{{").id, known}
    ids |= {parse(7, b'{"custom_id": "7"}').id, parse(7, b"{}").id}
    assert len(ids) == 9


def test_a_line_that_is_too_long_is_read_to_its_end_and_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 200)
    raw = [json.dumps(completion("x" * length)).encode() for length in (3, 300, 999, 3)]
    long = [len(each) for each in raw if len(each) > 200]
    assert len(long) == 2
    write(tmp_path / "in", raw)
    found = list(Input(tmp_path / "in").lines())
    assert [each.number for each in found] == [1, 2, 3, 4]
    assert [each.custom_id for each in found] == ["xxx", None, None, "xxx"]
    for each, length in zip(found[1:3], long, strict=True):
        assert str(each.error) == f"the line has {length:,} bytes, lines may have 200"
        assert each.error.code == "line_too_long"
    assert found[1].id != found[2].id
    exact = json.dumps(completion("")).encode()
    write(tmp_path / "in", [exact + b" " * (200 - len(exact)), exact + b" " * (201 - len(exact))])
    codes = [each.error.code for each in Input(tmp_path / "in").lines()]
    assert codes == ["invalid_request", "line_too_long"]


def test_a_file_that_changes_is_refused(tmp_path):
    source = Input(write(tmp_path / "in", [GOOD]))
    assert len(list(source.lines())) == 1
    read = source.lines()
    next(read)
    write(tmp_path / "in", [GOOD, GOOD])
    with pytest.raises(BatchError, match="in changed while it was read"):
        list(read)
    with pytest.raises(BatchError, match="in changed while it was read"):
        next(source.lines())


def test_what_cannot_be_read_twice_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(BatchError, match="is not a regular file"):
            Input(path)
    with pytest.raises(FileNotFoundError):
        Input(tmp_path / "nothing")


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.long)])
def test_mutants_are_requests_or_errors_that_one_line_can_say(count, tokenizer):
    rng = random.Random(count)
    made = reader(tokenizer)
    whole = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["x"], "n": 1}
    seeds = [chat("a", "Hi", **whole), completion("b", (1, 2, 3), **whole)]
    seeds[0]["body"]["messages"].append({"role": "assistant", "content": None})
    codes = set()
    for number in range(count):
        raw = bytearray(json.dumps(mutated(rng.choice(seeds), rng)).encode())
        if number % 4 == 0:
            at = rng.randrange(len(raw))
            raw[at : at + rng.choice([0, 1, 5])] = rng.choice([b"", b"\xff", b'"', b"[" * 200])
        fault = refusal(made, parse(1, bytes(raw)))
        if fault is not None:
            codes.add(fault.code)
            assert str(fault).isprintable()
            assert len(str(fault)) < 1000
            assert len(fault.param or "") < 300
    assert {"invalid_json", "invalid_request", "unsupported_field", "invalid_url"} <= codes


def refusal(made, found) -> APIError | None:
    """Why a line is no request."""
    try:
        made.read(found)
    except APIError as error:
        return error
    return None


def test_a_line_without_an_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1 << 10)
    monkeypatch.setattr(lines, "MOST_LINE_BYTES", 1 << 14)
    path = tmp_path / "in"
    path.write_bytes(b"\0" * (1 << 14) + b"\n")
    assert [each.error.code for each in lines.Input(path).lines()] == ["line_too_long"]
    path.write_bytes(b"{}\n")
    os.truncate(path, 1 << 40)
    with pytest.raises(lines.BatchError, match="line 2 has more than 16,384 bytes"):
        list(lines.Input(path).lines())
