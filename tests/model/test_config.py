import json

import numpy as np
import pytest

from pallas_kernels.geometry import ChunkGeometry
from qwen_jax.config import ConfigError, generation_config, model_config, sparse_config

SEVEN_BILLION = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "dual_chunk_attention_config": {
        "chunk_size": 262144,
        "local_size": 8192,
        "original_max_position_embeddings": 262144,
    },
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 1010000,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000000.0,
    "sliding_window": 1010000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


def write(directory, name="config.json", **changes):
    content = {**SEVEN_BILLION, **changes} if name == "config.json" else changes
    content = {key: value for key, value in content.items() if value is not ...}
    (directory / name).write_text(json.dumps(content))
    return directory


def test_the_seven_billion_model_reads_as_published(tmp_path):
    config = model_config(write(tmp_path))
    assert config.dual_chunk == ChunkGeometry(262144, 8192)
    assert config.dual_chunk.chunk_len == 253952
    assert (config.original_len, config.max_len) == (262144, 1010000)
    assert (config.head_dim, config.num_heads, config.num_kv_heads) == (128, 28, 4)
    assert (config.norm_eps, config.rope_theta) == (1e-5, 1e7)
    assert 2 * config.kv_elements_per_token == 57344
    assert not config.tie_embeddings


def test_both_spellings_of_newer_transformers_are_read(tmp_path):
    write(
        tmp_path,
        rope_theta=...,
        rope_parameters={"rope_theta": 5e5, "rope_type": "default"},
        torch_dtype=...,
        dtype="float32",
        layer_types=["full_attention"] * 28,
        dual_chunk_attention_config=...,
    )
    config = model_config(tmp_path)
    assert (config.rope_theta, config.weights_dtype, config.dual_chunk) == (5e5, "float32", None)


def test_dual_chunk_sizes_have_defaults(tmp_path):
    config = model_config(write(tmp_path, dual_chunk_attention_config={}))
    assert (config.dual_chunk, config.original_len) == (ChunkGeometry(8192, 1024), 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "llama"}, "model_type='llama' is not 'qwen2'"),
        ({"hidden_size": ...}, "lacks hidden_size"),
        ({"rope_theta": ...}, "lacks rope_theta"),
        ({"num_experts": 8}, "does not know: num_experts"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' must be 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling=.* scales positions"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "gives rope_theta twice"),
        ({"torch_dtype": "float16"}, "dtype='float16' must be"),
        ({"dtype": "float32"}, "torch_dtype and dtype disagree"),
        ({"num_key_value_heads": 3}, "must be a multiple"),
        ({"hidden_size": 3585}, "hidden_size=3585 must be a multiple"),
        ({"head_dim": 127}, "must be even"),
        ({"vocab_size": "152064"}, "vocab_size='152064' must be of type int"),
        ({"vocab_size": True}, "vocab_size=True must be of type int"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must lie in"),
        ({"intermediate_size": 2**40}, "must lie in"),
        ({"tie_word_embeddings": "no"}, "must be true or false"),
        ({"layer_types": ["sliding_attention"]}, "must all be 'full_attention'"),
        ({"dual_chunk_attention_config": [1]}, "must be an object or null"),
        ({"dual_chunk_attention_config": {"chunk": 1}}, "unknown fields chunk"),
        (
            {"dual_chunk_attention_config": {"chunk_size": 8, "local_size": 8}},
            r"local_size must be in \(0, chunk_size\)",
        ),
        (
            {"dual_chunk_attention_config": {"original_max_position_embeddings": -1}},
            "must be an integer >= 0",
        ),
        *(
            ({"dual_chunk_attention_config": {f"sparse_attention_{field}": value}}, said)
            for field, value, said in (
                ("enabled", 1, "sparse_attention_enabled=1 must be true or false"),
                ("enabled", "true", "sparse_attention_enabled='true' must be"),
                ("threshold", -1, "sparse_attention_threshold=-1 must be an integer >= 0"),
                ("threshold", True, "sparse_attention_threshold=True must be an integer"),
                ("threshold", "32768", "sparse_attention_threshold='32768' must be"),
                ("threshold", 32768.5, "sparse_attention_threshold=32768.5 must be"),
                ("last_q", 0, "sparse_attention_last_q=0 must lie in"),
                ("last_q", -64, "sparse_attention_last_q=-64 must lie in"),
                ("last_q", False, "sparse_attention_last_q=False must be of type int"),
                ("last_q", [64], r"sparse_attention_last_q=\[64\] must be of type int"),
                ("last_q", 64.0, "sparse_attention_last_q=64.0 must be of type int"),
            )
        ),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said) as caught:
        model_config(write(tmp_path, **changes))
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"[" * 100000])
def test_damaged_json_is_one_clear_error(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        model_config(tmp_path)


def test_generation_config_stops_at_every_end_token(tmp_path):
    write(tmp_path)
    assert generation_config(tmp_path).eos_ids == (151645,)
    write(
        tmp_path,
        "generation_config.json",
        eos_token_id=[151645, 151643],
        do_sample=True,
        temperature=0.7,
        top_p=0.8,
        top_k=20,
        repetition_penalty=1.05,
    )
    config = generation_config(tmp_path)
    assert config.eos_ids == (151645, 151643)
    assert (config.temperature, config.top_k, config.top_p) == (0.7, 20, 0.8)
    assert (config.repetition_penalty, config.min_p, config.do_sample) == (1.05, 0.0, True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"temperature": -1}, "temperature=-1 must lie in"),
        ({"top_p": "x"}, "top_p='x' must be a number"),
        ({"eos_token_id": ["a"]}, "eos_token_id"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 must lie in"),
    ],
)
def test_generation_config_out_of_range_is_named(tmp_path, changes, said):
    write(tmp_path)
    write(tmp_path, "generation_config.json", **changes)
    with pytest.raises(ConfigError, match=said):
        generation_config(tmp_path)


def budgets(layers=28, heads=28):
    row = ["vertical_and_slash", 1000, 6096, 0.9]
    return [{str(head): row for head in range(heads)} for _ in range(layers)]


def test_sparse_budgets_come_from_the_side_file_or_inline(tmp_path):
    config = model_config(write(tmp_path))
    assert sparse_config(tmp_path, config) is None
    (tmp_path / "sparse_attention_config.json").write_text(json.dumps(budgets()))
    side = sparse_config(tmp_path, config)
    assert side is not None
    assert (side.vertical[27][27], side.slash[0][0], side.threshold) == (1000, 6096, 32768)
    (tmp_path / "sparse_attention_config.json").unlink()
    inline = {**SEVEN_BILLION["dual_chunk_attention_config"], "sparse_attention_config": budgets()}
    write(tmp_path, dual_chunk_attention_config=inline)
    assert sparse_config(tmp_path, config) == side
    write(tmp_path, dual_chunk_attention_config={**inline, "sparse_attention_enabled": False})
    assert sparse_config(tmp_path, config) is None


# What published budgets are made of: a pattern, and what refinement added to both numbers.
BASES = ((30, 800), (100, 800), (500, 700), (3500, 100), (1000, 6096))
INCREMENTS = (0, 2048, 4096, 8192)


@pytest.mark.parametrize(("layers", "heads", "kv_heads"), [(28, 28, 4), (48, 40, 8)])
def test_budgets_of_the_published_shapes_read_entry_by_entry(tmp_path, layers, heads, kv_heads):
    rng = np.random.default_rng(layers)
    base = rng.integers(0, len(BASES), (layers, heads))
    more = rng.integers(0, len(INCREMENTS), (layers, heads))
    expected = np.array(BASES)[base] + np.array(INCREMENTS)[more][..., None]
    content = [
        {
            str(head): ["vertical_and_slash", *expected[layer, head].tolist(), rng.random()]
            for head in rng.permutation(heads)
        }
        for layer in range(layers)
    ]
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"num_key_value_heads": kv_heads, "hidden_size": 128 * heads}
    write(tmp_path, **sizes)
    (tmp_path / "sparse_attention_config.json").write_text(json.dumps(content))
    found = sparse_config(tmp_path, model_config(tmp_path))
    assert found is not None
    for layer in range(layers):
        for head in range(heads):
            entry = found.vertical[layer][head], found.slash[layer][head]
            assert entry == tuple(expected[layer, head])
    assert len(np.unique(expected.reshape(-1, 2), axis=0)) == len(BASES) * len(INCREMENTS)


def test_sparse_fields_of_the_dual_chunk_configuration_are_read(tmp_path):
    given = SEVEN_BILLION["dual_chunk_attention_config"]
    (tmp_path / "sparse_attention_config.json").write_text(json.dumps(budgets()))
    for threshold, last_q in ((0, 1), (100_000, 128), (None, None)):
        fields = {"sparse_attention_threshold": threshold, "sparse_attention_last_q": last_q}
        write(tmp_path, dual_chunk_attention_config={**given, **fields})
        found = sparse_config(tmp_path, model_config(tmp_path))
        assert found is not None
        expected = (32768, 64) if threshold is None else (threshold, last_q)
        assert (found.threshold, found.last_q) == expected
    for enabled, there in ((True, True), (None, True), (False, False)):
        write(tmp_path, dual_chunk_attention_config={**given, "sparse_attention_enabled": enabled})
        assert (sparse_config(tmp_path, model_config(tmp_path)) is not None) == there
    other = {**given, "sparse_attention_config": budgets()[:-1]}
    config = model_config(write(tmp_path, dual_chunk_attention_config=other))
    with pytest.raises(ConfigError, match="contradicts sparse_attention_config in config"):
        sparse_config(tmp_path, config)


def one_wrong(row):
    return [*budgets(layers=27), {**budgets(layers=1)[0], "3": row}]


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (budgets(layers=27), "a list of 28 layers"),
        (budgets(heads=27), "layer 0 must have heads 0 to 27"),
        (budgets(heads=29), "layer 0 must have heads 0 to 27"),
        ([{str(h): ["dense", 1, 1, 1] for h in range(28)}] * 28, "layer 0 head 0 must be"),
        ({}, "a list of 28 layers"),
        ("1000", "a list of 28 layers"),
        ([[]] * 28, "layer 0 must have heads 0 to 27"),
        *(
            (one_wrong(row), "layer 27 head 3 must be")
            for row in (
                None,
                {},
                [],
                ["vertical_and_slash", 1000],
                ["vertical_and_slash", "1000", 6096, 0.9],
                ["vertical_and_slash", 1000.0, 6096, 0.9],
                ["vertical_and_slash", True, 6096, 0.9],
                ["vertical_and_slash", 1000, -1, 0.9],
                ["vertical_and_slash", 0, 6096, 0.9],
                ["vertical_and_slash", 1000, 2**31, 0.9],
            )
        ),
    ],
)
def test_malformed_sparse_budgets_are_named(tmp_path, content, said, inline):
    given = SEVEN_BILLION["dual_chunk_attention_config"]
    if inline:
        inner = {**given, "sparse_attention_config": content}
        config = model_config(write(tmp_path, dual_chunk_attention_config=inner))
        said = rf"config\.json: sparse_attention_config.* {said}"
    else:
        config = model_config(write(tmp_path))
        (tmp_path / "sparse_attention_config.json").write_text(json.dumps(content))
        said = rf"sparse_attention_config\.json.* {said}"
    with pytest.raises(ConfigError, match=said):
        sparse_config(tmp_path, config)
