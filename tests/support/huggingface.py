"""The same model in transformers: parameter trees as PyTorch modules, logits and greedy answers."""

import dataclasses
import itertools

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from qwen_jax.config import ModelConfig
from support import goldens, random_models


def build(config: ModelConfig, weights: dict) -> Qwen2ForCausalLM:
    """A float32 model that holds a copy of the parameter tree."""
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.embed_dim,
            intermediate_size=config.mlp_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_len,
            rms_norm_eps=config.norm_eps,
            rope_parameters=rope_parameters(config),
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="eager",
        )
    )
    state = {
        name: torch.tensor(array)
        for name, array in random_models.state_dict(config, weights).items()
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config.tie_embeddings else [])
    return model.float().eval()


def rope_parameters(config: ModelConfig) -> dict:
    """The configuration of rotary positions, in the spelling of transformers 5."""
    base = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.yarn is None:
        return base
    yarn = dataclasses.asdict(config.yarn)
    original = yarn.pop("original_len")
    return {**base, **yarn, "rope_type": "yarn", "original_max_position_embeddings": original}


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: tuple[int, ...]) -> np.ndarray:
    """Logits after every token, in float32."""
    return model(torch.tensor([tokens])).logits[0].float().numpy()


@torch.no_grad()
def greedy(model: PreTrainedModel, tokens: tuple[int, ...], steps: int) -> tuple[list[int], float]:
    """The most likely continuation, and the smallest lead of a chosen token over the next best."""
    output = model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1)
    answer: list[int] = []
    lead = float("inf")
    for _ in range(steps):
        best = output.logits[0, -1].float().topk(2)
        answer.append(int(best.indices[0]))
        lead = min(lead, float(best.values[0] - best.values[1]))
        output = model(
            torch.tensor([[answer[-1]]]), past_key_values=output.past_key_values, use_cache=True
        )
    return answer, lead


def decided_prompt(
    model: PreTrainedModel, config: ModelConfig, length: int, steps: int
) -> tuple[tuple[int, ...], list[int]]:
    """A prompt whose greedy answer has no near tie, and that answer."""
    for seed in itertools.count():
        prompt = random_models.tokens(config, length, seed)
        answer, lead = greedy(model, prompt, steps)
        if lead > goldens.DECIDED:
            return prompt, answer
