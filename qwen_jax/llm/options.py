"""Options of a model and of its answers, shared by the Python API and the command line."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

from qwen_jax.config import ConfigError, GenerationConfig
from qwen_jax.distributed.verbosity import Level
from qwen_jax.engine.request import LIMITS, MOST_LOGPROBS, Sampling
from qwen_jax.files import reading
from qwen_jax.text.tokenizer import TokenizerError, check_stop

_ELSEWHERE = {"stream": ": the method `stream` yields the text of a prompt as it comes"}
_UNIONS = (types.UnionType, typing.Union)

Spell = Callable[[str], str]
"""Spells the name of an argument as its user writes it: `dense_tail` or `--dense-tail`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Within:
    """Range of a number, to annotate its type with; integers are always under 2^31.

    Attributes:
        least: inclusive lower bound.
        most: inclusive upper bound.
        over: exclusive lower bound, instead of `least`.
        under: exclusive upper bound, instead of `most`.
    """

    least: int | float | None = None
    most: int | float | None = None
    over: int | float | None = None
    under: int | float | None = None

    def __contains__(self, value: int | float) -> bool:
        return (
            math.isfinite(value)
            and (self.least is None or self.least <= value)
            and (self.most is None or value <= self.most)
            and (self.over is None or self.over < value)
            and (self.under is None or value < self.under)
        )

    def __str__(self) -> str:
        if self.least is not None and self.most is not None:
            return f"from {self.least} to {self.most}"
        ends: dict[str, int | float | None] = {
            "at least": self.least,
            "over": self.over,
            "at most": self.most,
            "under": self.under,
        }
        said = [f"{word} {end}" for word, end in ends.items() if end is not None]
        return " and ".join(said) or "a finite number"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of the Python API: silent, and spelled as keyword arguments."""

    counts: ClassVar[bool] = False
    """True to have `counted` told the tokens of files that a question comes with."""

    def spelled(self, name: str) -> str:
        """Returns the name of an option as its user writes it."""
        return name

    def counted(self, rows: Sequence[tuple[str, int]], total: int, limit: int) -> None:
        """Receives the tokens of files, of the whole prompt, and of what fits."""

    def say(self, text: str, level: Level = Level.SHORT) -> None:
        """Prints a message to the user; does nothing here."""

    def watch(self, engine: Any) -> None:
        """Receives each engine that is built, before it has a request."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions(Options):
    """Options of a model, see `LLM`; None means the checkpoint's own value."""

    dtype: Literal["f32", "bf16"] | None = None
    slice: Annotated[int | None, Within(1)] = None
    dca: Literal["auto", "on", "off"] = "auto"
    dca_chunk: Annotated[int | None, Within(1)] = None
    dca_local: Annotated[int | None, Within(1)] = None
    dca_original: Annotated[int | None, Within(0)] = None
    sparse: Literal["auto", "on", "off"] = "auto"
    sparse_config: Path | None = None
    least_recall: Annotated[float | None, Within(over=0, most=1)] = None
    dense_tail: Annotated[int, Within(0)] = 64
    max_len: Annotated[int | None, Within(1)] = None
    vllm_parity: bool = False
    kernels: str | None = None
    mesh: str | None = None
    no_compile_cache: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions(Options):
    """Options of an answer, see `LLM.generate`; None means generation_config.json's value."""

    max_new_tokens: Annotated[int, Within(1)] = 512
    greedy: bool = False
    temperature: Annotated[float | None, Within(0, LIMITS["temperature"][1])] = None
    top_k: Annotated[int | None, Within(*LIMITS["top_k"])] = None
    top_p: Annotated[float | None, Within(*LIMITS["top_p"])] = None
    min_p: Annotated[float | None, Within(*LIMITS["min_p"])] = None
    repetition_penalty: Annotated[float | None, Within(*LIMITS["repetition_penalty"])] = None
    seed: Annotated[int, Within(*LIMITS["seed"])] = 0
    stop: list[str] | None = None
    logprobs: Annotated[int | None, Within(0, MOST_LOGPROBS)] = None
    ignore_eos: bool = False

    def sampling(self, defaults: GenerationConfig) -> Sampling:
        """Returns the sampling settings: these options over the checkpoint's defaults.

        Raises:
            ConfigError: if options contradict each other or have no effect.
            RequestError: if a value is out of range.
        """
        chosen = {
            name: getattr(self, name)
            for name in ("top_k", "top_p", "min_p")
            if getattr(self, name) is not None
        }
        if self.greedy:
            against = [*chosen, *(["temperature"] if self.temperature is not None else [])]
            if against:
                raise ConfigError(
                    f"{self.spelled('greedy')} contradicts {self.spelled(against[0])}: "
                    "leave one out"
                )
        temperature = self.temperature
        if temperature is None:
            temperature = 0.0 if self.greedy or not defaults.do_sample else defaults.temperature
        if temperature == 0 and chosen:
            raise ConfigError(
                f"{self.spelled(next(iter(chosen)))} has no effect on greedy answers: "
                f"give a {self.spelled('temperature')} above 0"
            )
        penalty = self.repetition_penalty
        return Sampling(
            temperature=temperature,
            repetition_penalty=defaults.repetition_penalty if penalty is None else penalty,
            seed=self.seed,
            **{
                name: chosen.get(name, getattr(defaults, name))
                for name in ("top_k", "top_p", "min_p")
            },
        )

    def described(self, sampling: Sampling) -> str:
        """One line on how tokens are chosen."""
        used = [f"{name} {value}" for name, value in dataclasses.asdict(sampling).items()]
        return (
            f"sampling: {', '.join(used) if sampling.temperature else 'greedy'}; what "
            "neither options nor generation_config.json say is neutral, top_k 0 takes all"
        )

    def stops(self) -> tuple[str, ...]:
        """Returns the stop strings.

        Raises:
            ConfigError: if one is invalid.
        """
        for each in self.stop or ():
            try:
                check_stop(each)
            except TokenizerError as error:
                raise ConfigError(f"{self.spelled('stop')}: {error}") from None
        return tuple(self.stop or ())


def answer(arguments: Mapping[str, Any] | AnswerOptions, *own: str) -> AnswerOptions:
    """The options that keywords of a method say.

    Args:
        own: other arguments of the method, which a mistyped one may have meant.

    Raises:
        ConfigError: if a value is of another kind or out of range.
        TypeError: naming a keyword that is none, and what it may have been.
    """
    if isinstance(arguments, AnswerOptions):
        return arguments
    given, known = dict(arguments), [field.name for field in dataclasses.fields(AnswerOptions)]
    for name in given:
        if name not in known:
            meant = _ELSEWHERE.get(name) or did_you_mean(name, [*known, *own])
            raise TypeError(f"there is no argument {name!r}{meant}")
    stop = given.get("stop")
    given["stop"] = [stop] if isinstance(stop, str) else stop if stop is None else list(stop)
    made = AnswerOptions(**given)
    check(made)
    return made


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a complaint about an unknown word: the known one that it resembles, if any."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def check_number(flag: str, value: object, metadata: Iterable[object]) -> None:
    """Checks that a number, or each of a list, is within its range.

    Args:
        flag: name of the option in errors.
        value: value of the option; values of other types are accepted.
        metadata: metadata of its `Annotated` type, which may hold a `Within`.

    Raises:
        ConfigError: naming the flag, the value and the range.
    """
    within = next((mark for mark in metadata if isinstance(mark, Within)), Within())
    for each in value if isinstance(value, list | tuple) else [value]:
        if type(each) is int and abs(each) >= 2**31 and within.most is None:
            raise ConfigError(f"{flag} {reading.printable(each, 40)} must be under {2**31:,}")
        if type(each) in (int, float) and cast(float, each) not in within:
            raise ConfigError(f"{flag} {reading.printable(each, 40)} must be {within}")


def check(options: Options) -> None:
    """Checks the types and ranges of all options.

    Raises:
        ConfigError: naming the option, the value and what it may be.
    """
    for field in dataclasses.fields(options):
        name, value = options.spelled(field.name), getattr(options, field.name)
        hint, *marks = _parts(field.type)
        kinds = typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,)
        if not any(_is(value, kind) for kind in kinds):
            may = [_described(kind) for kind in kinds]
            raise ConfigError(
                f"{name}={reading.printable(repr(value), 60)} must be {' or '.join(may)}"
            )
        check_number(name, value, marks)


def _parts(hint: Any) -> tuple[Any, ...]:
    """Splits an annotation into its type and the metadata of `Annotated`."""
    return typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)


def _is(value: object, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    if typing.get_origin(kind) is list:
        return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)


def _described(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    if typing.get_origin(kind) is list:
        return "a list of texts"
    return {
        bool: "True or False",
        int: "an integer",
        float: "a number",
        str: "a text",
        Path: "a path",
    }.get(kind, "None")
