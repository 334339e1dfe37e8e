"""A family of models that the package has not takes one file and one row: Qwen3, by PyTorch."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from support import huggingface, random_models
from transformers import Qwen3Config, Qwen3ForCausalLM

from convert import weights
from convert.describe import describe
from convert.export import export
from qwen_jax.config import ConfigError
from qwen_jax.engine.engine import Engine, EngineConfig
from qwen_jax.engine.request import Request
from qwen_jax.models import params, presets
from qwen_jax.models.configs import generation_config, model_config, notes, sparse_config
from qwen_jax.models.families import FAMILIES, Published, Row

pytestmark = pytest.mark.torch

SLICE, PROMPT, STEPS = 64, 40, 32
ROW = Row(
    "support.tiny_qwen3",
    "Qwen3, dense, text",
    {"qwen3-0.6b": Published("qwen3-0.6b", "Qwen/Qwen3-0.6B")},
)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(FAMILIES, "qwen3", ROW)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def reference(request, tmp_path):
    """A model of PyTorch, saved to `tmp_path / "hf"`, whose norms scale and logits are decided."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=300,
            hidden_size=96,
            intermediate_size=160,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=32,  # not 96 / 8
            max_position_embeddings=1024,
            tie_word_embeddings=request.param,
            attn_implementation="eager",
        )
    ).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            elif "embed_tokens" not in name:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            else:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "hf")
    return model.eval()


def test_its_configuration_is_read(reference, tmp_path):
    config = model_config(tmp_path / "hf")
    assert (config.model_type, config.head_dim, config.num_heads) == ("qwen3", 32, 8)
    assert config.tie_embeddings == reference.config.tie_word_embeddings
    assert not [note for note in notes(tmp_path / "hf") if note.startswith("config.json")]
    assert sparse_config(tmp_path / "hf", config) is None
    assert not generation_config(tmp_path / "hf").do_sample


def test_a_converted_checkpoint_gives_pytorchs_logits_and_greedy_answer(reference, tmp_path):
    weights.convert(tmp_path / "hf", tmp_path / "ours")
    config = model_config(tmp_path / "ours")
    tree = weights.load(tmp_path / "ours")
    engine = Engine(config, tree, EngineConfig(max_len=4 * SLICE, slices=(SLICE,)))
    for length in (1, SLICE - 1, SLICE, 2 * SLICE + 8):
        tokens = random_models.tokens(config, length)
        expected = huggingface.logits(reference, tokens)
        assert 1 < np.abs(expected).max() < 100
        actual = np.concatenate(list(engine.score(tokens)))
        assert np.abs(actual - expected).max() <= 1e-4
    prompt, expected = huggingface.decided_prompt(reference, config, PROMPT, STEPS)
    assert engine.run([Request(prompt=prompt, max_new_tokens=STEPS)])[0] == expected


def test_what_its_checkpoint_holds_survives_the_way_there_and_back(reference, tmp_path):
    weights.convert(tmp_path / "hf", tmp_path / "ours")
    assert export(tmp_path / "ours", tmp_path / "back") == ()
    for path in sorted((tmp_path / "hf").glob("*.safetensors")):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    found = describe(tmp_path / "ours")
    assert found["config"]["model_type"] == "qwen3"
    assert found["num_parameters"] == sum(p.numel() for p in reference.parameters())


def test_parameters_know_their_axes(reference, tmp_path):
    config = model_config(tmp_path / "hf")
    axes = params.axes(config)["blocks"]["attention"]
    assert axes["q_norm"]["scale"] == ("layers", "head_dim")
    assert axes["q"] == {"kernel": ("layers", "embed", "heads", "head_dim")}
    same = jax.tree.map(lambda leaf: leaf.shape, params.abstract(config))
    loaded = jax.tree.map(lambda leaf: leaf.shape, weights.load(tmp_path / "hf"))
    assert loaded == same


def test_what_it_does_not_compute_is_refused(reference, tmp_path):
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    for changes, said in (
        ({"attention_bias": True}, "attention_bias=True is not supported: .* set it to false"),
        ({"architectures": ["Qwen2ForCausalLM"]}, r'must be \["Qwen3ForCausalLM"\]'),
        ({"model_type": "qwen2"}, r'must be \["Qwen2ForCausalLM"\]'),
        ({"model_type": "llama"}, r"'llama' is not 'qwen2' \(.*\) or 'qwen3' \(Qwen3, dense"),
    ):
        (tmp_path / "hf" / "config.json").write_text(json.dumps(raw | changes))
        with pytest.raises(ConfigError, match=said):
            model_config(tmp_path / "hf")


def test_its_published_models_have_names_and_shapes(tmp_path):
    assert presets.find("Qwen/Qwen3-0.6B") == presets.find("qwen3-0.6b") == "qwen3-0.6b"
    config = presets.config(tmp_path, "qwen3-0.6b")
    assert (config.model_type, config.head_dim) == ("qwen3", 128)
    assert params.count(params.abstract(config)) == 596_049_920
