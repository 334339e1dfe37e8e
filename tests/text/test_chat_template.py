"""Ids of conversations against transformers, run on the same files; refusals where they differ."""

import json
import os
import subprocess
import sys

import pytest
from support.templates import ACCEPTED, EMPTY_REFUSED, ENDLESS, NEEDS_SYSTEM, REFUSED
from support.vocabularies import QWEN_TEMPLATE, SMOL_TEMPLATE

from qwen_jax.files import limited
from qwen_jax.text import chat_template
from qwen_jax.text.tokenizer import Tokenizer, TokenizerError

SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "bos_token": None,
    "turn_token": "<|im_start|>",
}
SYSTEM, EMPTY = ({"role": "system", "content": text} for text in ("Be\nbrief. ", ""))
USER, REPLY = {"role": "user", "content": " one\n"}, {"role": "assistant", "content": "e\u0301"}
TALKS = [[USER], [USER, REPLY, USER], [USER, SYSTEM, REPLY]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    chat_template.examined.cache_clear()


@pytest.fixture
def load(small, tmp_path):
    """A tokenizer with another chat template."""

    def make(template, **settings) -> Tokenizer:
        (tmp_path / "tokenizer.json").write_bytes((small / "tokenizer.json").read_bytes())
        (tmp_path / "chat_template.jinja").write_text(template)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(SETTINGS | settings))
        return Tokenizer.load(tmp_path)

    return make


def check(tokenizer, messages):
    """Compares ids with those of transformers."""
    import transformers

    library = transformers.AutoTokenizer.from_pretrained(str(tokenizer.directory))
    for add_generation_prompt in (False, True):
        expected = library.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, return_dict=False
        )
        ids = tokenizer.encode_chat(messages, add_generation_prompt=add_generation_prompt)
        assert ids == expected


ALL_KINDS = ACCEPTED | {"Qwen2.5": QWEN_TEMPLATE, "SmolLM2": SMOL_TEMPLATE}


@pytest.mark.parametrize("name", ALL_KINDS)
def test_ids_are_those_of_transformers(load, name):
    tokenizer = load(ALL_KINDS[name])
    for talk in TALKS:
        check(tokenizer, talk)
        check(tokenizer, [SYSTEM, *talk])
        check(tokenizer, [EMPTY, *talk])


@pytest.mark.parametrize("name", NEEDS_SYSTEM)
def test_a_default_text_that_is_not_constant_is_asked_for(load, name):
    tokenizer = load(NEEDS_SYSTEM[name])
    check(tokenizer, [SYSTEM, USER])
    with pytest.raises(TokenizerError, match="give a system text of your own"):
        tokenizer.encode_chat([USER])
    with pytest.raises(TokenizerError, match="give a system text of your own"):
        tokenizer.open_chat()


@pytest.mark.parametrize("name", EMPTY_REFUSED)
def test_an_empty_system_text_is_refused_where_it_is_left_out(load, name):
    tokenizer = load(EMPTY_REFUSED[name])
    for talk in TALKS:
        check(tokenizer, talk)
        check(tokenizer, [SYSTEM, *talk])
    with pytest.raises(TokenizerError, match="give a system text that is not empty"):
        tokenizer.encode_chat([EMPTY, USER])


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_chatml_is_refused(load, name):
    tokenizer = load(REFUSED[name])
    for messages in ([USER], [SYSTEM, USER]):
        with pytest.raises(TokenizerError, match="use `generate`") as refusal:
            tokenizer.encode_chat(messages)
        assert len(str(refusal.value)) < 700
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_has_limits(load, name, monkeypatch):
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 1)
    with pytest.raises(TokenizerError, match="use `generate`"):
        load(ENDLESS[name]).encode_chat([SYSTEM, USER])


def test_a_large_template_is_refused_unread(load):
    for size in (chat_template.TEMPLATE_BYTES + 1, 4 << 20):
        with pytest.raises(TokenizerError, match="bytes"):
            load("{% if 0 %}".ljust(size, "a"))


def test_a_template_is_run_once(load, tmp_path, monkeypatch):
    expected = load(SMOL_TEMPLATE).encode_chat([USER])
    (kept,) = (tmp_path / "cache/qwen-jax/templates").iterdir()
    chat_template.examined.cache_clear()
    monkeypatch.setattr(limited.subprocess, "run", None)
    assert load(SMOL_TEMPLATE).encode_chat([USER]) == expected
    chat_template.examined.cache_clear()
    kept.write_text('{"default": ')
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert load(SMOL_TEMPLATE).encode_chat([USER]) == expected
    assert json.loads(kept.read_text())["default"]


def test_no_cache_is_done_without(load, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    check(load(SMOL_TEMPLATE), [USER])


@pytest.mark.parametrize(
    ("flag", "taken"),
    [("lstrip", True), ("rstrip", True), ("single_word", True), ("normalized", False)],
)
def test_markers_that_take_in_text_are_refused(load, tmp_path, flag, taken):
    tokenizer = load(SMOL_TEMPLATE)
    path = tmp_path / "tokenizer.json"
    files = json.loads(path.read_text())
    for token in files["added_tokens"]:
        token[flag] |= token["content"] == "<|im_end|>"
    path.write_text(json.dumps(files))
    tokenizer = Tokenizer.load(tmp_path)
    if taken:
        with pytest.raises(TokenizerError, match="take in text"):
            tokenizer.encode_chat([SYSTEM, USER])
    else:
        check(tokenizer, [SYSTEM, USER])


def test_the_child_opens_no_file_and_needs_no_environment(load, monkeypatch):
    for name in list(os.environ):
        if name.startswith("PYTHON") or name == "HOME":
            monkeypatch.delenv(name)
    check(load(QWEN_TEMPLATE), [USER])


def test_the_child_knows_jinja_alone():
    code = "import qwen_jax.text.template_probe, sys; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
