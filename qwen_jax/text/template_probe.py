"""Probe of a chat template: comparison with ChatML on many short conversations.

`files.limited` runs this file in a child. Beside the standard library it imports jinja2 only, so
that it starts fast and exposes nothing: templates are programs, and checkpoints are downloaded.
"""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any

ROLES = ("system", "user", "assistant")
"""Allowed roles of a message; a closed set, because roles reach the prompt."""

GIVEN, EMPTY, NONE = "given", "empty", "none"
"""Kinds of conversations: with a system prompt of their own, an empty one, or none."""

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
_LONGEST_TALK = 600
_LONGEST_DEFAULT = 65_536  # characters of a template's own system text

Messages = Sequence[dict[str, str]]


class LookedAt(BaseException):
    """Raised if a template inspects a text; not an `Exception`, which Jinja may catch."""


def _look(self: Any, *_: Any) -> Any:
    raise LookedAt(type(self).__name__)


class Opaque:
    """A text that supports nothing but concatenation and a test for emptiness.

    A template that renders such texts treats all texts that are not empty alike.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str):
        self._text = text

    def __add__(self, other: Any) -> "str | Opaque":
        return joined((self, other)) if isinstance(other, str | Opaque) else NotImplemented

    def __radd__(self, other: Any) -> "str | Opaque":
        return joined((other, self)) if isinstance(other, str) else NotImplemented

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str | Opaque) and other != "" and _look(self)

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            raise TypeError("a text has no fields")
        _look(self)

    def __getattr__(self, name: str) -> Any:
        if hasattr(str, name):
            _look(self)
        raise AttributeError(name)

    __hash__ = __str__ = __repr__ = __len__ = __iter__ = __contains__ = _look
    __lt__ = __le__ = __gt__ = __ge__ = __mul__ = __rmul__ = __mod__ = __rmod__ = _look
    __int__ = __float__ = __index__ = _look

    @staticmethod
    def text(value: "str | Opaque") -> str:
        """Returns the text itself."""
        return value._text if isinstance(value, Opaque) else value


def joined(parts: Iterable[Any]) -> "str | Opaque":
    """Concatenates texts; the result is opaque if one of them is."""
    parts = [part if isinstance(part, Opaque) else str(part) for part in parts]
    text = "".join(map(Opaque.text, parts))
    return Opaque(text) if any(isinstance(part, Opaque) for part in parts) else text


def kind(messages: Messages) -> str:
    """Returns the kind of a conversation, by its first message."""
    if messages[0]["role"] != "system":
        return NONE
    return GIVEN if messages[0]["content"] else EMPTY


def chatml(messages: Messages, default: str | None, add_generation_prompt: bool) -> str:
    """Renders a conversation in ChatML, with system prompt `default` unless it has its own."""
    turns = [(message["role"], message["content"]) for message in messages]
    if default is not None and kind(messages) == NONE:
        turns.insert(0, ("system", default))
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return text + "<|im_start|>assistant\n" * add_generation_prompt


def prepare() -> None:
    """Imports what Jinja would import lazily, while files can still be opened."""
    answer("{{ (1 }}", {}, ())
    answer("{{ raise_exception('x') }}", {}, ())


def answer(template: str, variables: dict[str, str], unsaid: Iterable[str]) -> dict[str, Any]:
    """Compares a template with ChatML on conversations of each kind.

    Args:
        template: Jinja template.
        variables: special tokens by their names in templates.
        unsaid: names of special tokens that the checkpoint does not define; a template that
            depends on them is refused.

    Returns:
        The fields of `chat_template.Chat`.
    """
    from jinja2 import meta

    try:
        environment = _environment()
        tree = environment.parse(template)
        compiled = environment.from_string(template)
        blind = _blind(environment).from_string(template)
    except Exception as error:
        fault = _failure("it does not compile", error)
        return {"default": None, "faults": {GIVEN: fault, EMPTY: fault, NONE: fault}}
    settings = [variables]
    default: str | None = None
    dubious = sorted(meta.find_undeclared_variables(tree).intersection(unsaid))
    if dubious:
        settings.append(variables | {name: f"<a {name}>" for name in dubious})

    def render(messages: Messages, add_generation_prompt: bool, names: dict[str, str]) -> str:
        given = {
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **names,
        }
        found = compiled.render(messages=[dict(message) for message in messages], **given)
        unseen = [
            message | {"content": Opaque(message["content"]) if message["content"] else ""}
            for message in messages
        ]
        if found == chatml(messages, default, add_generation_prompt):
            try:
                found = Opaque.text(blind.render(messages=unseen, **given))
            except LookedAt:
                raise ValueError(
                    "it looks at what messages say, beyond whether they are empty"
                ) from None
        return found

    faults: dict[str, str] = {}
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
    """Extracts the system prompt from a rendered conversation of one turn; None if it has none."""
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
    """Yields all short sequences of roles, texts in every role, and long conversations.

    The lengths depend on the template's constants, with which it may compare numbers of turns.
    """
    from jinja2 import nodes

    for length in range(1, 5):
        for roles in product(ROLES, repeat=length):
            yield _talk(roles, [f"text {index}" for index in range(length)])
    for text in _TEXTS:
        for shape in _SHAPES:
            roles = [ROLES[number] for number in shape]
            yield _talk(roles, [text] * len(roles))
        for at in range(3):
            yield _talk(ROLES, ["x"] * at + [text] + ["x"] * (2 - at))
    values = {node.value for node in tree.find_all(nodes.Const) if type(node.value) is int}
    near = {abs(value) + more for value in values for more in (-1, 0, 1)}
    lengths = [*range(5, 34), _LONGEST_TALK, *sorted(near)[:100]]
    for length in dict.fromkeys(each for each in lengths if 0 < each <= _LONGEST_TALK):
        roles = (["user", "assistant"] * length)[:length]
        yield _talk(roles, ["x"] * length)
        yield _talk(["system", *roles], ["x"] * (length + 1))
    chance = random.Random(0)
    for _ in range(50):
        roles = chance.choices(ROLES, k=chance.randint(5, 24))
        yield _talk(roles, [chance.choice(_TEXTS[:-1]) for _ in roles])


def _talk(roles: Sequence[str], contents: Sequence[str]) -> Messages:
    return [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=True)
    ]


def _blind(environment: Any) -> Any:
    """Returns the same environment, for conversations whose texts are `Opaque`."""
    from jinja2.nativetypes import NativeCodeGenerator

    class Generator(NativeCodeGenerator):
        """Code generator that emits texts without calling `str` on them."""

        def visit_Concat(self, node, frame):  # noqa: N802
            self.write("concat((")
            for each in node.nodes:
                self.visit(each, frame)
                self.write(", ")
            self.write("))")

    def test(name):
        return lambda value: isinstance(value, Opaque) or environment.tests[name](value)

    def same(name):
        usual = environment.filters[name]
        return lambda value: value if isinstance(value, Opaque) else usual(value)

    blind = environment.overlay()
    blind.code_generator_class = Generator
    blind.concat = joined
    blind.tests = environment.tests | {n: test(n) for n in ("string", "iterable", "sequence")}
    blind.filters = environment.filters | {name: same(name) for name in ("string", "safe")}
    return blind


def _environment():
    """Sets up Jinja as transformers does, without functions whose result varies."""
    from jinja2 import TemplateError, ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """The tag `generation`, which marks the assistant's text and adds none itself."""

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
