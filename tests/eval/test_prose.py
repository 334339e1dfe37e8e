"""Made-up prose is varied and has no number in it; texts are cut without losing a word."""

import itertools
import random
import re

import pytest

from qwen_jax.eval import text


def test_sentences_are_whole_different_and_without_digits():
    made = list(itertools.islice(text.sentences(random.Random(3)), 8000))
    assert len(set(made)) == len(made)
    assert len({sentence.split()[0] for sentence in made}) > 100
    for sentence in made:
        assert re.fullmatch(r"[A-Z][A-Za-z ,.]*\.", sentence), sentence
        assert "  " not in sentence
        assert not re.search(r"\b[Aa] [aeiou]|\b[A-Z]{2}", sentence)


def test_a_seed_gives_the_same_sentences():
    first, again, other = (
        list(itertools.islice(text.sentences(random.Random(seed)), 50)) for seed in (1, 1, 2)
    )
    assert first == again
    assert not set(first) & set(other)


@pytest.mark.parametrize(
    "given",
    [
        'He said "No!" and left. Then? Nothing.\n\nA heading\n\nWrapped\nlines of 3.5 metres.',
        "第一句。第二句！第三句？",  # noqa: RUF001
        "no full stop " * 200,
        "unbroken" * 200,
        "\n\n  \n\nA.\n\n\n\n",
    ],
)
def test_a_text_is_cut_into_sentences_that_keep_every_word(given):
    pieces = text.cut(given)
    assert all(piece.strip() and len(piece) <= 400 for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(given.split())


def test_sentences_keep_the_space_before_them():
    assert text.cut("One. Two!\nThree?\n\nFour") == ["One.", " Two!", "\nThree?", "\n\nFour"]
