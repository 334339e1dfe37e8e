import dataclasses
import json

import numpy as np
import pytest

from pallas_kernels.geometry import ChunkGeometry
from qwen_jax.config import ConfigError, GenerationConfig
from qwen_jax.models.configs import generation_config, model_config, notes, sparse_config

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


# As the cards of Qwen2.5 prescribe it for texts of over 32,768 tokens.
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}


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
        ({"num_experts": 8}, "does not know: num_experts"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' must be 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling is of type 'linear'"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, r"is of type \"\['yarn'\]\"|type \['yarn'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling lacks factor"),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, "factor=0.5 must be a number from 1 to 1024"),
        ({"rope_scaling": {**YARN, "mrope_section": [1]}}, "does not know: mrope_section"),
        ({"rope_scaling": {**YARN, "rope_type": "default"}}, "does not know: factor"),
        ({"rope_scaling": {"type": "default", "rope_type": "yarn", "factor": 2}}, "disagree"),
        ({"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 2}}, "beta_fast=1 must be at leas"),
        ({"rope_scaling": {**YARN, "truncate": 1}}, "truncate=1 must be true or false"),
        ({"rope_scaling": {**YARN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is"),
        (
            {"rope_scaling": {**YARN, "original_max_position_embeddings": 2**30}},
            r"factor=4 times 1,073,741,824 tokens is over 2\^31",
        ),
        (
            {"rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 2.0}},
            "rope_scaling contradicts rope_parameters",
        ),
        ({"rope_scaling": YARN}, "YaRN .* and Dual Chunk Attention both stretch positions"),
        ({"rope_theta": 1}, "rope_theta=1 must be a number over 1 and at most 1e"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "gives rope_theta twice"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype='float8_e4m3fn' must be"),
        ({"torch_dtype": ["float32"]}, r"dtype=\['float32'\] must be"),
        ({"dtype": "float32"}, "torch_dtype and dtype disagree"),
        ({"num_key_value_heads": 3}, "must be a multiple"),
        ({"hidden_size": 3585}, "hidden_size=3585 must be a multiple"),
        ({"head_dim": 127}, "must be even"),
        ({"vocab_size": "152064"}, "vocab_size='152064' must be an integer"),
        ({"vocab_size": True}, "vocab_size=True must be an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be an integer from 1 to 1024"),
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers=1000000 must be an integer from 1"),
        ({"num_hidden_layers": 28.0}, "num_hidden_layers=28.0 must be an integer from 1"),
        ({"num_attention_heads": 2**31}, "num_attention_heads=2147483648 must be an integer"),
        ({"intermediate_size": 2**40}, "intermediate_size=1099511627776 must be an integer from"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0 must be a number over 0"),
        ({"tie_word_embeddings": "no"}, "must be true or false"),
        ({"layer_types": ["sliding_attention"]}, "must be a list of 'full_attention'"),
        ({"layer_types": "full_attention"}, "must be a list of 'full_attention'"),
        ({"layer_types": ["full_attention"] * 27}, "layer_types has 27 entries for num_hidden_lay"),
        ({"layer_types": []}, "layer_types has 0 entries"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, r'must be \["Qwen2ForCausalLM"\]'),
        ({"model_type": "qwen2_5_vl"}, "that one reads pictures"),
        ({"model_type": ["qwen2"]}, r"model_type=\['qwen2'\] is not 'qwen2'"),
        ({"use_mrope": True}, "use_mrope=True is not supported: remove it, or set it to false"),
        ({"attention_bias": False}, "attention_bias=False is not supported: .* set it to true"),
        ({"is_causal": False}, "is_causal=False is not supported"),
        ({"pretraining_tp": 2}, "pretraining_tp=2 is not supported: remove it, or set it to 1"),
        ({"pretraining_tp": True}, "pretraining_tp=True is not supported"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads={'0': .1.} is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "says that the weights are quantized"),
        ({"quantization": {"bits": 4}}, "says that the weights are quantized"),
        ({"temperature": 0.7}, "temperature=0.7 belongs into generation_config.json"),
        ({"num_beams": 4}, "num_beams=4 is not supported"),
        ({"eos_token_id": 502.5}, "eos_token_id=502.5 must be token ids"),
        ({"eos_token_id": -5}, "eos_token_id=-5 must be token ids"),
        ({"eos_token_id": True}, "eos_token_id=True must be token ids"),
        ({"eos_token_id": [0, 152064]}, "eos_token_id=.0, 152064. must be under vocab_size=152064"),
        ({"pad_token_id": 152064}, "pad_token_id=152064 must be under vocab_size"),
        ({"bos_token_id": "1"}, "bos_token_id='1' must be token ids"),
        ({"dual_chunk_attention_config": [1]}, "must be an object or null"),
        ({"dual_chunk_attention_config": {"chunk": 1}}, "does not know: chunk"),
        (
            {"dual_chunk_attention_config": {"chunk_size": 8, "local_size": 8}},
            r"local_size must be in \(0, chunk_size\)",
        ),
        (
            {"dual_chunk_attention_config": {"original_max_position_embeddings": -1}},
            "must be an integer from 0",
        ),
        *(
            ({"dual_chunk_attention_config": {f"sparse_attention_{field}": value}}, said)
            for field, value, said in (
                ("enabled", 1, "sparse_attention_enabled=1 must be true or false"),
                ("enabled", "true", "sparse_attention_enabled='true' must be"),
                ("threshold", -1, "sparse_attention_threshold=-1 must be an integer from 0"),
                ("threshold", True, "sparse_attention_threshold=True must be an integer"),
                ("threshold", "32768", "sparse_attention_threshold='32768' must be"),
                ("threshold", 32768.5, "sparse_attention_threshold=32768.5 must be"),
                ("last_q", 0, "sparse_attention_last_q=0 must be an integer from 1"),
                ("last_q", -64, "sparse_attention_last_q=-64 must be an integer from 1"),
                ("last_q", False, "sparse_attention_last_q=False must be an integer"),
                ("last_q", [64], r"sparse_attention_last_q=\[64\] must be an integer"),
                ("last_q", 64.0, "sparse_attention_last_q=64.0 must be an integer"),
            )
        ),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said) as caught:
        model_config(write(tmp_path, **changes))
    assert str(caught.value).count(str(tmp_path / "config.json")) == 1


def test_what_changes_no_number_is_left_unread_and_said_once(tmp_path):
    left = {
        "_attn_implementation_autoset": True,
        "_attn_implementation": "eager",
        "unsloth_version": "2025.1.1",
        "unsloth_fixed": True,
        "torchscript": False,
        "auto_map": {"AutoModelForCausalLM": "modeling.Qwen2ForCausalLM"},
    }
    off = {
        "use_mrope": False,
        "quantization_config": None,
        "attention_bias": True,
        "pruned_heads": {},
        "temperature": 1.0,
        "top_k": 50,
        "num_beams": 1,
        "num_beam_groups": 1,
        "output_scores": None,
        "layer_types": None,
    }
    plain = model_config(write(tmp_path))
    assert notes(tmp_path) == []
    assert model_config(write(tmp_path, **left, **off)) == plain
    (note,) = notes(tmp_path)
    assert note == f"config.json: left unread, as they change no logits: {', '.join(left)}"
    write(tmp_path, "generation_config.json", eos_token_id=3, max_new_tokens=2048, num_beams=1)
    assert notes(tmp_path) == [
        note,
        "generation_config.json: left unread, as they change no logits: max_new_tokens",
    ]


def test_every_default_of_transformers_is_accepted(tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {
        name: value
        for name, value in SEVEN_BILLION.items()
        if name not in ("dual_chunk_attention_config", "torch_dtype", "architectures")
    }
    config = transformers.Qwen2Config(**shape)
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    assert model_config(tmp_path).rope_theta == 1e7
    defaults = transformers.GenerationConfig()
    given = defaults.to_dict() | transformers.GenerationConfig._get_default_generation_params()
    given["top_k"] = 50
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    assert generation_config(tmp_path) == GenerationConfig(eos_ids=(151645,), top_k=50)
    # As versions before 5 wrote them into config.json.
    old = config.to_dict() | transformers.GenerationConfig._get_default_generation_params()
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert model_config(tmp_path).rope_theta == 1e7


def test_a_missing_base_of_rotary_positions_is_that_of_transformers(tmp_path):
    assert model_config(write(tmp_path, rope_theta=...)).rope_theta == 10000.0


@pytest.mark.parametrize("kind", ["type", "rope_type"])
@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_yarn_is_read_in_both_spellings(tmp_path, field, kind):
    scaling = {kind: "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    plain = {"dual_chunk_attention_config": ..., "max_position_embeddings": 32768}
    config = model_config(write(tmp_path, **{field: scaling}, **plain))
    assert config.yarn is not None
    assert (config.yarn.factor, config.yarn.original_len) == (4.0, 32768)
    assert config.yarn.attention_factor == pytest.approx(1.1386294)
    assert (config.max_len, config.rope_theta) == (131072, 1e7)
    with pytest.raises(ConfigError, match=r"YaRN .* and Dual Chunk Attention both stretch"):
        dataclasses.replace(config, dual_chunk=ChunkGeometry(64, 16))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"[" * 100000,
        b'{"model_type": "qwen2", "model_type": "qwen2"}',
        b'{"rms_norm_eps": NaN}',
        b'{"rope_theta": 1' + b"0" * 5000 + b"}",
        b'{"id2label": ' + b'{"a": ' * 200 + b"1" + b"}" * 201,
    ],
)
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
        ({"temperature": -1}, "temperature=-1 must be a number from 0 to 10000"),
        ({"top_p": "x"}, "top_p='x' must be a number"),
        ({"eos_token_id": ["a"]}, "eos_token_id"),
        ({"eos_token_id": 502.5}, "eos_token_id=502.5 must be token ids"),
        ({"eos_token_id": [-5]}, "eos_token_id=.-5. must be token ids"),
        ({"eos_token_id": [[1]]}, "eos_token_id=..1.. must be token ids"),
        ({"eos_token_id": 152064}, "eos_token_id=152064 must be under vocab_size=152064"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 must be a number from 0.0001"),
        ({"do_sample": "false"}, "do_sample='false' must be true or false"),
        ({"do_sample": 0}, "do_sample=0 must be true or false"),
        ({"top_k": 20.5}, "top_k=20.5 must be an integer from 0"),
        ({"top_k": True}, "top_k=True must be an integer from 0"),
        ({"top_q": 0.5}, "does not know: top_q"),
        ({"num_beams": 4}, "num_beams=4 is not supported: remove it, or set it to 1"),
        ({"suppress_tokens": [5]}, "suppress_tokens=.5. is not supported"),
        ({"stop_strings": ["\n"]}, "stop_strings=.* is not supported"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size=3 is not supported"),
        ({"forced_eos_token_id": 2}, "forced_eos_token_id=2 is not supported: remove it"),
        ({"max_new_tokens": "many"}, "max_new_tokens='many' must be an integer"),
    ],
)
def test_generation_config_out_of_range_is_named(tmp_path, changes, said):
    write(tmp_path)
    write(tmp_path, "generation_config.json", **changes)
    with pytest.raises(ConfigError, match=said) as caught:
        generation_config(tmp_path)
    assert str(caught.value).count(str(tmp_path / "generation_config.json")) == 1


def test_a_link_that_leads_nowhere_is_no_missing_file(tmp_path):
    write(tmp_path)
    for name in ("generation_config.json", "sparse_attention_config.json"):
        (tmp_path / name).symlink_to("../../blobs/not-downloaded")
    with pytest.raises(ConfigError, match=r"generation_config\.json is missing"):
        generation_config(tmp_path)
    with pytest.raises(ConfigError, match=r"sparse_attention_config\.json is missing"):
        sparse_config(tmp_path, model_config(tmp_path))


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
                ["vertical_and_slash", 1000, 6096, "0.9"],
                ["vertical_and_slash", 1000, 6096, 0.9, 1],
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
