"""Flags that several verbs share, and the one way in which a verb opens a model."""

import copy
import dataclasses
import difflib
import functools
import hashlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast, overload

import typer

from pallas_kernels.geometry import ChunkGeometry
from qwen_jax.cli import placement
from qwen_jax.cli.quantities import tokens_option
from qwen_jax.config import ConfigError, GenerationConfig, ModelConfig, SparseConfig
from qwen_jax.distributed import multihost, verbosity
from qwen_jax.distributed.verbosity import Level
from qwen_jax.engine.request import LIMITS, RequestError, Sampling
from qwen_jax.files import compile_cache, reading
from qwen_jax.hf_config import generation_config, model_config, notes, sparse_config
from qwen_jax.storage import hub
from qwen_jax.text.tokenizer import Tokenizer, TokenizerError, check_stop

ModelArgument = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="A converted checkpoint or a Hugging Face directory.",
        show_default=False,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print JSON on stdout.", rich_help_panel="Output")
]
MAY_BE_EMPTY = "may be empty"
"""Beside a flag in `Annotated`: its text may be; that of all others may not."""


@dataclasses.dataclass(frozen=True, slots=True)
class Within:
    """Range of a number, beside its flag in `Annotated`; integers have at most 32 bits anyway.

    Attributes:
        least: smallest that is allowed.
        most: largest that is allowed.
        over: smallest that is not, instead of `least`.
        under: largest that is not, instead of `most`.
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


@dataclasses.dataclass(frozen=True, slots=True)
class Reads:
    """Beside a flag in `Annotated` whose text holds several numbers: what its verb reads it with.

    Attributes:
        function: raises `ConfigError`, naming the flag.
    """

    function: Callable[[str], object]


def option(text: str, *names: str, metavar: str | None = None) -> Any:
    """A flag whose default is said in its help text, if anywhere."""
    return typer.Option(*names, help=text, metavar=metavar, show_default=False)


System = Annotated[str | None, option("System text instead of the checkpoint's own."), MAY_BE_EMPTY]


def not_one_of(flag: str, word: str, known: Iterable[str]) -> str:
    """A complaint about a word that is none of those which are known, and what it may have been."""
    shown = reading.printable(word, 60)
    return f"{flag} '{shown}' is not one of {', '.join(known)}{did_you_mean(word, known)}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a complaint about an unknown word: the known one that it resembles, if any."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def check_number(flag: str, value: object, metadata: Iterable[object]) -> None:
    """Refuses a number that is not within its range.

    Args:
        value: of the flag; what is no number, or a list of them, has no range.
        metadata: what its `Annotated` has beside the type.

    Raises:
        ConfigError: naming the flag, the value and the range.
    """
    within = next((mark for mark in metadata if isinstance(mark, Within)), Within())
    for each in value if isinstance(value, list | tuple) else [value]:
        if type(each) is int and abs(each) >= 2**31 and within.most is None:
            raise ConfigError(f"{flag} {reading.printable(each, 40)} must be under {2**31:,}")
        if type(each) in (int, float) and cast(float, each) not in within:
            raise ConfigError(f"{flag} {reading.printable(each, 40)} must be {within}")


def check_numbers(flags: Any) -> None:
    """Refuses a dataclass of flags with a number that is not within its range.

    Raises:
        ConfigError: see `check_number`.
    """
    for field in dataclasses.fields(flags):
        marks = getattr(field.type, "__metadata__", ())
        check_number(_spelled(field.name), getattr(flags, field.name), marks)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelFlags:
    """Flags of every verb that runs a model; None means the checkpoint's own value."""

    section: ClassVar[str] = "Model"
    others: ClassVar[dict[str, str]] = {
        "Attention": "dca dca_chunk dca_local dca_original sparse sparse_config least_recall "
        "dense_tail vllm_parity backend",
        "Devices": "mesh",
    }

    dtype: Annotated[
        Literal["f32", "bf16"] | None,
        option("Precision of weights and cache; the checkpoint's own, on a CPU f32."),
    ] = None
    slice: Annotated[
        int | None,
        tokens_option("Prompt tokens computed at a time; more is faster and takes memory."),
        Within(1),
    ] = None
    dca: Annotated[
        Literal["auto", "on", "off"],
        typer.Option(help="Dual Chunk Attention; auto follows config.json."),
    ] = "auto"
    dca_chunk: Annotated[
        int | None,
        tokens_option("Largest relative position the model may see, in tokens."),
        Within(1),
    ] = None
    dca_local: Annotated[
        int | None,
        tokens_option("Tokens around chunk borders seen at their true distance."),
        Within(1),
    ] = None
    dca_original: Annotated[
        int | None,
        tokens_option("Training length of the attention temperature; 0 for none."),
        Within(0),
    ] = None
    sparse: Annotated[
        Literal["auto", "on", "off"],
        typer.Option(
            help="Sparse prefill by the checkpoint's budgets; auto for prompts over its threshold."
        ),
    ] = "auto"
    sparse_config: Annotated[
        Path | None,
        option("Budgets of sparse prefill instead of the checkpoint's own.", metavar="FILE"),
    ] = None
    least_recall: Annotated[
        float | None,
        option("Where a head would find less than this share of a slice's attention, it is dense."),
        Within(over=0, most=1),
    ] = None
    dense_tail: Annotated[
        int,
        tokens_option(
            "Tokens at a prompt's end that sparse prefill computes densely; vLLM has 0.", shown=True
        ),
        Within(0),
    ] = 64
    max_len: Annotated[
        int | None,
        tokens_option(
            "Longest prompt and answer together, as 128K (of 1,024) or 1M (1,048,576; "
            "Qwen2.5-1M models declare 1,010,000); what config.json declares."
        ),
        Within(1),
    ] = None
    vllm_parity: Annotated[
        bool,
        option("Scale cached keys with the attention temperature, as vLLM does.", "--vllm-parity"),
    ] = False
    backend: Annotated[
        str | None,
        option(
            "Implementation of the attention kernels; the device's preferred one.",
            "--kernels",
            "--backend",
        ),
    ] = None
    mesh: Annotated[
        str | None,
        option(
            "How to use several devices, as seq=4,tensor=2; all accelerators, or one CPU.",
            metavar="AXIS=N,...",
        ),
    ] = None
    no_compile_cache: Annotated[
        bool, option("Keep no compiled programs and use none that were kept.", "--no-compile-cache")
    ] = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFlags:
    """Flags of every verb that writes an answer; None means generation_config.json's value."""

    section: ClassVar[str] = "Answer"

    max_new_tokens: Annotated[
        int, tokens_option("Longest answer, in tokens.", shown=True), Within(1)
    ] = 512
    greedy: Annotated[bool, option("Always take the most likely token.", "--greedy")] = False
    temperature: Annotated[
        float | None,
        option("Above 1 is more varied, below 1 less, 0 is greedy."),
        Within(0, LIMITS["temperature"][1]),
    ] = None
    top_k: Annotated[
        int | None, option("Choose among this many tokens; 0 for all."), Within(*LIMITS["top_k"])
    ] = None
    top_p: Annotated[
        float | None,
        option("Choose among the likeliest tokens of this total probability."),
        Within(*LIMITS["top_p"]),
    ] = None
    min_p: Annotated[
        float | None,
        option("Choose among tokens this probable compared with the likeliest."),
        Within(*LIMITS["min_p"]),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        option("Above 1 makes tokens that were seen less likely."),
        Within(*LIMITS["repetition_penalty"]),
    ] = None
    seed: Annotated[
        int, typer.Option(help="The same seed gives the same answer."), Within(*LIMITS["seed"])
    ] = 0
    stop: Annotated[
        list[str] | None,
        option("End the answer before this text; may be given repeatedly.", metavar="TEXT"),
    ] = None

    def sampling(self, defaults: GenerationConfig) -> Sampling:
        """How tokens are chosen: these flags over the checkpoint's defaults.

        Raises:
            ConfigError: if flags contradict each other or have no effect.
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
                raise ConfigError(f"--greedy contradicts {_spelled(against[0])}: leave one out")
        temperature = self.temperature
        if temperature is None:
            temperature = 0.0 if self.greedy or not defaults.do_sample else defaults.temperature
        if temperature == 0 and chosen:
            raise ConfigError(
                f"{_spelled(next(iter(chosen)))} has no effect on greedy answers: "
                "give a --temperature above 0"
            )
        penalty = self.repetition_penalty
        found = Sampling(
            temperature=temperature,
            repetition_penalty=defaults.repetition_penalty if penalty is None else penalty,
            seed=self.seed,
            **{
                name: chosen.get(name, getattr(defaults, name))
                for name in ("top_k", "top_p", "min_p")
            },
        )
        used = [f"{name} {value}" for name, value in dataclasses.asdict(found).items()]
        note(
            f"sampling: {', '.join(used) if temperature else 'greedy'}; what "
            "neither flags nor generation_config.json say is neutral, top_k 0 takes all",
            Level.DETAIL,
        )
        return found

    def stops(self) -> tuple[str, ...]:
        """The stop strings.

        Raises:
            ConfigError: if one cannot be looked for.
        """
        for each in self.stop or ():
            try:
                check_stop(each)
            except TokenizerError as error:
                raise ConfigError(f"--stop: {error}") from None
        return tuple(self.stop or ())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A checkpoint that was looked at but not loaded.

    Attributes:
        config: the model as config.json describes it, changed by the flags.
        generation: sampling defaults that came with the weights.
        sparse: budgets of sparse prefill, if the checkpoint has any.
        max_len: longest prompt and answer together, in tokens.
    """

    directory: Path
    flags: ModelFlags
    config: ModelConfig
    generation: GenerationConfig
    sparse: SparseConfig | None
    max_len: int

    @overload
    def tokenizer(self, *, required: Literal[True] = True) -> Tokenizer: ...

    @overload
    def tokenizer(self, *, required: bool) -> Tokenizer | None: ...

    def tokenizer(self, *, required: bool = True) -> Tokenizer | None:
        """The checkpoint's tokenizer; None if it has none and none is required.

        Raises:
            TokenizerError: if its files are missing or malformed.
            ConfigError: if it has more tokens than the model.
        """
        if not required and not (self.directory / "tokenizer.json").exists():
            return None
        tokenizer = Tokenizer.load(self.directory)
        if tokenizer.size > self.config.vocab_size:
            raise ConfigError(
                f"{self.directory}: tokenizer.json has {tokenizer.size} tokens, config.json says "
                f"vocab_size={self.config.vocab_size}: they belong to different models"
            )
        return tokenizer

    def end_ids(self, tokenizer: Tokenizer | None, *, chat: bool = False) -> tuple[int, ...]:
        """Token ids that end an answer: the checkpoint's, else its tokenizer's end token.

        Args:
            chat: the end of a turn counts, whatever the files say.
        """
        ids = list(self.generation.eos_ids)
        if tokenizer is not None:
            if not ids and tokenizer.eos is not None:
                ids.append(tokenizer.eos)
            if chat and tokenizer.control("<|im_end|>") not in ids:
                ids.append(tokenizer.control("<|im_end|>"))
        return tuple(ids)

    def check_fits(self, prompt: int, new: int = 0) -> None:
        """Refuses a prompt and an answer that are longer than the model may read.

        Raises:
            RequestError: naming both numbers and the way out.
        """
        if prompt + new > self.max_len:
            answer = f" and up to {new:,} new ones" if new else ""
            declared = "--max-len says" if self.flags.max_len else "config.json declares"
            raise RequestError(
                f"{prompt:,} prompt tokens{answer} do not fit into the {self.max_len:,} that "
                f"{declared}: shorten the text{', lower --max-new-tokens' if new else ''} "
                "or raise --max-len"
            )

    def settings(self, *, dense_to: int | None = None) -> dict[str, Any]:
        """What answers depend on, beside prompts and how tokens are chosen, for JSON.

        Args:
            dense_to: longest prompt that is prefilled densely; None for the checkpoint's
                threshold.
        """
        geometry, sparse = self.config.dual_chunk, self.sparse
        budgets = None
        if sparse is not None:
            head_budgets = repr((sparse.vertical, sparse.slash)).encode()
            budgets = {
                "sha256": hashlib.sha256(head_budgets).hexdigest()[:16],
                "last_q": sparse.last_q,
                "threshold": sparse.threshold if dense_to is None else dense_to,
                "least_recall": self.flags.least_recall,
                "dense_tail": self.flags.dense_tail,
            }
        return {
            "model": str(self.directory.resolve()),
            "dtype": self.flags.dtype or "auto",
            "dca": [geometry.chunk_size, geometry.local_size] if geometry else None,
            "dca_original": self.config.original_len,
            "vllm_parity": self.flags.vllm_parity,
            "sparse": budgets,
        }

    def mesh(self):
        """The devices of this model (`placement.mesh`), before anything else is done with jax.

        Raises:
            ConfigError: if there are none, or the model cannot be split over them.
        """
        compile_cache.begin(not self.flags.no_compile_cache, shared=not multihost.is_alone())
        return placement.mesh(self.config, self.flags.mesh)

    def weights(self, *, random: bool = False):
        """The weights on their devices, for engines that share them.

        Args:
            random: make them up, in the same shapes, and read none.

        Raises:
            CheckpointError: if they are missing, damaged or do not fit.
            ConfigError: if there are no such devices, or they cannot hold the weights.
        """
        import jax.numpy as jnp

        from convert import weights
        from qwen_jax.engine.engine import EngineConfig
        from qwen_jax.models import params

        mesh = self.mesh()
        name, _ = self.precision()
        placement.check_memory(self.config, EngineConfig(max_len=1), name, mesh)
        dtype, shardings = jnp.dtype(name), params.shardings(self.config, mesh) if mesh else None
        if random:
            return params.random(self.config, dtype, shardings)
        return weights.load(self.directory, dtype=dtype, shardings=shardings)

    def engine(
        self,
        length: int,
        *,
        max_seqs: int = 1,
        vocab_limit: int | None = None,
        weights=None,
        slices: tuple[int, ...] | None = None,
        attention: bool = True,
        whole_slices: bool = False,
        prefix_tokens: int = 0,
        window: int = 0,
    ):
        """Builds an engine, or replicas on a mesh with data; says on stderr what runs where.

        Args:
            length: room for prompt and answer of one request, in tokens.
            max_seqs: requests that run at once.
            vocab_limit: ids from here on are never sampled.
            weights: what `weights` gave; None to load them.
            slices: lengths that prefill is compiled for, unless a flag says it.
            attention: False leaves it out (`EngineConfig.attention`).
            whole_slices: see `EngineConfig`.
            prefix_tokens: likewise.
            window: tokens that a session moves at a time.

        Raises:
            CheckpointError: if the weights are missing, damaged or do not fit.
            ConfigError: if the devices cannot do what the flags ask.
        """
        import jax

        from qwen_jax.cli import profile
        from qwen_jax.engine.data_parallel import build
        from qwen_jax.engine.engine import EngineConfig, kernels

        mesh = self.mesh()
        name, why = self.precision()
        settings = EngineConfig(
            max_len=length,
            max_seqs=max_seqs,
            slices=slices if self.flags.slice is None else (self.flags.slice,),
            vllm_parity=self.flags.vllm_parity,
            vocab_limit=vocab_limit,
            backend=self.flags.backend,
            sparse=self.sparse,
            least_recall=self.flags.least_recall or 0.0,
            dense_tail=self.flags.dense_tail,
            attention=attention,
            whole_slices=whole_slices,
            prefix_tokens=prefix_tokens,
        )
        placement.check_memory(self.config, settings, name, mesh, window=window)
        device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
        # Before the weights take time and memory.
        kernels(self.config, settings, device=device, dtype=name, mesh=mesh, say=note)
        engine = build(self.config, self.weights() if weights is None else weights, settings)
        note(engine.summary())
        note(f"{engine.describe()}; {name}: {why}; {self._attention()}", Level.DETAIL)
        profile.watch(engine)
        return engine

    def precision(self) -> tuple[str, str]:
        """Dtype of weights and cache on the devices of this machine, and the reason."""
        import jax

        stored, name = self.config.weights_dtype, self.config.compute_dtype
        if self.flags.dtype is not None:
            name = {"f32": "float32", "bf16": "bfloat16"}[self.flags.dtype]
            return name, f"--dtype {self.flags.dtype}"
        if jax.default_backend() == "cpu" and stored != "float32":
            return "float32", f"stored as {stored}; CPUs are faster in float32 (--dtype bf16)"
        if name != stored:
            return name, f"stored as {stored}, which is rounded (--dtype f32 keeps it)"
        return name, "as stored"

    def _attention(self) -> str:
        geometry, original = self.config.dual_chunk, self.config.original_len
        text = "plain RoPE"
        if self.config.yarn is not None:
            yarn = self.config.yarn
            text = f"YaRN factor {yarn.factor:g} over {yarn.original_len:,} tokens"
        if geometry is not None:
            temperature = f"temperature from {original}" if original else "no temperature"
            text = f"DCA chunk {geometry.chunk_size}, local {geometry.local_size}, {temperature}"
        if self.sparse is None:
            return f"{text}; dense prefill"
        tail = f", the last {self.flags.dense_tail} densely" if self.flags.dense_tail else ""
        return f"{text}; sparse prefill of prompts over {self.sparse.threshold:,} tokens{tail}"


def open_model(directory: Path, flags: ModelFlags) -> Model:
    """Reads what a checkpoint says about itself and applies the flags; loads no weights.

    Raises:
        FileNotFoundError, NotADirectoryError: if there is no such directory.
        ConfigError: if a file or a flag cannot be used, or flags contradict each other.
    """
    if not os.path.exists(directory):
        raise FileNotFoundError(2, "there is no such model; give a local directory", str(directory))
    if not os.path.isdir(directory):
        hub.checkpoint(directory)
        raise NotADirectoryError(20, "is a file; give the directory that holds it", str(directory))
    directory = hub.checkpoint(directory)
    check_numbers(flags)
    config = _with_dual_chunk(model_config(directory), flags)
    for sentence in notes(directory):
        note(sentence)
    max_len = flags.max_len or config.max_len
    if max_len > config.max_len and config.dual_chunk is None:
        note(
            f"--max-len {max_len:,} is over the {config.max_len:,} that config.json declares, "
            "without Dual Chunk Attention: expect poor answers to longer prompts"
        )
    return Model(
        directory=directory,
        flags=flags,
        config=config,
        generation=generation_config(directory),
        sparse=_sparse(directory, config, flags),
        max_len=max_len,
    )


def says(level: Level = Level.SHORT) -> bool:
    """Whether this process says notes of a level: of several processes the first does."""
    return level <= verbosity.get() and multihost.is_first()


def note(text: str, level: Level = Level.SHORT) -> None:
    """One line for the user, beside the output."""
    if says(level):
        print(reading.shown(text), file=sys.stderr, flush=True)


def adding(verb: Callable, name: str, flags: type) -> Callable[[Callable], Callable]:
    """Makes a function look like a verb that takes one more dataclass of flags."""
    own = inspect.signature(verb).parameters.values()
    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
    more = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=flags)

    def wrap(function: Callable) -> Callable:
        functools.update_wrapper(function, verb)
        setattr(function, "__signature__", inspect.Signature([*parameters, more]))  # noqa: B010
        return function

    return wrap


def expand(verb: Callable) -> Callable:
    """The verb with a flag for each field of its parameters that are dataclasses.

    Typer makes flags of parameters; this lets verbs share them without listing them.
    """
    parameters, shared, groups = [], [], {}
    for parameter in inspect.signature(verb).parameters.values():
        if not dataclasses.is_dataclass(parameter.annotation):
            parameters.append(parameter)
            continue
        groups[parameter.name] = parameter.annotation
        shared.extend(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=_in_section(field, parameter.annotation),
            )
            for field in dataclasses.fields(parameter.annotation)
        )

    @functools.wraps(verb)
    def expanded(**given):
        for name, group in groups.items():
            fields = [field.name for field in dataclasses.fields(group)]
            given[name] = group(**{field: given.pop(field) for field in fields})
        return verb(**given)

    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters + shared]
    setattr(expanded, "__signature__", inspect.Signature(parameters))  # noqa: B010
    expanded.__annotations__ = {each.name: each.annotation for each in parameters}
    return expanded


def _in_section(field: dataclasses.Field, flags: Any) -> Any:
    """The annotation of a flag, which names its section of the help.

    That is `others` of its class where it lists the flag, else `section`, if the class has one.
    """
    section = getattr(flags, "section", None)
    for other, names in getattr(flags, "others", {}).items():
        section = other if field.name in names.split() else section
    hint: Any = field.type
    base, info, *marks = hint.__origin__, *hint.__metadata__
    placed = copy.copy(info)
    placed.rich_help_panel = info.rich_help_panel or section
    return Annotated[(base, placed, *marks)]


def _with_dual_chunk(config: ModelConfig, flags: ModelFlags) -> ModelConfig:
    sizes = {
        name: getattr(flags, name)
        for name in ("dca_chunk", "dca_local", "dca_original")
        if getattr(flags, name) is not None
    }
    if flags.dca == "off":
        if sizes:
            raise ConfigError(f"--dca off contradicts {_spelled(next(iter(sizes)))}")
        return dataclasses.replace(config, dual_chunk=None, original_len=0)
    if config.dual_chunk is None:
        if flags.dca == "auto" and sizes:
            raise ConfigError(
                f"{_spelled(next(iter(sizes)))} has no effect: config.json has no Dual Chunk "
                "sizes; add --dca on"
            )
        if flags.dca == "auto":
            return config
        missing = [name for name in ("dca_chunk", "dca_local") if name not in sizes]
        if missing:
            raise ConfigError(
                f"--dca on needs {' and '.join(map(_spelled, missing))}: "
                "config.json has no Dual Chunk sizes"
            )
    given = config.dual_chunk
    chunk = sizes.get("dca_chunk", given.chunk_size if given else 0)
    local = sizes.get("dca_local", given.local_size if given else 0)
    try:
        geometry = ChunkGeometry(chunk, local)
    except ValueError:
        raise ConfigError(
            f"--dca-local {local} must be in (0, {chunk}), the size of a chunk (--dca-chunk)"
        ) from None
    original_len = sizes.get("dca_original", config.original_len)
    return dataclasses.replace(config, dual_chunk=geometry, original_len=original_len)


def _spelled(name: str) -> str:
    """A flag as it is typed."""
    return "--" + name.replace("_", "-")


def _sparse(directory: Path, config: ModelConfig, flags: ModelFlags) -> SparseConfig | None:
    if flags.sparse == "off":
        if flags.sparse_config is not None:
            raise ConfigError("--sparse off contradicts --sparse-config: leave one out")
        return None
    found = sparse_config(directory, config, flags.sparse_config)
    if flags.sparse != "on":
        return found
    if found is None:
        raise ConfigError(
            f"--sparse on: {directory} has no budgets (sparse_attention_config.json), "
            "or config.json disables them; give --sparse-config FILE"
        )
    return dataclasses.replace(found, threshold=0)
