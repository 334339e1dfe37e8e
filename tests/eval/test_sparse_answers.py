"""The demo model answers alike after dense and after sparse prefill, at the budgets of `docs`."""

import dataclasses

import pytest
from support import demo_checkpoint

from qwen_jax.cli.flags import ModelFlags
from qwen_jax.eval import catalog, score
from qwen_jax.eval.material import Material
from qwen_jax.llm.model import open_model

BUDGETS = demo_checkpoint.ROOT / "docs/demo/sparse_attention_config.json"


@pytest.mark.demo
@pytest.mark.parametrize(
    ("length", "depths", "density"),
    [
        (4500, [0.1], 0.8),
        pytest.param(16_000, [0.1, 0.5, 0.9], 0.35, marks=pytest.mark.long),
        # At depth 0.9 of 24,000 dense prefill finds none.
        pytest.param(24_000, [0.1], 0.25, marks=pytest.mark.long),
        pytest.param(24_000, [0.5], 0.25, marks=pytest.mark.long),
    ],
)
def test_pass_keys_are_found_with_the_same_words(length, depths, density):
    """In prompts beyond the first border of chunks, where dense prefill finds the key."""
    opened = open_model(demo_checkpoint.directory(), ModelFlags(sparse="on", sparse_config=BUDGETS))
    assert opened.config.dual_chunk is not None
    assert length > opened.config.dual_chunk.chunk_len
    tokenizer, weights = opened.tokenizer(), opened.weights()
    material = Material(tokenizer)
    kind = catalog.KINDS["passkey"]

    def ask(model):
        engine = model.engine(
            length + kind.max_new_tokens, vocab_limit=tokenizer.size, weights=weights
        )
        return list(
            score.run(
                engine,
                tokenizer,
                catalog.grid(["passkey"], [length], depths, 1),
                lambda cell: kind.build(material, cell),
                eos_ids=opened.end_ids(tokenizer, chat=True),
            )
        )

    dense, sparse = ask(dataclasses.replace(opened, sparse=None)), ask(opened)
    assert [result.score for result in dense] == [1] * len(depths)
    assert [result.answer for result in sparse] == [result.answer for result in dense]
    for result in sparse:
        assert result.sparse is not None
        assert result.sparse.density < density
