"""Flags override a checkpoint's own settings."""

import dataclasses
import json

import pytest

from pallas_kernels.geometry import ChunkGeometry
from qwen_jax.cli.flags import AnswerFlags, ModelFlags
from qwen_jax.config import ConfigError, GenerationConfig
from qwen_jax.engine.request import RequestError, Sampling
from qwen_jax.llm.model import open_model

QWEN = GenerationConfig(
    do_sample=True, temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05
)


def with_config(model, **fields):
    """Changes fields of a checkpoint's config.json."""
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return model


DUAL = {"chunk_size": 512, "local_size": 128, "original_max_position_embeddings": 256}


@pytest.mark.parametrize(
    ("own", "flags", "geometry", "original"),
    [
        (None, {}, None, 0),
        (None, {"dca": "off"}, None, 0),
        (None, {"dca": "on", "dca_chunk": 64, "dca_local": 16}, (64, 16), 0),
        (None, {"dca": "on", "dca_chunk": 64, "dca_local": 16, "dca_original": 32}, (64, 16), 32),
        (DUAL, {}, (512, 128), 256),
        (DUAL, {"dca": "on"}, (512, 128), 256),
        (DUAL, {"dca": "off"}, None, 0),
        (DUAL, {"dca_chunk": 1024}, (1024, 128), 256),
        (DUAL, {"dca_local": 64, "dca_original": 0}, (512, 64), 0),
    ],
)
def test_dual_chunk_flags_change_what_the_config_says(model, own, flags, geometry, original):
    with_config(model, dual_chunk_attention_config=own)
    config = open_model(model, ModelFlags(**flags)).config
    assert config.dual_chunk == (geometry and ChunkGeometry(*geometry))
    assert config.original_len == original


def test_fields_that_are_left_unread_are_said_once(model, run, fake):
    with_config(model, unsloth_version="2025.1", torchscript=False, use_mrope=False)
    code, _, err = run("generate", model, "--prompt", "a", "--max-new-tokens", 2)
    assert code == 0
    assert err.count("config.json: left unread, as they change no logits: unsloth_ver") == 1
    assert "use_mrope" not in err


def test_half_precision_is_computed_in_float32_on_a_cpu_and_rounded_elsewhere(model, monkeypatch):
    opened = open_model(with_config(model, torch_dtype="float16"), ModelFlags())
    assert opened.precision() == (
        "float32",
        "stored as float16; CPUs are faster in float32 (--dtype bf16)",
    )
    monkeypatch.setattr("jax.default_backend", lambda: "tpu")
    name, why = opened.precision()
    assert (name, why) == ("bfloat16", "stored as float16, which is rounded (--dtype f32 keeps it)")


def test_yarn_is_used_and_not_together_with_dual_chunks(model, run, fake):
    with_config(model, rope_scaling={"type": "yarn", "factor": 4.0})
    assert open_model(model, ModelFlags()).max_len == 4 * 2048
    flags = ("--dca", "on", "--dca-chunk", 64, "--dca-local", 16)
    code, _, err = run("generate", model, "--prompt", "a", *flags)
    assert (code, err.count("\n")) == (2, 1)
    assert "YaRN (rope_scaling) and Dual Chunk Attention both stretch positions" in err


def test_the_cache_of_a_hub_is_opened_at_its_snapshot(model, run, fake):
    root = model.parent / "models--Qwen--tiny"
    (root / "snapshots").mkdir(parents=True)
    model.rename(root / "snapshots" / "0123")
    assert open_model(root, ModelFlags()).directory == root / "snapshots" / "0123"
    assert run("generate", root, "--prompt", "a", "--max-new-tokens", 2)[0] == 0


@pytest.mark.parametrize(
    ("own", "flags", "fault"),
    [
        (None, {"dca": "on"}, "--dca on needs --dca-chunk and --dca-local"),
        (None, {"dca": "on", "dca_chunk": 64}, "--dca on needs --dca-local"),
        (None, {"dca_chunk": 64}, "--dca-chunk has no effect"),
        (DUAL, {"dca": "off", "dca_chunk": 64}, "--dca off contradicts --dca-chunk"),
        (DUAL, {"dca_local": 512}, "--dca-local 512 must be in"),
        (DUAL, {"dca_original": -1}, "--dca-original -1 must be at least 0"),
        (None, {"slice": 0}, "--slice 0 must be at least 1"),
        (None, {"max_len": -5}, "--max-len -5 must be at least 1"),
        (None, {"sparse": "on"}, r"--sparse on: .* has no budgets"),
        (None, {"least_recall": 1.5}, "--least-recall 1.5 must be over 0"),
        (None, {"dense_tail": -1}, "--dense-tail -1 must be at least 0"),
    ],
)
def test_contradictory_flags_are_refused(model, own, flags, fault):
    with_config(model, dual_chunk_attention_config=own)
    with pytest.raises(ConfigError, match=fault):
        open_model(model, ModelFlags(**flags))


def test_the_config_says_how_much_fits_unless_max_len_does(model, capsys):
    assert open_model(model, ModelFlags()).max_len == 2048
    assert open_model(model, ModelFlags(max_len=100)).max_len == 100
    assert not capsys.readouterr().err
    opened = open_model(model, ModelFlags(max_len=5000))
    assert "--max-len 5,000 is over the 2,048" in capsys.readouterr().err
    opened.check_fits(4000, 1000)
    with pytest.raises(RequestError, match=r"4,000 prompt tokens and up to 1,001 new .* 5,000"):
        opened.check_fits(4000, 1001)


def test_sparse_follows_the_budgets_of_the_checkpoint_and_the_flag(model):
    head = ["vertical_and_slash", 100, 200, 1.0]
    (model / "sparse_attention_config.json").write_text(
        json.dumps([{str(n): head for n in range(4)}] * 2)
    )
    with_config(model, dual_chunk_attention_config=DUAL | {"sparse_attention_threshold": 300})
    opened = open_model(model, ModelFlags())
    assert opened.sparse.threshold == 300
    assert open_model(model, ModelFlags(sparse="on")).sparse.threshold == 0
    assert open_model(model, ModelFlags(sparse="off")).sparse is None


@pytest.mark.parametrize(
    ("defaults", "flags", "expected"),
    [
        (GenerationConfig(), {}, Sampling()),
        (GenerationConfig(), {"temperature": 0.5, "seed": 3}, Sampling(temperature=0.5, seed=3)),
        (
            QWEN,
            {},
            Sampling(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05),
        ),
        (
            QWEN,
            {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.0},
            Sampling(temperature=0.7, top_k=5, top_p=0.8, min_p=0.1),
        ),
    ],
)
def test_sampling_follows_the_checkpoint_and_flags_go_first(defaults, flags, expected):
    assert AnswerFlags(**flags).sampling(defaults) == expected


@pytest.mark.parametrize("flags", [{"greedy": True}, {"temperature": 0.0}])
def test_greedy_keeps_the_repetition_penalty(flags):
    sampling = AnswerFlags(**flags).sampling(QWEN)
    assert (sampling.temperature, sampling.repetition_penalty) == (0.0, 1.05)


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ({"greedy": True, "temperature": 0.5}, "--greedy contradicts --temperature"),
        ({"greedy": True, "top_k": 5}, "--greedy contradicts --top-k"),
        ({"top_p": 0.5}, "--top-p has no effect"),
        ({"temperature": -1.0}, "temperature=-1.0 must be"),
        ({"temperature": 1.0, "top_p": 2.0}, "top_p=2.0 must be"),
        ({"seed": -1}, "seed=-1 must be"),
    ],
)
def test_sampling_flags_without_sense_are_refused(flags, fault):
    with pytest.raises(ValueError, match=fault):
        AnswerFlags(**flags).sampling(GenerationConfig())


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ConfigError, match="--stop: a stop string"):
        AnswerFlags(stop=["a", ""]).stops()


def test_answers_end_at_the_ids_of_the_files_and_chats_at_the_end_of_a_turn(model):
    opened = open_model(model, ModelFlags())
    tokenizer = opened.tokenizer()
    turn, text = tokenizer.control("<|im_end|>"), tokenizer.control("<|endoftext|>")
    assert opened.end_ids(None) == ()
    assert opened.end_ids(tokenizer) == (turn,)
    base = dataclasses.replace(opened, generation=GenerationConfig(eos_ids=(text,)))
    assert base.end_ids(tokenizer) == (text,)
    assert base.end_ids(tokenizer, chat=True) == (text, turn)
