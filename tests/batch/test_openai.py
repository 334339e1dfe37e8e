"""Records as OpenAI's own client reads them."""

import json

import pytest
from support.batches import chat, completion, reader

from qwen_jax.batch import results
from qwen_jax.batch.lines import parse
from qwen_jax.batch.openai_schema import APIError

openai = pytest.importorskip("openai", reason="the client is not installed: pip install .[test]")


def asked(tokenizer, each):
    return reader(tokenizer).read(parse(1, json.dumps(each).encode()))


def body(record):
    """The body of a record that was written and read."""
    read = json.loads(json.dumps(record))
    assert list(read) == ["id", "custom_id", "response", "error"]
    assert list(read["response"]) == ["status_code", "request_id", "body"]
    assert read["error"] is None
    return read["response"]["body"]


def assert_is(kind, value):
    """A model of the client that takes a value as it is, and knows all of it."""
    model = kind.model_validate(value, strict=True)
    assert model.model_dump(exclude_unset=True) == value
    assert not model.model_extra
    return model


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_an_answer_to_a_conversation_is_a_chat_completion(finish, tokenizer):
    record = results.answered(
        asked(tokenizer, chat("a")), "Because.", finish=finish, new_tokens=2, model="tiny"
    )
    read = assert_is(openai.types.chat.ChatCompletion, body(record))
    assert read.choices[0].message.content == "Because."
    assert read.choices[0].finish_reason == finish
    assert read.usage.total_tokens == read.usage.prompt_tokens + 2


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_a_continuation_is_a_completion(finish, tokenizer):
    record = results.answered(
        asked(tokenizer, completion("a")), "x\n", finish=finish, new_tokens=2, model="tiny"
    )
    read = assert_is(openai.types.Completion, body(record))
    assert read.choices[0].text == "x\n"
    assert (read.usage.prompt_tokens, read.usage.completion_tokens) == (2, 2)


def test_an_error_is_one_of_theirs(tokenizer):
    line = parse(7, b"{")
    record = results.failed(line, APIError("no", code="invalid_json", param=None))
    read = assert_is(openai.types.shared.ErrorObject, body(record)["error"])
    assert read.message == "line 7: no"
    assert record["response"]["status_code"] == 400


def test_requests_that_the_client_knows_are_read_or_refused_by_name(tokenizer):
    from openai.types import completion_create_params as texts
    from openai.types.chat import completion_create_params as chats

    refused = {}
    for make, params in (
        (chat, chats.CompletionCreateParamsNonStreaming),
        (completion, texts.CompletionCreateParamsNonStreaming),
    ):
        for name in params.__required_keys__ | params.__optional_keys__:
            each = make("a", **{name: [{"x": 1}]})
            try:
                asked(tokenizer, each)
            except APIError as error:
                refused[name] = str(error)
    assert len(refused) > 30
    for name, error in refused.items():
        assert name in error
