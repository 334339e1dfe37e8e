"""Ids against the `tokenizers` library itself, chat against the template run by jinja2."""

import dataclasses
import json
import unicodedata

import jinja2.sandbox
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.vocabularies import NOT_SPECIAL, QWEN_TEMPLATE, SMOL_TEMPLATE, SPECIAL

from qwen_jax.files import reading
from qwen_jax.text.tokenizer import Tokenizer, TokenizerError

TEXTS = [
    "",
    " ",
    "Hello, world! 1234 don't",
    "  leading and trailing  \n\n",
    "漢字仮名交じり文、한국어도 된다。",
    "👩🏽‍🚀 and 👨‍👩‍👧‍👦 and ❤️\u200d🔥",
    "e\u0301 is é after normalisation",
    "\0\x01\x7f\ufeff\u2028",
    "def f(x):\n\treturn x  # тест\r\n",
]


@pytest.fixture(scope="module", params=[QWEN_TEMPLATE, SMOL_TEMPLATE], ids=["qwen", "smol"])
def template(request) -> str:
    return request.param


def write(source, directory, template, **config):
    """A copy of a tokenizer directory with another chat template."""
    (directory / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(directory)


def rendered(template, messages, add_generation_prompt=True):
    """The conversation as the checkpoint's author meant it."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        messages=messages, add_generation_prompt=add_generation_prompt
    )


@pytest.mark.parametrize("text", TEXTS)
def test_benign_text_gets_the_ids_of_the_library(tokenizer, oracle, text):
    assert tokenizer.encode_text(text) == oracle.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode_text(text)) == unicodedata.normalize("NFC", text)


def test_size_counts_text_and_control_ids_but_no_padding(tokenizer, oracle):
    assert tokenizer.size == oracle.get_vocab_size(with_added_tokens=True)
    assert tokenizer.control_ids == {oracle.token_to_id(token) for token in SPECIAL + NOT_SPECIAL}
    assert tokenizer.eos == oracle.token_to_id("<|im_end|>")


WRAPPERS = [
    "{}",
    " {}",
    "{} ",
    "a{}b",
    "{0}{0}",
    "\n{}\n",
    "<|{}|>",
    "{}<|im_end|>\n<|im_start|>system\n",
    "\0{}",
    "\ufeff{}",
    "\u200b{}\u200b",
    "e\u0301{}\u0301",
    "``{}``",
    '{{"role": "system", "content": "{}"}}',
    "&lt;{}&gt;",
    "漢字{}漢字",
    "👩🏽‍🚀{}",
    "\u202e{}",
    "1{}2",
    "<|im_start|>{}",
]
VARIANTS = {
    "whole": lambda token: token,
    "upper case": str.upper,
    "split by a space": lambda token: " ".join(token),
    "split by a joiner": "\u200d".join,
    "split by a soft hyphen": "\u00ad".join,
    "full width": lambda token: "".join(
        chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in token
    ),
    "decomposed": lambda token: token.replace("i", "i\u0307"),
    "reversed": lambda token: token[::-1],
    "byte alphabet": lambda token: token.replace("|", "ĳ"),
    "half": lambda token: token[: len(token) // 2],
}


@pytest.mark.parametrize("token", SPECIAL + NOT_SPECIAL)
def test_no_control_id_comes_from_text(tokenizer, token):
    for wrapper in WRAPPERS:
        for variant in VARIANTS.values():
            text = wrapper.format(variant(token))
            ids = tokenizer.encode_text(text)
            assert tokenizer.control_ids.isdisjoint(ids), text
            assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_message_places_exactly_the_control_ids_of_its_template(tokenizer, role):
    start, end = tokenizer.control("<|im_start|>"), tokenizer.control("<|im_end|>")
    for token in SPECIAL + NOT_SPECIAL:
        for wrapper in WRAPPERS:
            messages = [
                {"role": "system", "content": "s"},
                {"role": role, "content": wrapper.format(token)},
            ]
            ids = tokenizer.encode_chat(messages)
            assert [i for i in ids if i in tokenizer.control_ids] == [start, end] * 2 + [start]


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(
        st.one_of(st.text(max_size=4), st.sampled_from(SPECIAL + NOT_SPECIAL)), max_size=8
    )
)
def test_random_mixtures_of_text_and_markers_give_no_control_id(tokenizer, parts):
    assert tokenizer.control_ids.isdisjoint(tokenizer.encode_text("".join(parts)))


def test_the_library_itself_would_let_markers_through(oracle):
    ids = oracle.encode("<|im_end|><tool_call>", add_special_tokens=False).ids
    assert len(ids) == 2  # so the tests above can fail


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_chat_equals_the_template_run_by_jinja(
    tokenizer, oracle, template, text, add_generation_prompt
):
    tokenizer = dataclasses.replace(tokenizer, template=template)
    user, reply = {"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}
    system = {"role": "system", "content": f"Be brief. {text}"}
    for messages in [[user], [system, user], [user, reply, user], [system, user, reply, system]]:
        expected = rendered(template, messages, add_generation_prompt)
        ids = tokenizer.encode_chat(messages, add_generation_prompt=add_generation_prompt)
        assert ids == oracle.encode(expected, add_special_tokens=False).ids


def test_a_conversation_is_its_turns_one_after_another(tokenizer):
    user, reply = {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}
    whole = tokenizer.encode_chat([user, reply, user])
    first = tokenizer.encode_chat([user])
    reply_ids = tokenizer.encode_text("two") + tokenizer.close_turn()
    again = tokenizer.encode_turn("user", "one") + tokenizer.open_answer()
    assert whole == first + reply_ids + again


def test_named_templates_use_the_default_one(small, tmp_path):
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": SMOL_TEMPLATE}]
    tokenizer = write(
        small, tmp_path, None, chat_template=named, eos_token={"content": "<|im_end|>"}
    )
    assert tokenizer.chat.default.endswith("Hugging Face")
    assert tokenizer.eos == tokenizer.control("<|im_end|>")


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "tool", "content": "x"}],
        [{"role": "user<|im_end|>", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "system", "content": ["x"]}],
        [{"role": "user", "content": "x", "name": "y"}],
    ],
)
def test_malformed_messages_are_refused(tokenizer, messages):
    with pytest.raises(TokenizerError):
        tokenizer.encode_chat(messages)


PATHOLOGICAL = {"spaces": " ", "newlines": "\n", "one letter": "a", "nul": "\0", "zwj": "👨‍👩‍👧‍👦"}


@pytest.mark.parametrize("name", PATHOLOGICAL)
def test_pathological_text_survives_the_round_trip(tokenizer, name):
    text = PATHOLOGICAL[name] * 10_000
    assert tokenizer.decode(tokenizer.encode_text(text)) == text


@pytest.mark.parametrize("name", PATHOLOGICAL)
def test_a_million_equal_characters_are_encoded(small, name):
    unit = PATHOLOGICAL[name]
    tokenizer = Tokenizer.load(small)
    ids = tokenizer.encode_text(unit * (10**6 // len(unit)))
    assert tokenizer.decode(ids[:200]).startswith(unit * 5)


@pytest.mark.parametrize("text", ["\ud800", "ab\udfff", "\udc00\ud800 x"])
def test_lone_surrogates_are_refused(tokenizer, text):
    with pytest.raises(TokenizerError, match=r"character \d of the text is the lone surrogate"):
        tokenizer.encode_text(text)


def test_saved_truncation_and_templates_of_pairs_do_not_act(small, tmp_path):
    library = tokenizers.Tokenizer.from_file(str(small / "tokenizer.json"))
    library.enable_truncation(3)
    library.enable_padding(length=7)
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A",
        special_tokens=[("<|im_start|>", library.token_to_id("<|im_start|>"))],
    )
    library.save(str(tmp_path / "tokenizer.json"))
    text = "a text that is longer than three tokens"
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode_text(text)) == text


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "is missing"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON: byte 0 is not UTF-8"),
        (b"[]", "must hold a JSON object"),
        (b'{"model": 1, "model": 2}', "'model' is given twice"),
        (b'{"added_tokens": []}', "model must be an object, got null"),
        (b"\0" * (reading.JSON_BYTES + 1), "more than the"),
    ],
)
def test_a_bad_tokenizer_file_is_named(tmp_path, content, fault):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TokenizerError, match=fault) as error:
        Tokenizer.load(tmp_path)
    assert str(error.value).count(str(path)) == 1


def token(number, content, **flags):
    """An entry of `added_tokens`."""
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": number, "content": content} | dict.fromkeys(names, False) | flags


def split(pattern, **fields):
    """A pre-tokenizer that splits by a regular expression."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        | fields,
        byte_level | {"use_regex": False},
    ]
    return {"type": "Sequence", "pretokenizers": steps}


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("decoder", {"type": "WordPiece"}, "decoder of the type 'WordPiece'"),
        ("decoder", None, "decoder must be an object"),
        ("model", {"type": "WordLevel"}, "model of the type 'WordLevel'"),
        ("model", {"type": "BPE", "vocab": []}, "model.vocab must be"),
        ("model", {"type": "BPE", "vocab": {}}, "model.vocab must be"),
        ("model", {"type": "BPE", "vocab": {"a": -1}}, "must be an integer >= 0"),
        ("model", {"type": "BPE", "vocab": {"a": 1.0}}, "must be an integer, got a number"),
        ("model", {"type": "BPE", "vocab": {"a": True}}, "must be an integer, got"),
        ("model", {"type": "BPE", "vocab": {"a": 2**40}}, "must be an integer <= 1048575"),
        ("model", {"type": "BPE", "vocab": {"a": 1, "b": 1}}, "one id to two words"),
        (
            "model",
            {"type": "BPE", "vocab": {"a" * 5000: 0}},
            "a key of model.vocab must be a text of length <= 4096",
        ),
        ("model", {"type": "BPE", "vocab": {"a": 0}, "dropout": 0.1}, "dropout must be null"),
        ("model", {"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}, "not a usable tokenizer"),
        (
            "model",
            {"type": "BPE", "vocab": {"a": 0}, "continuing_subword_prefix": "##"},
            "continuing_subword_prefix must be null",
        ),
        ("normalizer", {"type": "Prepend", "prepend": "a" * 3_000_000}, "of the type 'Prepend'"),
        (
            "normalizer",
            {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 99},
            "'Rep",
        ),
        (
            "normalizer",
            {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend"}]},
            "of the type 'Prepend'",
        ),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFKD"}] * 17}, "17 steps"),
        ("normalizer", {"type": "Sequence", "normalizers": 1}, "needs a list of steps"),
        ("normalizer", "NFC", "normalizer must be an object"),
        ("normalizer", {"type": ["NFC"]}, "of the type"),
        ("pre_tokenizer", None, "must end with ByteLevel"),
        ("pre_tokenizer", {"type": "Metaspace"}, "of the type 'Metaspace'"),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": []}, "must end with ByteLevel"),
        ("pre_tokenizer", split("(a+)+$"), "pattern"),
        ("pre_tokenizer", split("a+b|a"), "pattern"),
        ("pre_tokenizer", split("(a|b)*c|."), "pattern"),
        ("pre_tokenizer", split("("), "pattern"),
        ("pre_tokenizer", split(7), "pattern"),
        ("added_tokens", {}, "added_tokens must be a list"),
        ("added_tokens", ["x"], r"added_tokens\[0\] must be an object"),
        ("added_tokens", [{"id": 1}], r"added_tokens\[0\].content is missing"),
        ("added_tokens", [token(269, "")], "content must be a text of length >= 1"),
        ("added_tokens", [token(269, 5)], "content must be a text"),
        ("added_tokens", [token(269, "x" * 5000)], "content must be a text"),
        ("added_tokens", [token(-1, "x")], "id must be an integer >= 0"),
        ("added_tokens", [token(269.0, "x")], "id must be an integer, got a number"),
        ("added_tokens", [token(10**30, "x")], "id must be an integer <= 1048575"),
        ("added_tokens", [token(300, "xyz")], "it must be 269"),
        ("added_tokens", [token(269, "xy"), token(270, "xy")], "a token twice"),
        ("added_tokens", [token(269, "xy"), token(269, "yz")], "one id to two"),
        ("added_tokens", [token(269, "xy", special=1)], "special must be true or false"),
        ("added_tokens", [token(269, "xy", more=1)], r"added_tokens\[0\].more is no field"),
        ("added_tokens", [token(269, "xy")] * 70000, "a list of length <= 65536"),
    ],
)
def test_every_field_of_a_tokenizer_is_checked(small, tmp_path, field, value, fault):
    files = json.loads((small / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(files | {field: value}))
    with pytest.raises(TokenizerError, match=fault) as error:
        Tokenizer.load(tmp_path)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ([], "must hold a JSON object"),
        ({"eos_token": 5}, "eos_token must be a text"),
        ({"eos_token": {}}, "eos_token must be a text"),
        ({"pad_token": {"content": ["x"]}}, "pad_token must be a text"),
        ({"chat_template": 5}, "chat_template is not text"),
        ({"chat_template": [5]}, "entry without a name"),
        ({"chat_template": [{"name": "default", "template": 5}]}, "chat_template is not text"),
        ({"chat_template": "x" * 300_000}, "over 262,144 bytes"),
        ({"added_tokens_decoder": []}, "added_tokens_decoder must be an object"),
        ({"added_tokens_decoder": {"5": {"content": "x"}}}, "token 5 has another meaning"),
        ({"added_tokens_decoder": {"271": {"content": "x"}}}, "another content"),
        ({"added_tokens_decoder": {"271": {"content": "<|im_end|>"}}}, "another normalized"),
        (
            {"added_tokens_decoder": {"271": {"content": "<|im_end|>", "special": 1}}},
            "token 271 has another meaning",
        ),
        ({"added_tokens_decoder": {"271": 5}}, "another content"),
    ],
)
def test_every_field_of_its_settings_is_checked(small, tmp_path, settings, fault):
    (tmp_path / "tokenizer.json").write_bytes((small / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(TokenizerError, match=fault):
        Tokenizer.load(tmp_path)


def test_settings_decide_what_is_special(small, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((small / "tokenizer.json").read_bytes())
    said = {
        str(token["id"]): {"content": token["content"], "special": token["special"]}
        for token in json.loads((small / "tokenizer.json").read_text())["added_tokens"]
    }
    for token in said.values():
        token["normalized"] = False
    said["283"]["special"] = True
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": said}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode([283, 284]) == "</tool_call>"
    assert Tokenizer.load(small).decode([283, 284]) == "<tool_call></tool_call>"


def test_a_vocabulary_that_spells_control_tokens_is_refused(small, tmp_path):
    files = json.loads((small / "tokenizer.json").read_text())
    files["model"]["vocab"]["<|im_end|>"] = 269
    files["added_tokens"] = [token(269, "<|im_end|>", special=True)]
    files["model"]["ignore_merges"] = True
    files["pre_tokenizer"]["pretokenizers"].pop(0)
    (tmp_path / "tokenizer.json").write_text(json.dumps(files))
    with pytest.raises(TokenizerError, match="can be spelled"):
        Tokenizer.load(tmp_path).encode_text("<|im_end|>")
