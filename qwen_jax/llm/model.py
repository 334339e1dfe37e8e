"""Model: an opened checkpoint, which loads tokenizer, weights and engine."""

import dataclasses
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, overload

from pallas_kernels.geometry import ChunkGeometry
from qwen_jax.config import ConfigError, GenerationConfig, ModelConfig, SparseConfig
from qwen_jax.distributed import multihost
from qwen_jax.distributed.verbosity import Level
from qwen_jax.engine.request import RequestError
from qwen_jax.files import compile_cache
from qwen_jax.llm import options as checks
from qwen_jax.llm import placement
from qwen_jax.llm.options import ModelOptions
from qwen_jax.models import presets
from qwen_jax.models.configs import generation_config, model_config, notes, sparse_config
from qwen_jax.storage import hub
from qwen_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A checkpoint whose configuration was read, but no weights.

    Attributes:
        directory: directory of the checkpoint.
        options: options given by the user.
        config: configuration of config.json, changed by the options.
        generation: sampling defaults of the checkpoint.
        sparse: budgets of sparse prefill; None for dense prefill.
        max_len: maximum length of prompt and answer together, in tokens.
    """

    directory: Path
    options: ModelOptions
    config: ModelConfig
    generation: GenerationConfig
    sparse: SparseConfig | None
    max_len: int

    @overload
    def tokenizer(self, *, required: Literal[True] = True) -> Tokenizer: ...

    @overload
    def tokenizer(self, *, required: bool) -> Tokenizer | None: ...

    def tokenizer(self, *, required: bool = True) -> Tokenizer | None:
        """Loads the checkpoint's tokenizer; None if it has none and none is required.

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
        """Returns the ids that end an answer: the checkpoint's, else its tokenizer's end token.

        Args:
            chat: add the token that ends a turn, whatever the files say.
        """
        ids = list(self.generation.eos_ids)
        if tokenizer is not None:
            if not ids and tokenizer.eos is not None:
                ids.append(tokenizer.eos)
            if chat and tokenizer.control("<|im_end|>") not in ids:
                ids.append(tokenizer.control("<|im_end|>"))
        return tuple(ids)

    def check_fits(self, prompt: int, new: int = 0) -> None:
        """Checks that a prompt and an answer fit into `max_len`.

        Args:
            prompt: length of the prompt in tokens.
            new: maximum length of the answer in tokens.

        Raises:
            RequestError: naming both numbers and the remedy.
        """
        if prompt + new > self.max_len:
            answer = f" and up to {new:,} new ones" if new else ""
            longest, shorter = map(self.options.spelled, ("max_len", "max_new_tokens"))
            declared = f"{longest} says" if self.options.max_len else "config.json declares"
            raise RequestError(
                f"{prompt:,} prompt tokens{answer} do not fit into the {self.max_len:,} that "
                f"{declared}: shorten the text{f', lower {shorter}' if new else ''} "
                f"or raise {longest}"
            )

    def settings(self, *, dense_to: int | None = None) -> dict[str, Any]:
        """Returns everything that answers depend on but prompts and sampling, for JSON.

        Args:
            dense_to: longest prompt, in tokens, that is prefilled densely; None for the
                checkpoint's threshold.
        """
        geometry, sparse = self.config.dual_chunk, self.sparse
        budgets = None
        if sparse is not None:
            head_budgets = repr((sparse.vertical, sparse.slash)).encode()
            budgets = {
                "sha256": hashlib.sha256(head_budgets).hexdigest()[:16],
                "last_q": sparse.last_q,
                "threshold": sparse.threshold if dense_to is None else dense_to,
                "least_recall": self.options.least_recall,
                "dense_tail": self.options.dense_tail,
            }
        return {
            "model": str(self.directory.resolve()),
            "dtype": self.options.dtype or "auto",
            "dca": [geometry.chunk_size, geometry.local_size] if geometry else None,
            "dca_original": self.config.original_len,
            "vllm_parity": self.options.vllm_parity,
            "sparse": budgets,
        }

    def mesh(self):
        """Returns the mesh of this model (`placement.mesh`); None for one device.

        Must be called before any other use of JAX; also sets up the compilation cache.

        Raises:
            ConfigError: if there are no such devices, or the model cannot be split over them.
        """
        compile_cache.begin(not self.options.no_compile_cache, shared=not multihost.is_alone())
        return placement.mesh(self.config, self.options.mesh, self.options.spelled)

    def weights(self, *, random: bool = False):
        """Loads the weights onto their devices, for engines that share them.

        Args:
            random: return random weights of the same shapes instead, without reading any.

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
        weights=None,
        window: int = 0,
        beside: Iterable[Any] = (),
        **more: Any,
    ):
        """Builds an engine, or replicas on a mesh with data; says on stderr what runs where.

        Args:
            length: room for prompt and answer of one request, in tokens.
            weights: what `weights` gave; None to load them.
            window: tokens that a session moves at a time.
            beside: engines whose caches are on the same devices.
            more: of `EngineConfig`, what no option says.

        Raises:
            CheckpointError: if the weights are missing, damaged or do not fit.
            ConfigError: if the devices cannot do what the options ask.
        """
        import jax

        from qwen_jax.engine.data_parallel import build
        from qwen_jax.engine.engine import EngineConfig, kernels

        mesh = self.mesh()
        name, why = self.precision()
        if self.options.slice is not None:
            more["slices"] = (self.options.slice,)
        settings = EngineConfig(
            max_len=length,
            vllm_parity=self.options.vllm_parity,
            backend=self.options.kernels,
            sparse=self.sparse,
            least_recall=self.options.least_recall or 0.0,
            dense_tail=self.options.dense_tail,
            **more,
        )
        placement.check_memory(
            self.config,
            settings,
            name,
            mesh,
            window=window,
            beside=sum(each.cache_bytes for each in beside),
            spell=self.options.spelled,
        )
        device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
        # Before the weights take time and memory.
        kernels(
            self.config,
            settings,
            device=device,
            dtype=name,
            mesh=mesh,
            say=self.options.say,
            name=self.options.spelled("kernels"),
        )
        engine = build(self.config, self.weights() if weights is None else weights, settings)
        self.options.say(engine.summary())
        self.options.say(f"{engine.describe()}; {name}: {why}; {self._attention()}", Level.DETAIL)
        self.options.watch(engine)
        return engine

    def precision(self) -> tuple[str, str]:
        """Returns the dtype of weights and cache on this machine's devices, and the reason."""
        import jax

        stored, name = self.config.weights_dtype, self.config.compute_dtype
        dtype = self.options.spelled("dtype")
        if self.options.dtype is not None:
            name = {"f32": "float32", "bf16": "bfloat16"}[self.options.dtype]
            return name, f"{dtype} {self.options.dtype}"
        if jax.default_backend() == "cpu" and stored != "float32":
            return "float32", f"stored as {stored}; CPUs are faster in float32 ({dtype} bf16)"
        if name != stored:
            return name, f"stored as {stored}, which is rounded ({dtype} f32 keeps it)"
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
        tail = f", the last {self.options.dense_tail} densely" if self.options.dense_tail else ""
        return f"{text}; sparse prefill of prompts over {self.sparse.threshold:,} tokens{tail}"


def open_model(directory: Path, options: ModelOptions) -> Model:
    """Reads a checkpoint's configuration files and applies the options; loads no weights.

    Raises:
        FileNotFoundError, NotADirectoryError: if there is no such directory.
        ConfigError: if a file or an option cannot be used, or options contradict each other.
    """
    directory = hub.checkpoint(directory)
    if not os.path.exists(directory):
        hub_id = presets.HUB_IDS.get(os.fspath(directory))
        way_out = f"its hub id is {hub_id}" if hub_id else "give a local directory or a hub id"
        raise FileNotFoundError(2, f"there is no such model; {way_out}", str(directory))
    if not os.path.isdir(directory):
        raise NotADirectoryError(20, "is a file; give the directory that holds it", str(directory))
    checks.check(options)
    config = _with_dual_chunk(model_config(directory), options)
    for sentence in notes(directory):
        options.say(sentence)
    max_len = options.max_len or config.max_len
    if max_len > config.max_len and config.dual_chunk is None:
        options.say(
            f"{options.spelled('max_len')} {max_len:,} is over the {config.max_len:,} that "
            "config.json declares, without Dual Chunk Attention: expect poor answers to longer "
            "prompts"
        )
    return Model(
        directory=directory,
        options=options,
        config=config,
        generation=generation_config(directory),
        sparse=_sparse(directory, config, options),
        max_len=max_len,
    )


def _with_dual_chunk(config: ModelConfig, options: ModelOptions) -> ModelConfig:
    sizes = {
        name: getattr(options, name)
        for name in ("dca_chunk", "dca_local", "dca_original")
        if getattr(options, name) is not None
    }
    if options.dca == "off":
        if sizes:
            raise ConfigError(
                f"{options.spelled('dca')} off contradicts {options.spelled(next(iter(sizes)))}"
            )
        return dataclasses.replace(config, dual_chunk=None, original_len=0)
    if config.dual_chunk is None:
        if options.dca == "auto" and sizes:
            raise ConfigError(
                f"{options.spelled(next(iter(sizes)))} has no effect: config.json has no Dual "
                f"Chunk sizes; add {options.spelled('dca')} on"
            )
        if options.dca == "auto":
            return config
        missing = [name for name in ("dca_chunk", "dca_local") if name not in sizes]
        if missing:
            raise ConfigError(
                f"{options.spelled('dca')} on needs {' and '.join(map(options.spelled, missing))}: "
                "config.json has no Dual Chunk sizes"
            )
    given = config.dual_chunk
    chunk = sizes.get("dca_chunk", given.chunk_size if given else 0)
    local = sizes.get("dca_local", given.local_size if given else 0)
    try:
        geometry = ChunkGeometry(chunk, local)
    except ValueError:
        raise ConfigError(
            f"{options.spelled('dca_local')} {local} must be in (0, {chunk}), the size of a chunk "
            f"({options.spelled('dca_chunk')})"
        ) from None
    original_len = sizes.get("dca_original", config.original_len)
    return dataclasses.replace(config, dual_chunk=geometry, original_len=original_len)


def _sparse(directory: Path, config: ModelConfig, options: ModelOptions) -> SparseConfig | None:
    if options.sparse == "off":
        if options.sparse_config is not None:
            raise ConfigError(
                f"{options.spelled('sparse')} off contradicts "
                f"{options.spelled('sparse_config')}: leave one out"
            )
        return None
    found = sparse_config(directory, config, options.sparse_config)
    if options.sparse != "on":
        return found
    if found is None:
        raise ConfigError(
            f"{options.spelled('sparse')} on: {directory} has no budgets "
            "(sparse_attention_config.json), or config.json disables them; give "
            f"{options.spelled('sparse_config')} FILE"
        )
    return dataclasses.replace(found, threshold=0)
