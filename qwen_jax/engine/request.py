"""Requests, sampling settings, events, and the state of a request that runs."""

import dataclasses
import operator
from typing import Any, Literal, Protocol, runtime_checkable

Finish = Literal["stop", "length", "cancelled", "error"]
TokenIds = tuple[int, ...] | Any
"""Token ids: whatever `check_ids` accepts, stored as a tuple of Python integers."""

LIMITS: dict[str, tuple[int | float, int | float]] = {
    "temperature": (1e-5, 1e5),
    "top_k": (0, 2**31 - 1),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-4, 1e4),
    "seed": (0, 2**32 - 1),
}
"""Inclusive ranges of the fields of `Sampling`; a temperature may also be 0."""
MOST_LOGPROBS = 20
"""Maximum of `Request.logprobs`: likeliest tokens reported for each token of an answer."""


class RequestError(ValueError):
    """Error of a request that cannot be served; the text names the field and the remedy."""


class EngineError(RuntimeError):
    """Error of an engine that can serve nothing more; the text says why and how to go on."""


def check_ids(field: str, ids: Any, vocab_size: int) -> tuple[int, ...]:
    """Converts token ids to a tuple of Python integers and checks that there is at least one.

    Args:
        field: name of the field in errors.
        ids: a tuple of integers, numpy's among them, or a one-dimensional array.
        vocab_size: exclusive upper bound of the ids.

    Raises:
        RequestError: naming the field, the index and the value.
    """
    if getattr(ids, "ndim", 0) == 1:
        ids = tuple(ids.tolist())
    if not isinstance(ids, tuple):
        kind = f"{ids.ndim} dimensions" if hasattr(ids, "ndim") else type(ids).__name__
        raise RequestError(
            f"{field} must be a tuple of token ids or an array of one dimension, got {kind}"
        )
    if not ids:
        raise RequestError(f"{field} is empty: give at least one token id")
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size:
        return ids
    return tuple(_token_id(field, index, token, vocab_size) for index, token in enumerate(ids))


def _token_id(field: str, index: int, token: Any, vocab_size: int) -> int:
    try:
        number = -1 if isinstance(token, bool) else operator.index(token)
    except TypeError:
        number = -1
    if not 0 <= number < vocab_size:
        raise RequestError(
            f"{field}[{index}]={token!r} is not a token id: "
            f"ids are integers from 0 to {vocab_size - 1}"
        )
    return number


def _check_number(field: str, value, low: int | float, high: int | float, hint: str = "") -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # NaN is in no range
        raise RequestError(f"{field}={value!r} must be a number from {low} to {high}{hint}")


def _check_integer(field: str, value, low: int | float, high: int | float, hint: str = "") -> None:
    if type(value) is not int or not low <= value <= high:
        raise RequestError(f"{field}={value!r} must be an integer from {low} to {high}{hint}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling settings, whose fields mean what they mean in transformers.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token and
            ignores `top_k`, `top_p`, `min_p` and `seed`.
        top_k: number of most likely tokens kept; 0 keeps all.
        top_p: probability mass of the most likely tokens kept.
        min_p: least probability kept, as a share of the most likely token's.
        repetition_penalty: divides positive and multiplies negative logits of
            tokens that the prompt or the answer holds (arXiv:1909.05858).
        seed: seed of the random stream; the same seed gives the same answer
            whatever else the engine is serving.

    Raises:
        RequestError: if a value is out of range.
    """

    temperature: int | float = 0.0
    top_k: int = 0
    top_p: int | float = 1.0
    min_p: int | float = 0.0
    repetition_penalty: int | float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.temperature != 0:
            low, high = LIMITS["temperature"]
            _check_number("temperature", self.temperature, low, high, hint=", or 0 for greedy")
        for field in ("top_p", "min_p", "repetition_penalty"):
            _check_number(field, getattr(self, field), *LIMITS[field])
        for field in ("top_k", "seed"):
            _check_integer(field, getattr(self, field), *LIMITS[field])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt and what to do with it.

    Attributes:
        prompt: token ids, at least one; arrays and numpy's integers become Python's.
        max_new_tokens: maximum length of the answer in tokens; at least one.
        eos_ids: token ids that end the answer; given as `prompt` is.
        logprobs: number of likeliest tokens, from 0 to `MOST_LOGPROBS`, that events report for
            each token of the answer, beside the log-probability of that token itself; None
            reports no log-probabilities.

    Raises:
        RequestError: if a field is malformed.
    """

    prompt: TokenIds
    max_new_tokens: int
    sampling: Sampling = Sampling()
    eos_ids: TokenIds = ()
    logprobs: int | None = None

    def __post_init__(self):
        _check_integer("max_new_tokens", self.max_new_tokens, 1, 2**31 - 1)
        object.__setattr__(self, "prompt", check_ids("prompt", self.prompt, 2**31))
        if not isinstance(self.eos_ids, tuple) or self.eos_ids:
            object.__setattr__(self, "eos_ids", check_ids("eos_ids", self.eos_ids, 2**31))
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0, MOST_LOGPROBS, hint=", or None for none")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sparseness:
    """Density and recall of a prompt's sparse prefill so far.

    Attributes:
        density: computed pairs of query and key as a fraction of the causal ones.
        recall: attention mass of the computed pairs as a fraction of all; the mean
            over layers, heads and slices, measured on the last queries of each slice.
        least_recall: recall of the worst head of any slice.
        pairs: number of causal pairs that `density` is averaged over.
        tokens: number of queries that `recall` is averaged over.
    """

    density: float = 0.0
    recall: float = 0.0
    least_recall: float = 1.0
    pairs: int = 0
    tokens: int = 0

    def plus(self, start: int, length: int, density, recall) -> "Sparseness":
        """Returns the averages with one more slice included.

        Args:
            start: position of its first token.
            length: its tokens.
            density: float array with a value per layer and head; 1 if dense.
            recall: as `density`.
        """
        new = length * start + length * (length + 1) // 2
        pairs, tokens = self.pairs + new, self.tokens + length
        return Sparseness(
            density=(self.density * self.pairs + float(density.mean()) * new) / pairs,
            recall=(self.recall * self.tokens + float(recall.mean()) * length) / tokens,
            least_recall=min(self.least_recall, float(recall.min())),
            pairs=pairs,
            tokens=tokens,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one token of an answer.

    They are the log-softmax, in float32, of the model's own logits: before
    temperature, repetition penalty, filters and the limit of the vocabulary.

    Attributes:
        logprob: log-probability of the sampled token.
        top: the likeliest token ids with their log-probabilities, in descending order: as many
            as the request's `logprobs`, or as the vocabulary has.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Progress of one request in one step.

    Attributes:
        request_id: id that `add` returned.
        tokens: new token ids of the answer; never the one that ended it.
        logprobs: log-probabilities at each of `tokens`, if the request asks for them; else ().
        prefilled: prompt tokens that are in the cache, computed or shared.
        sparse: density and recall of a prompt that is prefilled sparsely; None if densely.
        finish: reason why the request has ended, or None while it goes on.
        error: for `finish == "error"`, one line that says what went wrong.
    """

    request_id: int
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prefilled: int
    sparse: Sparseness | None = None
    finish: Finish | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prefix:
    """A prefix of prompts whose keys and values were put into the cache from outside.

    Attributes:
        tokens: token ids of the prefix.
        pages: cache pages that hold it, the last one perhaps in part.
        sparse: density and recall of its sparse prefill; None if it was prefilled densely.
    """

    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    sparse: Sparseness | None

    def begins(self, prompt: tuple[int, ...]) -> bool:
        """Returns True if the prompt begins with this prefix and is longer."""
        size = len(self.tokens)
        return len(prompt) > size and prompt[:size] == self.tokens


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """A request that the engine has accepted, with its state.

    Attributes:
        sparse: density and recall of its prompt's sparse prefill so far; None if dense.
        prefix: restored prefix that its prompt begins with, whose pages it shares.
        scales: factors on queries and keys while the prompt is prefilled.
        row: its row in decode batches; -1 while it waits.
        pages: its cache pages in order, enough for the prompt and the longest answer.
        filled: tokens whose keys and values are in the cache.
        answer: token ids generated so far.
        num_shared_pages: leading pages that `prefix_key` covers.
        prefix_key: identity of those pages' content; see `page_pool.Pages.record`.
    """

    id: int
    request: Request
    sparse: Sparseness | None = None
    prefix: Prefix | None = None
    scales: tuple[float, float] = (1.0, 1.0)
    row: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    filled: int = 0
    answer: list[int] = dataclasses.field(default_factory=list)
    num_shared_pages: int = 0
    prefix_key: object = None
    cancelled: bool = False

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt)

    @property
    def origin(self) -> object:
        """First `prefix_key`: everything but the tokens that keys and values depend on."""
        return self.scales, self.sparse is not None, self.prefix

    @property
    def capacity(self) -> int:
        """Maximum length in tokens, prompt and answer together."""
        return self.prompt_len + self.request.max_new_tokens

    @property
    def prefilled(self) -> int:
        return min(self.filled, self.prompt_len)

    def span(self, start: int, stop: int) -> tuple[int, ...]:
        """Returns its token ids from `start` to `stop`, across prompt and answer."""
        tail = self.answer[max(start - self.prompt_len, 0) : max(stop - self.prompt_len, 0)]
        return self.request.prompt[start:stop] + tuple(tail)


@runtime_checkable
class Serving(Protocol):
    """Interface of an engine and of replicas for loops that must not import jax."""

    def add(self, request: Request) -> int:
        """Queues a request; returns its id."""
        ...

    def step(self) -> list[Event]:
        """Runs one step; returns its events."""
        ...

    def cancel(self, request_id: int) -> None:
        """Ends a request before the next step."""
        ...
