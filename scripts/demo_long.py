"""Read a long document with dense and with sparse prefill, side by side.

The journal of the lamp keeper lies in the middle of Python's language reference, as the
interpreter carries it: over 24,000 tokens, three times what the model was trained on. Ends
with status 0 only if both give the same answer, and it names the number that the text holds.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import demo_model
from demo import DOCUMENT, EXPECTED, QUESTION
from rich.console import Console
from rich.table import Table

from qwen_jax.cli.answer import Answer, answer, write
from qwen_jax.cli.flags import ModelFlags, open_model
from qwen_jax.engine.request import Request
from qwen_jax.tokenizer import Stream

BUDGETS = Path(__file__).parents[1] / "docs" / "demo" / "sparse_attention_config.json"
TOKENS = 24_500
NEW_TOKENS = 32


def reference_text() -> str:
    """Python's language reference, in prose."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def run(directory: Path) -> bool:
    """Whether both answers are the same and right."""
    demo_model.fetch(directory)
    flags = ModelFlags(sparse="on", sparse_config=BUDGETS)
    opened = open_model(directory, flags)
    tokenizer = opened.tokenizer()
    journal = DOCUMENT.read_text()
    around = tokenizer.encode_text(reference_text())
    half = (TOKENS - len(tokenizer.encode_text(journal))) // 2
    before, after = (tokenizer.decode(around[i * half : (i + 1) * half]) for i in (0, 1))
    text = f"{before}\n\n{journal}\n\n{after}\n\n{QUESTION}"
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
    print(f"\nThe journal says: the key of the lamp room is number {EXPECTED}.")
    return dense.text == short.text and EXPECTED in (dense.text or "")


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
