"""The bodies of OpenAI's requests, as requests to the engine."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from qwen_jax.batch.lines import CHAT, Line, LineError, said
from qwen_jax.engine.request import Request, RequestError, Sampling, check_ids
from qwen_jax.files.reading import printable
from qwen_jax.text.tokenizer import Tokenizer, TokenizerError, check_stop

IGNORED = frozenset(
    "model user metadata store service_tier safety_identifier prompt_cache_key "
    "prompt_cache_retention".split()
)
"""Fields without effect, whatever they say."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "stream": (False,),
}
"""Fields that are taken with these values, which change nothing; others are refused."""

_NEUTRAL_CHAT = {
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
}
_NEUTRAL_COMPLETIONS = {"best_of": (1,), "echo": (False,), "suffix": ("",)}
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
_OF_SAMPLES = ("top_k", "top_p", "min_p")  # without effect on greedy answers


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What a line gets that does not say.

    Attributes:
        max_new_tokens: longest answer, in tokens.
        sampling: its seed is mixed with the name of each line.
        stop: texts that end an answer.
    """

    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ParsedLine:
    """A line as a request to the engine."""

    line: Line
    request: Request
    stop: tuple[str, ...]

    @property
    def is_chat(self) -> bool:
        return self.line.url == CHAT

    @property
    def size(self) -> int:
        """Tokens of the prompt and of the longest answer."""
        return len(self.request.prompt) + self.request.max_new_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """Makes requests of lines.

    Attributes:
        vocab_size: of the model: ids in a prompt are below it.
        max_len: longest prompt and answer together, in tokens.
        eos_ids: token ids that end a completion.
        prefix: tokens that every prompt goes on after; empty for none.
        in_turn: whether they end inside the turn of a user.
    """

    tokenizer: Tokenizer
    defaults: Defaults
    vocab_size: int
    max_len: int
    eos_ids: tuple[int, ...]
    prefix: tuple[int, ...] = ()
    in_turn: bool = False

    @functools.cached_property
    def _turn_end_ids(self) -> tuple[int, ...]:
        """Token ids that end a turn; refuses a tokenizer that knows none."""
        self.tokenizer.check_chatml()
        end = self.tokenizer.control("<|im_end|>")
        return self.eos_ids if end in self.eos_ids else (*self.eos_ids, end)

    def read(self, line: Line) -> ParsedLine:
        """The request of a line.

        Raises:
            LineError: if it cannot be honoured to the letter.
            TokenizerError: if the model does not chat and the line asks it to.
        """
        if line.error is not None:
            raise line.error
        eos_ids = self._turn_end_ids if line.url == CHAT else self.eos_ids
        body = _Body(line)
        try:
            new = body.answer_limit(self.defaults.max_new_tokens)
            sampling = body.sampling(self.defaults.sampling)
            stop = body.stop(self.defaults.stop)
            if body.take("ignore_eos", bool, False):
                eos_ids = ()
            own = self._chat(body) if line.url == CHAT else self._completion(body)
            prompt = self.prefix + own
            body.check_rest()
            if len(prompt) + new > self.max_len:
                raise LineError(
                    f"{len(prompt):,} prompt tokens and up to {new:,} new ones do not fit into "
                    f"the {self.max_len:,} of this model: shorten the prompt, lower max_tokens or "
                    "raise --max-len",
                    code="context_length_exceeded",
                    param="messages" if line.url == CHAT else "prompt",
                )
            request = Request(prompt=prompt, max_new_tokens=new, sampling=sampling, eos_ids=eos_ids)
        except (RequestError, TokenizerError) as error:
            raise LineError(printable(error, 500)) from None
        return ParsedLine(line=line, request=request, stop=stop)

    def _chat(self, body: "_Body") -> tuple[int, ...]:
        messages = body.take("messages", list, None)
        if not messages:
            raise LineError("messages must be a list of at least one message", param="messages")
        messages = [_message(f"messages[{index}]", each) for index, each in enumerate(messages)]
        if self.prefix:
            return self._after_prefix(messages)
        return tuple(self.tokenizer.encode_chat(messages))

    def _after_prefix(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        """Messages whose first one goes on with the turn in which the prefix ends."""
        if not self.in_turn:
            raise LineError(
                "messages cannot follow a KV session of raw text: use /v1/completions, or prefill "
                "with --file",
                param="messages",
            )
        first, *rest = messages
        if first["role"] != "user":
            raise LineError(
                f"messages[0].role={said(first['role'])} must be 'user': the KV session has its "
                "system text already, and ends where a question goes",
                param="messages[0].role",
            )
        ids = [*self.tokenizer.encode_text(first["content"]), *self.tokenizer.close_turn()]
        for message in rest:
            ids += self.tokenizer.encode_turn(message["role"], message["content"])
        return (*ids, *self.tokenizer.open_answer())

    def _completion(self, body: "_Body") -> tuple[int, ...]:
        prompt = body.take("prompt", (str, list), None)
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
            prompt = prompt[0]
        if not prompt:
            raise LineError("prompt must be a text or token ids, at least one", param="prompt")
        if isinstance(prompt, str):
            encode = self.tokenizer.encode_text if self.prefix else self.tokenizer.encode_prompt
            return tuple(encode(prompt))
        if any(isinstance(each, (str, list)) for each in prompt):
            raise LineError("prompt holds several prompts: give each a line", param="prompt")
        check_ids("prompt", tuple(prompt), self.vocab_size)
        return tuple(prompt)


class _Body:
    """The fields of a body that were not looked at yet."""

    def __init__(self, line: Line):
        self._line = line
        # Null is how clients spell what they leave out.
        self._fields = {name: value for name, value in line.body.items() if value is not None}

    def take(self, name: str, kind: type | tuple[type, ...], default: Any) -> Any:
        """A field, or the default if it was left out.

        Raises:
            LineError: if it is of another kind.
        """
        value = self._fields.pop(name, default)
        if value is not default and not isinstance(value, kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            names = {str: "a text", list: "a list", bool: "true or false"}
            raise LineError(
                f"{name}={said(value)} must be {' or '.join(names[each] for each in kinds)}",
                param=name,
            )
        return value

    def answer_limit(self, default: int) -> int:
        names = ("max_completion_tokens", "max_tokens") if self._is_chat else ("max_tokens",)
        given = {name: self._fields.pop(name) for name in names if name in self._fields}
        if len(set(map(repr, given.values()))) > 1:
            raise LineError(
                "max_tokens and max_completion_tokens contradict each other: leave one out",
                param="max_tokens",
            )
        for name, value in given.items():
            if type(value) is not int or not 1 <= value < 2**31:
                raise LineError(
                    f"{name}={said(value)} must be an integer of at least 1", param=name
                )
        return next(iter(given.values()), default)

    def sampling(self, defaults: Sampling) -> Sampling:
        given = {name: self._fields.pop(name) for name in _SAMPLING if name in self._fields}
        for name, value in given.items():
            kinds = int if name in ("top_k", "seed") else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds):
                kind = "an integer" if kinds is int else "a number"
                raise LineError(f"{name}={said(value)} must be {kind}", param=name)
        if "seed" not in given:
            given["seed"] = _seed(defaults.seed, self._line)
        if defaults.temperature == 0 and "temperature" not in given:
            for name in _OF_SAMPLES:
                if name in given and given[name] != getattr(Sampling(), name):
                    raise LineError(
                        f"{name} has no effect on greedy answers: give a temperature above 0",
                        param=name,
                    )
        return dataclasses.replace(defaults, **given)

    def stop(self, default: tuple[str, ...]) -> tuple[str, ...]:
        stop = self.take("stop", (str, list), None)
        if stop is None:
            return default
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(each, str) for each in stop):
            raise LineError("stop must hold texts", param="stop")
        for each in stop:
            check_stop(each)
        return stop

    def check_rest(self) -> None:
        """Refuses what cannot be honoured, by name."""
        neutral = {**NEUTRAL, **(_NEUTRAL_CHAT if self._is_chat else _NEUTRAL_COMPLETIONS)}
        for name, value in self._fields.items():
            if name in IGNORED or any(_same(value, each) for each in neutral.get(name, ())):
                continue
            instead = " or ".join(map(said, neutral.get(name, ())))
            name = printable(name)
            raise LineError(
                f"{name}={said(value)} is not supported: leave it out"
                f"{f' or give {instead}' if instead else ''}",
                code="unsupported_field",
                param=name,
            )

    @property
    def _is_chat(self) -> bool:
        return self._line.url == CHAT


def _message(where: str, message: Any) -> dict[str, str]:
    """Role and content of a message, if it has no more."""
    if not isinstance(message, dict):
        raise LineError(f"{where} must be an object with role and content", param=where)
    for name, value in message.items():
        if name not in ("role", "content") and value not in (None, []):
            field = f"{where}.{printable(name)}"
            raise LineError(
                f"{field} is not supported: leave it out", code="unsupported_field", param=field
            )
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise LineError(f"{where}.role must be a text, got {said(role)}", param=f"{where}.role")
    if isinstance(content, list):
        content = "".join(_parts(f"{where}.content", content))
    if not isinstance(content, str):
        raise LineError(
            f"{where}.content must be a text or a list of parts, got {said(content)}",
            param=f"{where}.content",
        )
    return {"role": role, "content": content}


def _parts(where: str, parts: list[Any]) -> Iterable[str]:
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(text, str) or part.keys() != {"type", "text"}:
            raise LineError(
                f"{where}[{index}] must be {{'type': 'text', 'text': ...}}: this model reads text",
                param=f"{where}[{index}]",
            )
        yield text


def _seed(seed: int, line: Line) -> int:
    """A seed of its own for each line, the same in every run."""
    name = f"{seed} {line.custom_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(name).digest()[:4])


def _same(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)
