"""Long texts are encoded in pieces, to the ids of the whole."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.text import pieces, tokenizer_file
from qwen_jax.text.tokenizer import Tokenizer

ODD = "abtZß 漢字かe\u0301가ㄱ12²½\n\r\t\u2028\u00a0\u3000'.,-_<|>🚀\u200d\u0301\ufb1d\u212a\x00"
WORDS = [
    "'s",
    "'LL",
    " a",
    "a b",
    "the ",
    "\n",
    "\r\n",
    "\n\n  ",
    " \n",
    "x\ny",
    "1\n2",
    "<|im_end|>",
]
TEXTS = st.lists(st.sampled_from([*ODD, *WORDS]) | st.characters(codec="utf-8"), max_size=60)


@given(TEXTS.map("".join), st.integers(1, 9))
@settings(max_examples=500, deadline=None)
def test_ids_of_pieces_are_those_of_the_whole(tokenizer, text, least):
    parts = pieces.cut(text, least)
    assert "".join(parts) == text
    assert all(len(each) >= least for each in parts[:-1])
    whole = tokenizer.model.encode(text, add_special_tokens=False).ids
    assert [token for each in parts for token in tokenizer.model.encode(each).ids] == whole


@pytest.mark.parametrize("known", sorted(tokenizer_file.KNOWN_PATTERNS))
def test_known_patterns_are_cut_and_long_texts_get_the_ids_of_the_library(small, tmp_path, known):
    raw = json.loads((small / "tokenizer.json").read_text())
    raw["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = known
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer.load(tmp_path)
    text = "The other thing in 1234 places, isn't it?\nYes it's <|im_end|> there.\r\n" * 3000
    assert tokenizer.cuttable
    assert len(pieces.cut(text)) > 3
    assert tokenizer.encode_text(text) == tokenizer.model.encode(text).ids


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("normalizer", {"type": "NFKC"}),
        ("normalizer", {"type": "Strip", "strip_left": True, "strip_right": True}),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}),
        (
            "added_tokens",
            [
                {"id": 269, "content": "a b", "special": False, "normalized": True}
                | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            ],
        ),
    ],
    ids=["another normalizer", "spaces stripped", "another pattern", "words of several words"],
)
def test_others_are_encoded_whole(small, tmp_path, field, value):
    raw = json.loads((small / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw | {field: value}))
    tokenizer = Tokenizer.load(tmp_path)
    assert not tokenizer.cuttable
    text = "a b  a\nb " * 9000
    assert tokenizer.encode_text(text) == tokenizer.model.encode(text).ids
