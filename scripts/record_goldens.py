"""Record what PyTorch answers, for tests where there is no PyTorch (tests/model/test_goldens.py).

Needs torch and transformers; run from anywhere:

    python scripts/record_goldens.py
"""

# pyright: reportMissingImports=false

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import transformers  # noqa: E402
from support import demo_checkpoint, goldens, huggingface, random_models  # noqa: E402
from transformers import Qwen2ForCausalLM  # noqa: E402


def tiny() -> dict[str, np.ndarray]:
    """Logits and greedy answers of some random configurations."""
    arrays = {}
    for name in goldens.TINY:
        config = random_models.CONFIGS[name]
        weights = random_models.weights(config)
        model = huggingface.build(config, weights)
        tokens = random_models.tokens(config, goldens.TINY_LENGTH)
        prompt, answer = huggingface.decided_prompt(
            model, config, goldens.TINY_PROMPT, goldens.STEPS
        )
        arrays |= {
            f"{name}/fingerprint": np.array(goldens.fingerprint(weights)),
            f"{name}/logits": huggingface.logits(model, tokens),
            f"{name}/prompt": np.array(prompt, np.int32),
            f"{name}/answer": np.array(answer, np.int32),
        }
    return arrays


def demo() -> dict[str, np.ndarray]:
    """Summaries of the demo model's logits over a text, and a greedy answer."""
    model = Qwen2ForCausalLM.from_pretrained(demo_checkpoint.directory(), dtype=torch.float32)
    tokens = demo_checkpoint.tokens(goldens.DEMO_LENGTH)
    summary = goldens.summary(huggingface.logits(model.eval(), tokens))
    for start in range(0, goldens.DEMO_LENGTH, goldens.DEMO_PROMPT):
        prompt = tokens[start : start + goldens.DEMO_PROMPT]
        answer, lead = huggingface.greedy(model, prompt, goldens.STEPS)
        if lead > goldens.DECIDED:
            return {
                **summary,
                "tokens": np.array(tokens, np.int32),
                "prompt": np.array(prompt, np.int32),
                "answer": np.array(answer, np.int32),
            }
    raise SystemExit("error: every prompt has a near tie")


def main() -> None:
    versions = np.array([f"torch {torch.__version__}", f"transformers {transformers.__version__}"])
    for path, arrays in ((goldens.TINY_PATH, tiny()), (goldens.DEMO_PATH, demo())):
        path.parent.mkdir(exist_ok=True)
        np.savez_compressed(path, allow_pickle=False, versions=versions, **arrays)
        print(f"{path.relative_to(ROOT)}: {len(arrays)} arrays, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
