"""Read a long document with dense and with sparse prefill, side by side.

A number lies hidden in over 24,000 tokens of made-up prose, three times what the model was
trained on. Ends with status 0 only if both give the same answer, and it names the number.
"""

import argparse
import dataclasses
import random
import sys
from pathlib import Path

import demo_model
from rich.console import Console
from rich.table import Table

from qwen_jax.cli.answer import Answer, answer, write
from qwen_jax.cli.flags import ModelFlags, open_model
from qwen_jax.engine.request import Request
from qwen_jax.eval.text import sentences
from qwen_jax.tokenizer import Stream, Tokenizer

BUDGETS = Path(__file__).parents[1] / "docs" / "demo" / "sparse_attention_config.json"
TOKENS = 24_600  # of prose, as counted sentence by sentence; a few less in one piece
NEW_TOKENS = 24
NUMBER = "71906"
NEEDLE = f"The pass key is {NUMBER}. Remember it. {NUMBER} is the pass key."
INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
    "it. I will quiz you about the important information there.\n\n"
)
QUESTION = "What is the number of the pass key?"


def document(tokenizer: Tokenizer) -> str:
    """Prose with the needle at two fifths of it, always the same."""
    prose, count = [], 0
    for sentence in sentences(random.Random(0)):
        prose.append(sentence)
        count += len(tokenizer.encode_text(sentence)) + 1
        if count >= TOKENS:
            break
    prose.insert(2 * len(prose) // 5, NEEDLE)
    return " ".join(prose)


def run(directory: Path) -> bool:
    """Whether both answers are the same and right."""
    demo_model.fetch(directory)
    flags = ModelFlags(sparse="on", sparse_config=BUDGETS)
    opened = open_model(directory, flags)
    tokenizer = opened.tokenizer()
    text = f"{INTRODUCTION}{document(tokenizer)}\n\n{QUESTION}"
    ids = tuple(tokenizer.encode_chat([{"role": "user", "content": text}]))
    request = Request(
        prompt=ids,
        max_new_tokens=NEW_TOKENS,
        eos_ids=opened.end_ids(tokenizer, chat=True),
    )
    tree = opened.weights()
    answers: dict[str, Answer] = {}
    for name, way in (("dense", dataclasses.replace(opened, sparse=None)), ("sparse", opened)):
        print(f"\n{name} prefill of {len(ids):,} tokens: {QUESTION}", flush=True)
        engine = way.engine(len(ids) + NEW_TOKENS, vocab_limit=tokenizer.size, weights=tree)
        answers[name] = answer(engine, request, stream=Stream(tokenizer), write=write)
        print()
        del engine  # and its cache
    table = Table("", *answers, box=None, pad_edge=False)
    dense, short = answers["dense"], answers["sparse"]
    assert short.sparse is not None
    table.add_row(
        "first token after", *(f"{each.timings.ttft_s:.1f} s" for each in answers.values())
    )
    table.add_row("attention computed", "100%", f"{short.sparse.density:.1%}")
    table.add_row(
        "attention found",
        "100%",
        f"{short.sparse.recall:.1%} ({short.sparse.least_recall:.1%} in the worst head)",
    )
    table.add_row("answer", *(" ".join((each.text or "").split()) for each in answers.values()))
    print()
    Console().print(table)
    print(f"\nThe text says: {NEEDLE}")
    return dense.text == short.text and NUMBER in (dense.text or "")


def main() -> int:
    """The exit status: 0 after two equal right answers, else 1; 2 without the model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "model",
        nargs="?",
        type=Path,
        default=demo_model.cache_dir(),
        help="where the model is kept; default: %(default)s",
    )
    try:
        return 0 if run(parser.parse_args().model) else 1
    except (demo_model.DemoModelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
