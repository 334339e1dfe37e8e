"""Bodies of requests: every field is honoured, neutral, or refused by name."""

import dataclasses
import json
import re

import pytest
from support.batches import chat, completion, line, reader

from qwen_jax.batch.lines import CHAT, parse
from qwen_jax.batch.openai_schema import IGNORED, APIError
from qwen_jax.engine.request import Sampling
from qwen_jax.text.tokenizer import TokenizerError


def asked(made, each):
    return made.read(parse(4, json.dumps(each).encode()))


def test_a_conversation_is_encoded_by_the_chat_template(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "in "}, {"type": "text", "text": "a"}],
        },
        {"role": "assistant", "content": "Yes <|im_end|>", "tool_calls": None, "refusal": None},
        {"role": "user", "content": "Why?"},
    ]
    found = asked(reader(tokenizer, eos_ids=(5,)), line("a", CHAT, {"messages": messages}))
    plain = [
        {"role": each["role"], "content": text}
        for each, text in zip(
            messages, ["Be brief.", "in a", "Yes <|im_end|>", "Why?"], strict=True
        )
    ]
    assert found.request.prompt == tuple(tokenizer.encode_chat(plain))
    assert found.request.eos_ids == (5, tokenizer.control("<|im_end|>"))
    assert found.request.max_new_tokens == 16
    assert found.is_chat


@pytest.mark.parametrize("prompt", ["in the other", ["in the other"]])
def test_a_completion_is_encoded_as_it_is(tokenizer, prompt):
    found = asked(reader(tokenizer, eos_ids=(5,)), completion("a", prompt))
    assert found.request.prompt == tuple(tokenizer.encode_text("in the other"))
    assert found.request.eos_ids == (5,)
    assert not found.is_chat


@pytest.mark.parametrize("prompt", [[7, 8, 9], [[7, 8, 9]]])
def test_token_ids_are_a_prompt(tokenizer, prompt):
    assert asked(reader(tokenizer), completion("a", prompt)).request.prompt == (7, 8, 9)


def test_fields_go_before_flags(tokenizer):
    made = reader(
        tokenizer,
        max_new_tokens=9,
        stop=("END",),
        sampling={"temperature": 0.7, "top_k": 20, "top_p": 0.8, "seed": 1},
    )
    assert asked(made, completion("a")).request.max_new_tokens == 9
    assert asked(made, completion("a")).stop == ("END",)
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "seed": 5,
    }
    found = asked(made, chat("a", max_tokens=3, stop="x", ignore_eos=True, **given))
    assert found.request.sampling == Sampling(**given)
    assert (found.request.max_new_tokens, found.stop) == (3, ("x",))
    assert found.request.eos_ids == ()
    assert asked(made, chat("a", max_completion_tokens=4)).request.max_new_tokens == 4
    assert asked(made, chat("a", stop=["x", "y"])).stop == ("x", "y")
    assert asked(made, completion("a", temperature=0)).request.sampling.temperature == 0


def test_lines_without_a_seed_have_one_of_their_own_that_stays(tokenizer):
    def seed(custom_id, **sampling):
        made = reader(tokenizer, sampling={"temperature": 1} | sampling)
        return asked(made, completion(custom_id)).request.sampling.seed

    assert seed("a") == seed("a")
    assert len({seed("a"), seed("b"), seed("\u00e9"), seed("a", seed=1)}) == 4


def test_null_is_what_was_left_out(tokenizer):
    names = "max_tokens temperature top_p seed stop n logprobs stream stream_options tools audio"
    found = asked(reader(tokenizer), chat("a", **dict.fromkeys(names.split())))
    assert found.request == asked(reader(tokenizer), chat("a")).request


def test_fields_without_effect_may_say_anything(tokenizer):
    plain = asked(reader(tokenizer), chat("a")).request
    for name in IGNORED:
        assert asked(reader(tokenizer), chat("a", **{name: {"x": 1}})).request == plain


@pytest.mark.parametrize(
    "body",
    [
        {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}},
        {
            "logprobs": False,
            "stream": False,
            "top_logprobs": 0,
            "tools": [],
            "modalities": ["text"],
        },
        {"response_format": {"type": "text"}, "tool_choice": "none", "parallel_tool_calls": True},
    ],
)
def test_neutral_values_are_taken(tokenizer, body):
    plain = asked(reader(tokenizer), chat("a")).request
    assert asked(reader(tokenizer), chat("a", **body)).request == plain


REFUSED = {
    # what is asked: the line, the error, the field
    "two answers": (chat("a", n=2), "n=2 is not supported: leave it out or give 1", "n"),
    "a truth value as number": (chat("a", n=True), "n=True is not supported", "n"),
    "frequency_penalty": (completion("a", frequency_penalty=0.5), "give 0", "frequency_penalty"),
    "presence_penalty": (chat("a", presence_penalty=-1), "give 0", "presence_penalty"),
    "logprobs": (chat("a", logprobs=True), "give False", "logprobs"),
    "no logprobs but one": (completion("a", logprobs=0), "give False", "logprobs"),
    "logit_bias": (chat("a", logit_bias={"5": -100}), "logit_bias=", "logit_bias"),
    "stream": (chat("a", stream=True), "stream=True is not supported", "stream"),
    "tools": (chat("a", tools=[{"type": "function"}]), "tools=", "tools"),
    "json": (chat("a", response_format={"type": "json_object"}), "format=", "response_format"),
    "reasoning": (chat("a", reasoning_effort="low"), "leave it out", "reasoning_effort"),
    "echo": (completion("a", echo=True), "echo=True", "echo"),
    "a field of the other": (chat("a", echo=False), "echo=False is not supported", "echo"),
    "no such field": (chat("a", temprature=1), "temprature=1 is not supported", "temprature"),
    "hot": (
        chat("a", temperature="hot"),
        "temperature: expected `float | null`, got `str`",
        "temperature",
    ),
    "cold": (chat("a", temperature=-1), "temperature=-1.0 must be a number", None),
    "top_p": (chat("a", temperature=1, top_p=1.5), "top_p=1.5 must be", None),
    "greedy top_p": (chat("a", top_p=0.5), "top_p has no effect on greedy answers", "top_p"),
    "half a seed": (chat("a", seed=0.5), "seed: expected `int | null`", "seed"),
    "seed": (chat("a", seed=-1), "seed=-1 must be an integer from 0", None),
    "no tokens": (chat("a", max_tokens=0), "max_tokens: expected `int` >= 1", "max_tokens"),
    "half a token": (completion("a", max_tokens=1.5), "max_tokens: expected `int", "max_tokens"),
    "two limits": (
        chat("a", max_tokens=1, max_completion_tokens=2),
        "contradict each other",
        "max_tokens",
    ),
    "a limit of chat": (completion("a", max_completion_tokens=1), "is not supported", None),
    "an empty stop": (chat("a", stop=[""]), "a stop string has 1 to", None),
    "a number as stop": (chat("a", stop=5), "stop: expected `str | array | null`", "stop"),
    "many numbers as stop": (chat("a", stop=[5]), "expected `str`", "stop[0]"),
    "ignore_eos": (chat("a", ignore_eos=1), "ignore_eos: expected `bool`", "ignore_eos"),
    "no messages": (line("a", CHAT, {}), "messages: it is missing", "messages"),
    "empty messages": (line("a", CHAT, {"messages": []}), "`array` of length >= 1", "messages"),
    "text for messages": (line("a", CHAT, {"messages": "x"}), "expected `array`", "messages"),
    "a text as message": (line("a", CHAT, {"messages": ["x"]}), "expected `object`", "messages[0]"),
    "no prompt": (completion("a", None), "prompt: it is missing", "prompt"),
    "an empty prompt": (completion("a", ""), "`str` of length >= 1", "prompt"),
    "several prompts": (completion("a", ["x", "y"]), "several prompts", "prompt"),
    "an empty list": (completion("a", []), "`array` of length >= 1", "prompt"),
    "an empty text in a list": (completion("a", [""]), "`str` of length >= 1", "prompt[0]"),
    "no ids in a list": (completion("a", [[]]), "`array` of length >= 1", "prompt[0]"),
    "a truth value as id": (completion("a", [True]), "got `bool`", "prompt[0]"),
    "a truth value as temperature": (chat("a", temperature=True), "got `bool`", "temperature"),
    "a number beyond all": (chat("a", temperature=10**400), "out of range", "temperature"),
    "a large limit": (chat("a", max_tokens=10**400), "`int` <= 2147483647", "max_tokens"),
    "an id too large": (completion("a", [1, 320]), "prompt[1]=320 is not a token id", None),
    "half an id": (completion("a", [1.5]), "prompt[0]: expected `int | str | array`", "prompt[0]"),
    "half a character": (completion("a", "\ud800"), "lone surrogate", None),
    "too long": (
        completion("a", "x" * 2040),
        "2,040 prompt tokens and up to 16 new ones do not fit into the 2,048",
        "prompt",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(case, tokenizer):
    each, message, param = REFUSED[case]
    with pytest.raises(APIError) as caught:
        asked(reader(tokenizer), each)
    assert message in str(caught.value)
    assert param in (None, caught.value.param)


@pytest.mark.parametrize(
    ("message", "fault", "where"),
    [
        ({"role": "tool", "content": "x"}, "role 'tool' is not one of system, user", None),
        ({"role": "developer", "content": "x"}, "role 'developer' is not one of", None),
        ({"role": 5, "content": "x"}, "role: expected `str`, got `int`", "messages[1].role"),
        ({"role": "user"}, "content: it is missing", "messages[1].content"),
        ({"role": "user", "content": "x", "name": "Al"}, "not supported", "messages[1].name"),
        ({"role": "user", "content": [{"text": "x"}]}, "missing", "messages[1].content[0].type"),
        ({"content": "x", "a`\n- at `$": 1}, "leave it out", "messages[1].a`\\n- at `$"),
        (
            {"role": "assistant", "content": None, "tool_calls": [{}]},
            "tool_calls is not supported",
            "messages[1].tool_calls",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "this model reads text",
            "messages[1].content[0].type",
        ),
    ],
)
def test_messages_that_the_model_cannot_read_are_refused(message, fault, where, tokenizer):
    first = {"role": "user", "content": "Hi"}
    with pytest.raises(APIError, match=re.escape(fault)) as caught:
        asked(reader(tokenizer), line("a", CHAT, {"messages": [first, message]}))
    assert caught.value.param == where


def test_a_line_that_fits_exactly_is_taken(tokenizer):
    found = asked(reader(tokenizer), completion("a", "x" * 2032))
    assert found.size == 2048


def test_a_model_that_does_not_chat_ends_the_run(tokenizer):
    base = reader(dataclasses.replace(tokenizer, template=None))
    asked(base, completion("a"))
    with pytest.raises(TokenizerError, match="base model"):
        asked(base, chat("a"))


def test_questions_go_on_with_the_turn_in_which_a_session_ends(tokenizer):
    opening = (
        *tokenizer.encode_turn("system", "Be brief."),
        *tokenizer.open_turn("user", "A b.\n"),
    )
    made = dataclasses.replace(reader(tokenizer), prefix=opening, in_turn=True)
    later = [{"role": "assistant", "content": "Yes"}, {"role": "user", "content": "How?"}]
    found = asked(
        made, line("a", CHAT, {"messages": [{"role": "user", "content": "Why?"}, *later]})
    )
    whole = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "A b.\nWhy?"},
        *later,
    ]
    assert found.request.prompt == tuple(tokenizer.encode_chat(whole))
    assert asked(made, completion("a", [7, 8])).request.prompt == (*opening, 7, 8)


@pytest.mark.parametrize(
    ("in_turn", "role", "problem"),
    [
        (True, "system", r"messages\[0\].role='system' must be 'user'"),
        (True, "assistant", r"messages\[0\].role='assistant' must be 'user'"),
        (False, "user", "cannot follow a KV session of raw text"),
    ],
)
def test_what_cannot_follow_a_session_is_refused(tokenizer, in_turn, role, problem):
    made = dataclasses.replace(reader(tokenizer), prefix=(7, 8), in_turn=in_turn)
    with pytest.raises(APIError, match=problem):
        asked(made, line("a", CHAT, {"messages": [{"role": role, "content": "Why?"}]}))


def test_a_session_counts_for_the_length(tokenizer):
    made = dataclasses.replace(reader(tokenizer), prefix=(7,) * 50, max_len=60, in_turn=True)
    with pytest.raises(APIError, match=r"52 prompt tokens and up to 9 new ones do not fit"):
        asked(made, completion("a", [7, 8], max_tokens=9))
