"""Tokenizers that cut text in different ways, and an engine that answers what it is told to."""

import json
from pathlib import Path

from tokenizers import Regex, models, pre_tokenizers

from qwen_jax.engine.engine import Engine
from qwen_jax.engine.request import Event
from qwen_jax.text.tokenizer import Tokenizer
from support.vocabularies import SMOL_TEMPLATE, byte_level, save, small_vocabulary


def small(directory: Path) -> Tokenizer:
    """Cuts text as Qwen2.5 does."""
    return Tokenizer.load(save(byte_level(*small_vocabulary()), directory))


def digits(directory: Path) -> Tokenizer:
    """Cuts text as SmolLM2 does, and has its chat format."""
    made = byte_level(*small_vocabulary())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    save(made, directory)
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": SMOL_TEMPLATE}))
    return Tokenizer.load(directory)


def joining(directory: Path) -> Tokenizer:
    """Joins full stops and the spaces after them, so that sentences cannot be counted alone."""
    vocab, merges = small_vocabulary()
    for left, right in [(".", "Ġ"), (".Ġ", "A")]:
        merges.append((left, right))
        vocab[left + right] = len(vocab)
    made = byte_level(vocab, merges)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+"), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    assert isinstance(made.model, models.BPE)
    return Tokenizer.load(save(made, directory))


TOKENIZERS = {"small": small, "digits": digits, "joining": joining}


class Reader(Engine):
    """An engine that answers each prompt with what `read` makes of its text.

    Args:
        read: from the text of a prompt to an answer.
        sparse: what is reported of each prefill.
    """

    def __init__(self, tokenizer, read, sparse=None):
        self.tokenizer, self.read, self.sparse = tokenizer, read, sparse
        self.asked = []
        self.answered = 0

    @property
    def busy(self):
        return self.answered < len(self.asked)

    def add(self, request):
        self.asked.append(request)
        return len(self.asked) - 1

    def step(self):
        self.answered += 1
        prompt = self.asked[-1].prompt
        return [
            Event(
                request_id=len(self.asked) - 1,
                tokens=tuple(self.tokenizer.encode_text(self.read(self.tokenizer.decode(prompt)))),
                prefilled=len(prompt),
                sparse=self.sparse,
                finish="stop",
            )
        ]
