"""Compare a chat template with ChatML on probe conversations.

`limited` runs this file in a child. Beside the standard library it knows jinja2 only, so that it
starts fast and has nothing to lose: templates are programs, and checkpoints are downloaded.
"""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any

ROLES = ("system", "user", "assistant")
"""Roles that a message may have: they reach the prompt, so the set is closed."""

GIVEN, EMPTY, NONE = "given", "empty", "none"
"""Kinds of conversations: with a system text of their own, with an empty one, without one."""

_TEXTS = (
    "",
    " ",
    "\n",
    "\n\n",
    " \t leading and trailing \r\n\n ",
    "one\n\n\ntwo  three\n  four",
    "UPPER lower Title hYBRID",
    "".join(map(chr, range(32, 127))),
    "<b class=\"a\">&amp; 'quoted'</b> \\n \\\\ {{ braces }} {% raw %} {# comment #}",
    "<think>\nwhy\n</think>\n\nanswer",
    "\0\x01\x0b\x7f\x85\xa0\ufeff\u2028\u3000",
    "e\u0301 \u00e9 \u1e9e \ufb01 \ufdfa \u0130 漢字かな 한국어 عربى 👩🏽‍🚀",
    '[{"type": "text", "text": "a"}]',
    "https://example.org/?a=b&c=d me@example.org",
    "1234567890 3.14 -5 1e9 true none",
    "abc " * 20_000,
)
_SHAPES = (
    (0, 1, 2, 1),
    (1, 2, 1),
    (0, 1, 1),
    (1, 0, 2),
    (0,),
    (1,),
    (2,),
)  # roles by number: where a text of the probes is put
_LITERALS, _LITERAL_CHARS = 300, 4000
_LONGEST_TALK, _LONGEST_TEXT = 600, 200_000
_LONGEST_DEFAULT = 65_536  # characters of a template's own system text

Messages = Sequence[dict[str, str]]


def kind(messages: Messages) -> str:
    """The kind of a conversation, by its first message."""
    if messages[0]["role"] != "system":
        return NONE
    return GIVEN if messages[0]["content"] else EMPTY


def chatml(messages: Messages, default: str | None, add_generation_prompt: bool) -> str:
    """A conversation in ChatML, after the system text `default` unless it begins with its own."""
    turns = [(message["role"], message["content"]) for message in messages]
    if default is not None and kind(messages) == NONE:
        turns.insert(0, ("system", default))
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return text + "<|im_start|>assistant\n" * add_generation_prompt


def prepare() -> None:
    """Imports what Jinja imports late, while files can be opened."""
    answer("{{ (1 }}", {}, ())
    answer("{{ raise_exception('x') }}", {}, ())


def answer(template: str, variables: dict[str, str], unsaid: Iterable[str]) -> dict[str, Any]:
    """What a template does with conversations of each kind.

    Args:
        variables: special tokens by the names that templates know them by.
        unsaid: names of special tokens that the checkpoint says nothing about; what depends on
            them is refused.

    Returns:
        `default`, the system text that it puts before conversations that bring none, or None; and
        `faults`, why conversations of a kind are no ChatML, by kind.
    """
    from jinja2 import meta

    try:
        environment = _environment()
        tree = environment.parse(template)
        compiled = environment.from_string(template)
    except Exception as error:
        fault = _failure("it does not compile", error)
        return {"default": None, "faults": {GIVEN: fault, EMPTY: fault, NONE: fault}}
    settings = [variables]
    dubious = sorted(meta.find_undeclared_variables(tree).intersection(unsaid))
    if dubious:
        settings.append(variables | {name: f"<a {name}>" for name in dubious})

    def render(messages: Messages, add_generation_prompt: bool, names: dict[str, str]) -> str:
        return compiled.render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **names,
        )

    faults: dict[str, str] = {}
    default = None
    try:
        default = _default(render([{"role": "user", "content": "x"}], False, variables))
    except Exception as error:
        faults[NONE] = _failure("it fails", error)
    for messages in _conversations(tree):
        if len(faults) == 3:
            break
        for add_generation_prompt, names in product((False, True), settings):
            which = kind(messages)
            if which in faults:
                break
            try:
                found = render(messages, add_generation_prompt, names)
            except Exception as error:
                faults[which] = _failure("it fails", error)
                continue
            expected = chatml(messages, default, add_generation_prompt)
            if found != expected:
                faults[which] = _difference(found, expected)
                if names is not variables:
                    faults[which] = (
                        f"it uses {', '.join(dubious)}, which tokenizer_config.json does not say"
                    )
    return {"default": default, "faults": faults}


def _default(rendered: str) -> str | None:
    """The system text before the one turn that was asked for."""
    before = rendered.removesuffix("<|im_start|>user\nx<|im_end|>\n")
    text = before.removeprefix("<|im_start|>system\n").removesuffix("<|im_end|>\n")
    if before != f"<|im_start|>system\n{text}<|im_end|>\n":
        return None
    if len(text) > _LONGEST_DEFAULT:
        raise ValueError(f"a system text of {len(text):,} characters")
    return text


def _failure(what: str, error: Exception) -> str:
    return f"{what}: {str(error)[:200] or type(error).__name__}"


def _difference(found: str, expected: str) -> str:
    if not found:
        return "it writes nothing"
    at = next(
        (i for i, pair in enumerate(zip(found, expected, strict=False)) if len(set(pair)) > 1),
        min(len(found), len(expected)),
    )
    begin = max(0, at - 20)
    return f"it writes {found[begin : at + 30]!r} where ChatML has {expected[begin : at + 30]!r}"


def _conversations(tree: Any) -> Iterator[Messages]:
    """All orders of roles, then every text in every role; the template's own constants too.

    What a template compares texts, lengths and numbers of turns with stands in it as a constant,
    so that its constants lead to the branches that other texts do not reach.
    """
    from jinja2 import nodes

    texts, numbers = list(_TEXTS), {1, 32}
    for node in tree.find_all((nodes.Const, nodes.TemplateData)):
        value = node.value if isinstance(node, nodes.Const) else node.data
        if isinstance(value, str) and len(texts) < _LITERALS and len(value) <= _LITERAL_CHARS:
            texts += [value, f"a{value}b"]
        elif type(value) is int:
            numbers |= {abs(value) - 1, abs(value), abs(value) + 1}
    for length in range(1, 5):
        for roles in product(ROLES, repeat=length):
            yield _talk(roles, [f"text {index}" for index in range(length)])
    for text in dict.fromkeys(texts):
        for shape in _SHAPES:
            roles = [ROLES[number] for number in shape]
            yield _talk(roles, [text] * len(roles))
        for at in range(3):
            yield _talk(ROLES, ["x"] * at + [text] + ["x"] * (2 - at))
    for number in sorted(numbers)[:100]:
        if 0 < number <= _LONGEST_TALK:
            roles = (["user", "assistant"] * number)[:number]
            yield _talk(roles, ["x"] * number)
            yield _talk(["system", *roles], ["x"] * (number + 1))
        if 0 < number <= _LONGEST_TEXT:
            yield _talk(ROLES, ["a" * number] * 3)
            yield _talk(ROLES[1:], ["a" * number] * 2)
    chance = random.Random(0)
    for _ in range(50):
        roles = chance.choices(ROLES, k=chance.randint(5, 24))
        yield _talk(roles, [chance.choice(texts[: len(_TEXTS) - 1]) for _ in roles])


def _talk(roles: Sequence[str], contents: Sequence[str]) -> Messages:
    return [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=True)
    ]


def _environment():
    """Jinja as transformers sets it up, without what gives another text each time."""
    from jinja2 import TemplateError, ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """The tag that marks what the assistant said; it adds no text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = nodes.CallBlock(self.call_method("_said"), [], [], body)
            return call.set_lineno(line)

        def _said(self, caller):
            return caller()

    def fail(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def changing(*_, **__):
        raise TemplateError("its text changes with time or by chance")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters |= {"tojson": tojson, "random": changing}
    environment.globals |= {
        "raise_exception": fail,
        "strftime_now": changing,
        "lipsum": changing,
    }
    return environment
