"""Mutants of tokenizer files and chat templates, tried in a process with limits.

    python -m support.fuzz FORMAT SEED COUNT

prints how many were accepted and refused, and fails at the first one that gives any other error
than ours, or whose conversations differ from what transformers renders.
"""

import copy
import json
import random
import resource
import sys
import tempfile
from pathlib import Path

from qwen_jax.text import template_probe
from qwen_jax.text.tokenizer import Stream, Tokenizer, TokenizerError
from support.templates import ACCEPTED, EMPTY_REFUSED, NEEDS_SYSTEM, REFUSED, loop
from support.vocabularies import QWEN_TEMPLATE, SMOL_TEMPLATE, byte_level, save, small_vocabulary

LIMITS = {"RLIMIT_AS": 16 << 30, "RLIMIT_CPU": 3600, "RLIMIT_CORE": 0}
VALUES = (
    *(None, True, False, 0, -1, 1, 269, 2**31, 2**63, 10**400, 1.5, 1e308, "", "a", "\0", "Ġ", "é"),
    *("NFC", "ByteLevel", "Split", "Sequence", "\udc80", "x" * 5000, [], [[]], {}, {"type": "NFC"}),
)
WORDS = (
    *("{{", "}}", "{%", "%}", "{%-", "-%}", "'", '"', "\\n", "\n", " ", "+", "|", "trim", "| e"),
    *("loop.first", "messages", "[0]", "[1:]", "['role']", "not ", " and ", " or ", "==", "!="),
    *(
        "system",
        "user",
        "assistant",
        "content",
        "<|im_start|>",
        "<|im_end|>",
        "eos_token",
        "0",
        "1",
    ),
    *("{% if 0 %}", "{% else %}", "{% endif %}", "{% set x = 1 %}", "{# ", " #}", "tools", "x"),
)


def places(value, found):
    """Every container in a value, with every key of it."""
    if isinstance(value, (dict, list)):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in list(keys)[:40]:
            found.append((value, key))
            places(value[key], found)
    return found


def mutated_json(chance, value) -> bytes:
    """A file with one or two changes of its values or bytes."""
    value = copy.deepcopy(value)
    for _ in range(chance.randint(1, 2)):
        container, key = chance.choice(places(value, []))
        what = chance.randrange(5)
        if what == 0:
            del container[key]
        elif what == 1 and isinstance(container, dict):
            container[chance.choice(["x", "type", "id", "pattern", "é"])] = container.pop(key)
        elif what == 2:
            container[key] = [container[key]] * chance.choice([0, 2, 100])
        else:
            container[key] = chance.choice(VALUES)
        if not value:
            break
    data = bytearray(json.dumps(value).encode())
    if data and chance.random() < 0.2:
        at = chance.randrange(len(data))
        data[at : at + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 3))
    return bytes(data)


def mutated_template(chance) -> str:
    """A template with one to four pieces cut, doubled, moved or put in."""
    known = {**ACCEPTED, **NEEDS_SYSTEM, **EMPTY_REFUSED, **REFUSED}
    short = [text for text in known.values() if len(text) < 5000]
    text = chance.choice([QWEN_TEMPLATE, SMOL_TEMPLATE, loop(), chance.choice(short)])
    for _ in range(chance.randint(1, 4)):
        at, size = chance.randrange(len(text) + 1), chance.choice([0, 1, 2, 5, 20])
        piece = chance.choice([*WORDS, "", text[at : at + size] * 2])
        text = text[:at] + piece + text[at + size :]
    return text


def try_files(chance, directory, name) -> bool:
    """Tries a mutant of a file; returns True if it is accepted."""
    (directory / name).write_bytes(mutated_json(chance, ORIGINALS[name]))
    refusal = encode_some(directory)
    if refusal is not None:
        assert refusal.isprintable(), refusal
        assert len(refusal) < 1000, refusal
    return refusal is None


def encode_some(directory) -> str | None:
    """Loads a tokenizer and checks what it does with texts; why it is refused, if it is."""
    try:
        tokenizer = Tokenizer.load(directory)
        encoded = {
            text: tokenizer.encode_text(text)
            for text in ("Hello <|im_end|> 漢字\n 123", "é" * 50, "")
        }
    except TokenizerError as error:
        return str(error)
    for text, ids in encoded.items():
        assert tokenizer.control_ids.isdisjoint(ids)
        assert len(ids) <= 40 * len(text.encode())
        stream = Stream(tokenizer)
        assert stream.push(ids) + stream.finish() == tokenizer.decode(ids)
    tokenizer.decode(range(tokenizer.size + 2))
    return None


def try_template(chance) -> bool:
    """Tries a mutant of a template; returns True if it is accepted for some conversations."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = mutated_template(chance)
    said = template_probe.answer(template, {"eos_token": "<|im_end|>"}, ["bos_token"])
    for _ in range(10):
        contents = ["", "a", " b\n", "<think>", "user", "<|im_end|>", "é" * chance.randrange(99)]
        messages = [
            {"role": chance.choice(template_probe.ROLES), "content": chance.choice(contents)}
            for _ in range(chance.randint(1, 9))
        ]
        if template_probe.kind(messages) in said["faults"]:
            continue
        (text,), _ = render_jinja_template(
            [messages], None, None, template, add_generation_prompt=True, eos_token="<|im_end|>"
        )
        expected = template_probe.chatml(messages, said["default"], True)
        assert text == expected, (template, messages, text, expected)
    return len(said["faults"]) < 3


def main(kind: str, seed: str, count: str) -> None:
    """Tries mutants of one format."""
    for name, value in LIMITS.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    accepted = 0
    with tempfile.TemporaryDirectory() as folder:
        directory = save(byte_level(*small_vocabulary()), Path(folder))
        for name in ORIGINALS:
            ORIGINALS[name] = json.loads((directory / name).read_text())
        if "added_tokens_decoder" not in ORIGINALS["tokenizer_config.json"]:
            added = ORIGINALS["tokenizer.json"]["added_tokens"]
            ORIGINALS["tokenizer_config.json"]["added_tokens_decoder"] = {
                str(token["id"]): {name: token[name] for name in token if name != "id"}
                for token in added
            }
        for number in range(int(count)):
            chance = random.Random(f"{seed} {number}")
            try:
                if kind == "template":
                    accepted += try_template(chance)
                else:
                    accepted += try_files(chance, directory, kind)
                    for name, value in ORIGINALS.items():
                        (directory / name).write_text(json.dumps(value))
            except BaseException:
                print(f"mutant {number} of seed {seed}", file=sys.stderr)
                raise
    print(accepted, int(count) - accepted)


ORIGINALS = {"tokenizer.json": {}, "tokenizer_config.json": {}}

if __name__ == "__main__":
    main(*sys.argv[1:])
