"""Reader: builds engine requests from lines of a batch file."""

import dataclasses
import functools
import hashlib
from typing import Any

from qwen_jax.batch import openai_schema
from qwen_jax.batch.lines import CHAT, Line
from qwen_jax.batch.openai_schema import (
    APIError,
    Body,
    ChatCompletionRequest,
    CompletionRequest,
    Message,
    said,
)
from qwen_jax.engine.request import Request, RequestError, Sampling, check_ids
from qwen_jax.files.reading import printable
from qwen_jax.text.tokenizer import Tokenizer, TokenizerError, check_stop

_OF_SAMPLES = ("top_k", "top_p", "min_p")  # without effect on greedy answers


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """Default settings of lines that do not give their own.

    Attributes:
        max_new_tokens: maximum length of an answer in tokens.
        sampling: sampling settings, whose seed is mixed with the name of each line.
        stop: stop strings.
    """

    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ParsedLine:
    """A line with its engine request and stop strings."""

    line: Line
    request: Request
    stop: tuple[str, ...]

    @property
    def is_chat(self) -> bool:
        return self.line.url == CHAT

    @property
    def size(self) -> int:
        """Tokens of the prompt and of the longest possible answer."""
        return len(self.request.prompt) + self.request.max_new_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """Builds engine requests from lines.

    Attributes:
        vocab_size: vocabulary size of the model; ids in a prompt are below it.
        max_len: maximum length of prompt and answer together, in tokens.
        eos_ids: token ids that end a completion.
        prefix: token ids that are prepended to every prompt; () for none.
        in_turn: whether the prefix ends inside a user's turn.
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
        """Token ids that end a turn; raises TokenizerError if the model has none."""
        self.tokenizer.check_chatml()
        end = self.tokenizer.control("<|im_end|>")
        return self.eos_ids if end in self.eos_ids else (*self.eos_ids, end)

    def read(self, line: Line) -> ParsedLine:
        """Builds the request of a line.

        Raises:
            APIError: if it cannot be served exactly as asked.
            TokenizerError: if the line is a chat and the model has no chat format.
        """
        if line.error is not None:
            raise line.error
        chat = line.url == CHAT
        eos_ids = self._turn_end_ids if chat else self.eos_ids
        body = openai_schema.read(ChatCompletionRequest if chat else CompletionRequest, line.body)
        try:
            sampling, stop = self._sampling(line, body), self._stop(body)
            if isinstance(body, ChatCompletionRequest):
                new, own = _answer_limit(body), self._chat(body.messages)
            else:
                new, own = body.max_tokens, self._completion(body.prompt)
            new = new or self.defaults.max_new_tokens
            prompt = self.prefix + own
            if len(prompt) + new > self.max_len:
                raise APIError(
                    f"{len(prompt):,} prompt tokens and up to {new:,} new ones do not fit into "
                    f"the {self.max_len:,} of this model: shorten the prompt, lower max_tokens or "
                    "raise --max-len",
                    code="context_length_exceeded",
                    param="messages" if chat else "prompt",
                )
            request = Request(
                prompt=prompt,
                max_new_tokens=new,
                sampling=sampling,
                eos_ids=() if body.ignore_eos else eos_ids,
            )
        except (RequestError, TokenizerError) as error:
            raise APIError(printable(error, 500)) from None
        return ParsedLine(line=line, request=request, stop=stop)

    def _sampling(self, line: Line, body: Body) -> Sampling:
        defaults = self.defaults.sampling
        names = [field.name for field in dataclasses.fields(Sampling)]
        given = {name: value for name in names if (value := getattr(body, name)) is not None}
        if defaults.temperature == 0 and "temperature" not in given:
            for name in _OF_SAMPLES:
                if name in given and given[name] != getattr(Sampling(), name):
                    raise APIError(
                        f"{name} has no effect on greedy answers: give a temperature above 0",
                        param=name,
                    )
        return dataclasses.replace(defaults, **{"seed": _seed(defaults.seed, line)} | given)

    def _stop(self, body: Body) -> tuple[str, ...]:
        if body.stop is None:
            return self.defaults.stop
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
        for each in stop:
            check_stop(each)
        return stop

    def _chat(self, messages: list[Message]) -> tuple[int, ...]:
        if self.prefix:
            return self._after_prefix(messages)
        turns = [{"role": each.role, "content": each.text} for each in messages]
        return tuple(self.tokenizer.encode_chat(turns))

    def _after_prefix(self, messages: list[Message]) -> tuple[int, ...]:
        """Encodes messages, the first of which continues the turn in which the prefix ends."""
        if not self.in_turn:
            raise APIError(
                "messages cannot follow a KV session of raw text: use /v1/completions, or prefill "
                "with --file",
                param="messages",
            )
        first, *rest = messages
        if first.role != "user":
            raise APIError(
                f"messages[0].role={said(first.role)} must be 'user': the KV session has its "
                "system text already, and ends where a question goes",
                param="messages[0].role",
            )
        ids = [*self.tokenizer.encode_text(first.text), *self.tokenizer.close_turn()]
        for message in rest:
            ids += self.tokenizer.encode_turn(message.role, message.text)
        return (*ids, *self.tokenizer.open_answer())

    def _completion(self, prompt: str | list[Any]) -> tuple[int, ...]:
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            prompt = prompt[0]
        if isinstance(prompt, str):
            encode = self.tokenizer.encode_text if self.prefix else self.tokenizer.encode_prompt
            return tuple(encode(prompt))
        if any(not isinstance(each, int) for each in prompt):
            raise APIError("prompt holds several prompts: give each a line", param="prompt")
        check_ids("prompt", tuple(prompt), self.vocab_size)
        return tuple(prompt)


def _answer_limit(body: ChatCompletionRequest) -> int | None:
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise APIError(
            "max_tokens and max_completion_tokens contradict each other: leave one out",
            param="max_tokens",
        )
    return next(iter(limits), None)


def _seed(seed: int, line: Line) -> int:
    """Derives a seed for each line, the same in every run."""
    name = f"{seed} {line.custom_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(name).digest()[:4])
