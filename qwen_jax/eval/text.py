"""Filler text in English: sentences of a seeded grammar, or those of a text."""

import random
import re
from collections.abc import Iterator

from qwen_jax.eval import grammar

_LONGEST = 400  # characters of a sentence


def _alternatives(text: str) -> list[str]:
    return [" ".join(each.split()) for each in text.split("|" if "|" in text else None)]


_ALTERNATIVES = {name: _alternatives(text) for name, text in grammar.SLOTS.items()} | {
    "sentence": grammar.SENTENCES.strip().splitlines()
}


def nouns() -> list[str]:
    """Returns common nouns of one word."""
    slots = "building creature goods land thing".split()
    return sorted({word for slot in slots for word in _ALTERNATIVES[slot] if word.isalpha()})


def adjectives() -> list[str]:
    """Returns adjectives of one word."""
    return sorted(set(_ALTERNATIVES["quality"]))


def sentences(rng: random.Random) -> Iterator[str]:
    """Generates sentences without end, of about 25 words each and rarely repeated."""

    def fill(slot: re.Match) -> str:
        alternatives = _ALTERNATIVES[slot[1]]
        return expand(alternatives[int(rng.random() * len(alternatives))])

    def expand(text: str) -> str:
        return re.sub(r"\{(\w+)\}", fill, text) if "{" in text else text

    while True:
        text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", expand("{sentence}"))
        yield text[0].upper() + text[1:]


def cut(text: str) -> list[str]:
    """Splits a text into sentences, none of them blank, each with the white space before it.

    Very long sentences are split at spaces.
    """
    pieces = []
    for sentence in re.split(
        r"(?<=[.!?])(?=\s)|(?<=[\u3002\uff01\uff1f])|(?=\n\s*\n)", text.rstrip()
    ):
        while len(sentence) > _LONGEST:
            space = max(sentence.rfind(mark, 1, _LONGEST) for mark in " \n\t")
            at = space if space > 0 and sentence[:space].strip() else _LONGEST
            pieces.append(sentence[:at])
            sentence = sentence[at:]
        pieces.append(sentence)
    return [piece for piece in pieces if piece.strip()]
