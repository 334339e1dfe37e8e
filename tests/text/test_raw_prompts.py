"""Raw prompts and names of special tokens, compared with transformers on the same files."""

import json

import pytest
import transformers

from qwen_jax.text.tokenizer import Tokenizer, TokenizerError

BOS, EOS = "<|endoftext|>", "<|im_end|>"
TEXTS = ("a b", "", " x\n", "né 深圳 12", "the end.")
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
MESSAGES = [{"role": "system", "content": "a"}, {"role": "user", "content": " b"}]


def special(content):
    return {"SpecialToken": {"id": content, "type_id": 0}}


SELF = {"Sequence": {"id": "A", "type_id": 0}}


def template(*single, ids=(269,)):
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    known = {BOS: ids, EOS: (271,)}
    tokens = {
        name: {"id": name, "ids": list(each), "tokens": [name] * len(each)}
        for name, each in known.items()
    }
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": tokens,
    }


DEEPSEEK = template(special(BOS), SELF)
POSTS = {
    "none": None,
    "bytes": BYTES,
    "bos": DEEPSEEK,
    "eos": template(SELF, special(EOS)),
    "both": template(special(BOS), SELF, special(EOS)),
    "twice": template(special(BOS), special(BOS), SELF),
    "several ids": template(special(BOS), SELF, ids=(269, 5, 6)),
    "neither": template(SELF),
    "sequence": {"type": "Sequence", "processors": [BYTES, DEEPSEEK]},
    "sequence of none": {"type": "Sequence", "processors": [BYTES]},
    "bert": {"type": "BertProcessing", "sep": [EOS, 271], "cls": [BOS, 269]},
    "roberta": {
        "type": "RobertaProcessing",
        "sep": [EOS, 271],
        "cls": [BOS, 269],
        "trim_offsets": True,
        "add_prefix_space": False,
    },
}


@pytest.fixture
def files(small, tmp_path):
    """Writes the files of a tokenizer; returns their directory."""

    def write(post=None, settings=None, **others):
        raw = json.loads((small / "tokenizer.json").read_text()) | {"post_processor": post}
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        config = json.loads((small / "tokenizer_config.json").read_text()) | (settings or {})
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
        for name, value in others.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
        return tmp_path

    return write


def check_equal(directory):
    """Checks raw prompts, conversations, names and decoding against transformers."""
    tokenizer = Tokenizer.load(directory)
    oracle = transformers.AutoTokenizer.from_pretrained(str(directory))
    for text in TEXTS:
        assert tokenizer.encode_prompt(text) == oracle(text).input_ids
        assert tokenizer.encode_text(text) == oracle(text, add_special_tokens=False).input_ids
    expected = oracle.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode_chat(MESSAGES) == expected
    assert tokenizer.eos == oracle.eos_token_id
    for token in range(269, 291):
        shown = oracle.decode([64, token], skip_special_tokens=True)
        assert tokenizer.decode([64, token]) == shown
    return tokenizer


@pytest.mark.parametrize("declared", ["LlamaTokenizerFast", "Qwen2Tokenizer", None])
@pytest.mark.parametrize("post", POSTS)
def test_a_raw_prompt_has_what_the_post_processor_adds(files, post, declared):
    tokenizer = check_equal(files(POSTS[post], declared and {"tokenizer_class": declared}))
    added = {"none": 0, "bytes": 0, "neither": 0, "sequence of none": 0}.get(post, 1)
    assert bool(tokenizer.before or tokenizer.after) == bool(added)


@pytest.mark.parametrize("post", ["none", "bos"])
@pytest.mark.parametrize("name", ["add_bos_token", "add_eos_token"])
@pytest.mark.parametrize("value", [True, False])
def test_switches_of_slow_tokenizers_say_nothing_beside_a_tokenizer_json(files, post, name, value):
    check_equal(files(POSTS[post], {name: value, "bos_token": BOS}))


@pytest.mark.parametrize(
    ("post", "fault"),
    [
        (template(SELF, SELF), "post_processor does not keep the text once"),
        (template(special(BOS)), "post_processor does not keep the text once"),
        (template(*[special(BOS)] * 17, SELF), "post_processor adds 17 tokens"),
        (template(special(BOS), SELF, ids=(291,)), "post_processor adds 1 tokens up to 291"),
        (template({"SpecialToken": {"id": "x", "type_id": 0}}, SELF), "not a usable tokenizer"),
        ({"type": "Other"}, "not a usable tokenizer"),
        ([], "not a usable tokenizer"),
    ],
)
def test_a_post_processor_that_does_something_else_is_refused(files, post, fault):
    with pytest.raises(TokenizerError, match=rf"tokenizer.json.*{fault}"):
        Tokenizer.load(files(post))


TOOL = "<tool_call>"
ALL = {"extra_special_tokens": [BOS, TOOL]}


@pytest.mark.parametrize(
    ("settings", "older"),
    [
        ({}, {"eos_token": BOS}),
        ({}, {"eos_token": {"content": TOOL, "lstrip": True}}),
        ({}, {"additional_special_tokens": [TOOL]}),
        ({}, {"eos_token": None}),
        ({"eos_token": TOOL}, {}),
        ({"eos_token": TOOL}, {"eos_token": EOS}),
        ({"image_token": TOOL}, {}),
        ({"additional_special_tokens": [TOOL, BOS]}, {}),
        (ALL, {}),
    ],
)
def test_special_tokens_are_named_as_in_transformers(files, settings, older):
    more = {} if not older else {"special_tokens_map": older}
    check_equal(files(None, settings, **more))


def decoder(directory):
    tokens = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    return {str(each["id"]): {k: v for k, v in each.items() if k != "id"} for each in tokens}


def test_older_files_are_not_read_beside_settings_that_list_the_tokens(files, small):
    older = {"special_tokens_map": {"eos_token": "<no>"}, "added_tokens": {"<no>": 400}}
    check_equal(files(None, {"added_tokens_decoder": decoder(small)}, **older))


@pytest.mark.parametrize(
    ("settings", "others", "fault"),
    [
        ({"bos_token": "<no>"}, {}, "tokenizer_config.json: bos_token names '<no>'"),
        ({"eos_token": "th"}, {}, "tokenizer_config.json: eos_token names 'th'"),
        ({"image_token": "<no>"}, {}, "tokenizer_config.json: image_token names '<no>'"),
        (
            {"extra_special_tokens": ["<no>"]},
            {},
            "tokenizer_config.json: extra_special_tokens names '<no>'",
        ),
        (
            {"extra_special_tokens": {"x_token": "<no>"}},
            {},
            "tokenizer_config.json: extra_special_tokens names '<no>'",
        ),
        (
            {},
            {"special_tokens_map": {"additional_special_tokens": [{"content": "<no>"}]}},
            "special_tokens_map.json: additional_special_tokens names '<no>'",
        ),
        ({}, {"added_tokens": {"<no>": 400}}, "added_tokens.json: '<no>' has not the id 400"),
        ({}, {"added_tokens": {TOOL: 5}}, "added_tokens.json: '<tool_call>' has not the id 5"),
        ({"added_tokens_decoder": {}}, {}, "added_tokens_decoder lacks token 269"),
    ],
)
def test_words_that_only_one_file_names_are_refused(files, settings, others, fault):
    with pytest.raises(TokenizerError, match=fault):
        Tokenizer.load(files(None, settings, **others))
