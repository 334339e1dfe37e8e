"""Request bodies of OpenAI's completion APIs, and the errors that refuse them."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from qwen_jax.files.reading import printable
from qwen_jax.files.schema import FAULT

IGNORED = frozenset(
    "model user metadata store service_tier safety_identifier prompt_cache_key "
    "prompt_cache_retention".split()
)
"""Fields that are accepted and ignored, whatever their value."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "stream": (False,),
}

Text = Annotated[str, Meta(min_length=1)]
Ids = Annotated[list[int], Meta(min_length=1)]
Count = Annotated[int, Meta(ge=1, lt=1 << 31)]


class APIError(ValueError):
    """Error of a refused request, in OpenAI's terms.

    Attributes:
        code: error code, one word.
        param: field at fault; None if it is not one field.
        status: HTTP status.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "invalid_request",
        param: str | None = None,
        status: int = 400,
    ):
        super().__init__(message)
        self.code, self.param, self.status = code, param, status


class TextPart(Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(Struct, frozen=True, forbid_unknown_fields=True):
    """A turn of a conversation."""

    role: str
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class Body(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields of both kinds of request; None for a field that was left out."""

    max_tokens: Count | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool = False

    neutral = _NEUTRAL
    """Fields that are accepted with these neutral values only."""


class ChatCompletionRequest(Body, frozen=True, kw_only=True):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Count | None = None

    neutral = _NEUTRAL | {
        "top_logprobs": (0,),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
    }


class CompletionRequest(Body, frozen=True, kw_only=True):
    """Body of /v1/completions."""

    prompt: Text | Annotated[list[int | Text | Ids], Meta(min_length=1)]

    neutral = _NEUTRAL | {"best_of": (1,), "echo": (False,), "suffix": ("",)}


Kind = TypeVar("Kind", bound=Body)


def read(kind: type[Kind], body: Mapping[str, Any]) -> Kind:
    """Checks the body of a request.

    Null is the same as leaving a field out.

    Args:
        body: parsed JSON (`files.reading.parse_json`).

    Raises:
        APIError: if it cannot be honoured to the letter, naming the first field at fault.
    """
    fields = {}
    for name, value in body.items():
        neutral = kind.neutral.get(name, ())
        if value is None or name in IGNORED or any(_same(value, each) for each in neutral):
            continue
        if name not in kind.__struct_fields__:
            instead = f" or give {' or '.join(map(said, neutral))}" if neutral else ""
            name = printable(name)
            raise APIError(
                f"{name}={said(value)} is not supported: leave it out{instead}",
                code="unsupported_field",
                param=name,
            )
        fields[name] = value
    if isinstance(messages := fields.get("messages"), list):
        fields["messages"] = [_without_nothing(each) for each in messages]
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from None


def said(value: Any) -> str:
    """Formats a value for an error, cut if it is long."""
    return printable(repr(value), 41)


def _without_nothing(message: Any) -> Any:
    """Removes fields of a message that are null, or [] beside its content."""
    if not isinstance(message, dict):
        return message
    empty = {"content": (None,)}
    return {k: each for k, each in message.items() if each not in empty.get(k, (None, []))}


def _refusal(text: str) -> APIError:
    """Builds the error for a validation error of msgspec."""
    found = FAULT.fullmatch(text)
    assert found is not None
    what, name, fault, path = found.groups()
    param = printable(".".join(filter(None, (path, name))))
    if what == "contains unknown":
        message = f"{param} is not supported: leave it out"
        return APIError(message, code="unsupported_field", param=param)
    fault = "it is missing" if what else printable(f"{fault[0].lower()}{fault[1:]}")
    hint = "; parts are {'type': 'text', 'text': ...}: this model reads text"
    return APIError(f"{param}: {fault}{hint if '.content[' in param else ''}", param=param)


def _same(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)
