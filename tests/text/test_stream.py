"""Streaming text against the whole text, decoded by the `tokenizers` library."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.vocabularies import NOT_SPECIAL, SPECIAL

from qwen_jax.text.tokenizer import Stream, TokenizerError

TEXTS = [
    "plain words",
    "漢字仮名交じり文、한국어도 된다。",
    "👩🏽‍🚀👨‍👩‍👧‍👦❤️\u200d🔥",
    "ünïcödé ́ combining",
    "\ufffd is a real character here",
]
RELAXED = settings(max_examples=150, deadline=None)


def cut(text, stop):
    """`text` before the stop string that is complete first, looked for one character at a time."""
    for end in range(len(text) + 1):
        ended = [len(s) for s in stop if text[:end].endswith(s)]
        if ended:
            return text[: end - max(ended)]
    return text


def grouped(ids, sizes):
    """`ids` in groups of the given sizes, over and over."""
    groups, at = [], 0
    while at < len(ids):
        size = sizes[len(groups) % len(sizes)]
        groups.append(ids[at : at + size])
        at += size
    return groups


def stream_all(tokenizer, ids, sizes=(1,), stop=()):
    stream = Stream(tokenizer, stop=stop)
    parts = [stream.push(group) for group in grouped(ids, sizes)] + [stream.finish()]
    for part in parts:
        part.encode("utf-8")  # a half character would be a surrogate
    return "".join(parts), parts, stream


@RELAXED
@given(data=st.data(), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_streamed_text_is_the_decoded_text_for_any_ids(tokenizer, oracle, data, sizes):
    ids = data.draw(st.lists(st.integers(0, tokenizer.size + 5), max_size=30))
    whole = oracle.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids) == whole
    assert stream_all(tokenizer, ids, sizes)[0] == whole


@RELAXED
@given(text=st.text(max_size=30), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_streamed_text_is_the_encoded_text(tokenizer, text, sizes):
    ids = tokenizer.encode_text(text)
    assert stream_all(tokenizer, ids, sizes)[0] == tokenizer.decode(ids)


@RELAXED
@given(data=st.data(), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_text_ends_before_the_first_complete_stop_string(tokenizer, data, sizes):
    text = data.draw(st.text("abc 漢👩", max_size=30))
    stop = data.draw(st.lists(st.text("abc 漢👩", min_size=1, max_size=4), max_size=3))
    streamed, _, stream = stream_all(tokenizer, tokenizer.encode_text(text), sizes, stop)
    assert streamed == cut(text, stop)
    assert stream.stopped == any(s in text for s in stop)


@pytest.mark.parametrize("text", TEXTS)
def test_each_part_holds_whole_characters_only(tokenizer, text):
    _, parts, _ = stream_all(tokenizer, tokenizer.encode_text(text))
    assert "".join(parts).count("\ufffd") == text.count("\ufffd")


def test_text_is_not_held_back_without_reason(tokenizer):
    ids = tokenizer.encode_text("The quick brown fox: 1, 2, 3.")
    stream = Stream(tokenizer, stop=["###"])
    for token in ids:
        assert stream.push([token]) == tokenizer.decode([token])


def test_a_possible_stop_string_is_held_back_and_given_up_again(tokenizer):
    stream = Stream(tokenizer, stop=["END", "ND!"])
    pushed = [stream.push(tokenizer.encode_text(part)) for part in ["xE", "N", "D"]]
    assert pushed == ["x", "", ""]
    assert stream.stopped
    assert stream.push(tokenizer.encode_text("more")) == ""
    assert stream.finish() == ""
    stream = Stream(tokenizer, stop=["END"])
    assert stream.push(tokenizer.encode_text("xEN")) == "x"
    assert stream.finish() == "EN"
    assert not stream.stopped


def test_an_unfinished_character_becomes_one_replacement_at_the_end(tokenizer):
    ids = [tokenizer.model.token_to_id(letter) for letter in "ðŁĺ"]  # three bytes of four
    stream = Stream(tokenizer)
    assert [stream.push([token]) for token in ids] == ["", "", ""]
    assert stream.finish() == "\ufffd"


def test_special_tokens_are_silent_and_other_added_tokens_are_not(tokenizer):
    for token in SPECIAL:
        assert stream_all(tokenizer, [tokenizer.control(token)])[0] == ""
    for token in NOT_SPECIAL:
        assert stream_all(tokenizer, [tokenizer.control(token)])[0] == token


@pytest.mark.parametrize("stop", ["", "a" * 4097, "a\udcff"])
def test_a_stop_string_that_cannot_be_looked_for_is_refused(tokenizer, stop):
    with pytest.raises(TokenizerError, match="stop string"):
        Stream(tokenizer, stop=["a", stop])


@pytest.mark.parametrize("sizes", [(1,), (2,), (9,)])
def test_of_two_stop_strings_the_one_complete_first_counts(tokenizer, sizes):
    ids = [tokenizer.encode_text(letter)[0] for letter in "xabcdy"]
    streamed, _, stream = stream_all(tokenizer, ids, sizes, ["abcd", "bc"])
    assert streamed == "xa"
    assert stream.stopped
