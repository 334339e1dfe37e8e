"""Added tokens: ordinary words are found in text as by the library, control tokens never are."""

import json
import re
import unicodedata
from pathlib import Path

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.templates import loop

from qwen_jax.text.tokenizer import Stream, Tokenizer, TokenizerError

NONE = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
WORDS = {
    "AB-1234": {},
    "AB-12": {},
    "AB-12/7": {"normalized": True},
    "深圳湾": {},
    "深圳": {"normalized": True},
    "né": {"normalized": True},
    "ﬁ": {},
    "cat": {"single_word": True},
    " dog": {"lstrip": True},
    "cow ": {"rstrip": True},
    "[pad]": {"lstrip": True, "rstrip": True},
    "<not_a_marker>": {},
    "Qwen": {},
}
MARKERS = ["<marker>", "<|im_end|>", "<tool_call>"]
TEMPLATE = loop(before="{% if tools %}{{ '<marker> Qwen' }}{% endif %}")


@pytest.fixture(scope="module")
def directory(small, tmp_path_factory) -> Path:
    """Files with added words of all kinds, and a marker that only the template gives away."""
    path = tmp_path_factory.mktemp("added")
    files = json.loads((small / "tokenizer.json").read_text())
    number = 1 + max(token["id"] for token in files["added_tokens"])
    for content, flags in {**WORDS, "<marker>": {}}.items():
        token = {"id": number, "content": content, "special": False} | NONE | flags
        files["added_tokens"].append(token)
        number += 1
    number = files["model"]["vocab"]["é"]  # how byte-level BPE writes the byte 0xe9
    files["added_tokens"].append({"id": number, "content": "é", "special": False} | NONE)
    (path / "tokenizer.json").write_text(json.dumps(files))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory) -> Tokenizer:
    return Tokenizer.load(directory)


@pytest.fixture(scope="module")
def library(directory) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


PARTS = st.sampled_from(
    [*WORDS, " ", "  ", "\n", "a", "1", "s", "e", "\u0301", "f", "i", "-", "圳"]
)


@settings(max_examples=300, deadline=None)
@given(text=st.lists(st.one_of(PARTS, st.text(max_size=3)), max_size=9).map("".join))
def test_words_are_found_as_by_the_library(tokenizer, library, text):
    if not any(marker in unicodedata.normalize("NFC", text) for marker in tokenizer.added):
        assert tokenizer.encode_text(text) == library.encode(text, add_special_tokens=False).ids
    ids = tokenizer.encode_text(text)
    stream = Stream(tokenizer)
    assert "".join([*(stream.push([i]) for i in ids), stream.finish()]) == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.one_of(PARTS, st.sampled_from(MARKERS)), max_size=9))
def test_markers_stay_text_beside_words(tokenizer, parts):
    assert tokenizer.control_ids.isdisjoint(tokenizer.encode_text("".join(parts)))


@pytest.mark.parametrize(
    "word", sorted(WORDS.keys() - {"AB-12/7", "né"})
)  # parts of these come first
def test_a_word_is_one_token_and_has_its_text(tokenizer, word):
    assert tokenizer.encode_text(word) == [tokenizer.added[word]]
    assert tokenizer.piece(tokenizer.added[word]) == word.encode()


@pytest.mark.parametrize("marker", MARKERS)
def test_a_marker_is_no_word(tokenizer, library, marker):
    assert library.encode(marker).ids == [tokenizer.added[marker]]
    assert tokenizer.decode(tokenizer.encode_text(f"a{marker}b")) == f"a{marker}b"


def test_a_word_that_is_a_byte_already_stays_one(tokenizer, library):
    for text in ("é", "驗é"):
        ids = tokenizer.encode_text(text)
        assert ids == library.encode(text).ids
        assert tokenizer.decode(ids) == library.decode(ids)


def test_the_longest_word_wins(tokenizer):
    added = tokenizer.added
    assert tokenizer.encode_text("AB-12AB-1234AB-12/7") == [
        added[word] for word in ("AB-12", "AB-1234", "AB-12")
    ] + tokenizer.encode_text("/7")


def test_a_conversation_has_the_words_that_transformers_finds(directory, tokenizer):
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"})
    )
    oracle = transformers.AutoTokenizer.from_pretrained(str(directory))
    text = re.sub("<.*?>", "", " ".join(WORDS))
    messages = [{"role": "system", "content": text}, {"role": "user", "content": text}]
    expected = oracle.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode_chat(messages) == expected


NEW = "AB-1234"
NAMED = {
    "added_tokens.json": [{NEW: 291}, {"<tool_call>": 291}],
    "special_tokens_map.json": [{"additional_special_tokens": [NEW]}, {"bos_token": NEW}],
    "tokenizer_config.json": [
        {"additional_special_tokens": [NEW]},
        {"extra_special_tokens": [{"content": NEW}]},
        {"extra_special_tokens": {"part_token": NEW}},
        {"unk_token": NEW},
        {"bos_token": {"content": NEW, "special": True}},
        {"part_token": NEW},
    ],
}


def copied(small, path, **changes) -> Path:
    """A directory with the small tokenizer, and other fields in its file."""
    files = json.loads((small / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps(files | changes))
    return path


@pytest.mark.parametrize(
    ("file", "fields"), [(file, fields) for file in NAMED for fields in NAMED[file]]
)
def test_tokens_that_only_another_file_names_are_not_split(small, tmp_path, file, fields):
    copied(small, tmp_path)
    (tmp_path / file).write_text(json.dumps(fields))
    with pytest.raises(
        TokenizerError, match=f"{file}: .*(has not the id|is not among the added_tokens)"
    ):
        Tokenizer.load(tmp_path)


def test_tokens_that_other_files_name_as_they_are_change_nothing(small, tmp_path):
    copied(small, tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<tool_call>": 283}')
    (tmp_path / "special_tokens_map.json").write_text(
        '{"eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": ["<|im_start|>"]}'
    )
    assert Tokenizer.load(tmp_path).added == Tokenizer.load(small).added


def test_a_word_that_the_settings_call_special_is_a_control_token(small, tmp_path):
    token = {"id": 291, "content": NEW, "special": False, **NONE}
    added = json.loads((small / "tokenizer.json").read_text())["added_tokens"]
    copied(small, tmp_path, added_tokens=[*added, token])
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": NEW})
    )
    library = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode([291, 0]) == library.decode([291, 0], skip_special_tokens=True)
    assert 291 not in tokenizer.encode_text(NEW)


@pytest.mark.parametrize("name", ["add_prefix_space", "split_special_tokens"])
def test_settings_that_make_other_tokens_are_refused(small, tmp_path, name):
    copied(small, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({name: True}))
    with pytest.raises(TokenizerError, match=f"{name} makes other tokens"):
        Tokenizer.load(tmp_path)


def test_a_default_template_among_others_is_not_passed_over(small, tmp_path):
    copied(small, tmp_path)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "default.jinja").write_text("x")
    with pytest.raises(TokenizerError, match="is not read, though"):
        Tokenizer.load(tmp_path)
