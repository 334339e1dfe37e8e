"""Prompts: exact in length, needles at their depth, one right answer, the same every time."""

import collections
import hashlib
import itertools
import re

import pytest
from support import readers

from qwen_jax.eval import catalog, text
from qwen_jax.eval.catalog import KINDS
from qwen_jax.eval.material import Material
from qwen_jax.eval.tasks import Cell, TaskError

# Recorded: prompts must stay as they are, or results of different versions cannot be compared.
DIGESTS = {
    "passkey": "ef6df392914c146f",
    "niah": "52a35dc86fd90247",
    "niah_single": "119a6a055c6039db",
    "niah_multikey": "6710301e66241a69",
    "niah_multivalue": "c2f2e193a9deb44b",
    "vt": "a3d31c104c04a535",
    "cwe": "301a52293f9dd07a",
}
NEEDLES = ["niah", "niah_single", "niah_multikey", "niah_multivalue"]


@pytest.fixture(scope="module", params=readers.TOKENIZERS)
def tokenizer(request, tmp_path_factory):
    return readers.TOKENIZERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return readers.small(tmp_path_factory.mktemp("plain"))


def cell(task, length, depth=0.5, sample=0):
    return Cell(
        task=task, length=length, depth=depth if KINDS[task].has_depth else None, sample=sample
    )


def build(tokenizer, *arguments, seed=0, **more):
    asked = cell(*arguments, **more)
    return KINDS[asked.task].build(Material(tokenizer, seed=seed), asked)


@pytest.mark.parametrize("task", KINDS)
def test_a_prompt_has_exactly_its_length(tokenizer, task):
    material = Material(tokenizer)
    for length, depth in itertools.product([3700, 3701, 3702, 3703, 6000, 20011], [0.0, 0.5, 1.0]):
        if (task, length) == ("cwe", 6000):
            continue  # from 4,096 tokens on its words are more frequent, which takes more room
        prompt = KINDS[task].build(material, cell(task, length, depth)).prompt
        assert len(prompt) == length
        if not KINDS[task].has_depth:
            break


def test_a_short_prompt_has_exactly_its_length_too(tokenizer):
    for length in range(900, 930):
        assert len(build(tokenizer, "niah", length).prompt) == length


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("task", ["passkey", "niah", "niah_single"])
def test_the_needle_lies_at_its_depth_in_the_filler(small, task, depth):
    asked = build(small, task, 8000, depth)
    said = small.decode(asked.prompt)
    [answer] = asked.expected
    needle = {
        "passkey": f"The pass key is {answer}. Remember it. {answer} is the pass key.",
    }.get(task) or re.search(
        rf"One of the special magic numbers for [a-z]+-[a-z]+ is: {answer}\.", said
    )[0]
    assert said.count(needle) == 1
    assert said.count(answer) == needle.count(answer)
    before, after = said.split(needle)
    before = re.split(r"there\.\n\n|afterwards\.\n", before)[1]
    after = after.partition("\n")[0]
    assert len(before) / len(before + after) == pytest.approx(depth, abs=0.02)


@pytest.mark.parametrize("task", NEEDLES)
def test_the_numbers_asked_for_are_those_of_the_key(small, task):
    asked = build(small, task, 6000)
    said = small.decode(asked.prompt)
    needles = re.findall(r"One of the special magic numbers for ([a-z-]+) is: (\d{7})\.", said)
    [key] = re.findall(
        r"special magic numbers? for ([a-z-]+) mentioned in the provided text\?", said
    )
    assert sorted(value for name, value in needles if name == key) == sorted(asked.expected)
    assert len(needles) == {"niah_multikey": 4, "niah_multivalue": 4}.get(task, 1)
    assert all(said.count(value) == 1 for value in asked.expected)
    assert len(set(re.findall(r"\d+", said))) == len(needles)  # and no other number


def test_variables_are_those_that_a_chain_leads_to(small):
    asked = build(small, "vt", 6000)
    said = small.decode(asked.prompt)
    [_, value] = re.findall(r"assigned the value (\d+) in the text", said)
    values = {}
    for name, source in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d{5})\.", said):
        assert name not in values
        values[name] = values.get(source, source)  # a source comes before what is set to it
    assert sorted(asked.expected) == sorted(name for name in values if values[name] == value)
    assert sorted(collections.Counter(values.values()).values()) == [5, 5, 5]


@pytest.mark.parametrize(("length", "common", "others"), [(3800, 6, {1}), (20000, 30, {1, 2, 3})])
def test_words_asked_for_are_the_most_common(small, length, common, others):
    asked = build(small, "cwe", length)
    said = small.decode(asked.prompt).rpartition("appear most often.\n")[2]
    numbers, words = zip(
        *re.findall(r"(\d+)\. ([a-z]+)", said.partition("\nQuestion")[0]), strict=True
    )
    assert [int(number) for number in numbers] == list(range(1, len(numbers) + 1))
    counts = collections.Counter(words[:-7])  # the rest may be broken off
    for word in asked.expected:
        assert common - 3 <= counts.pop(word) <= common
        assert not any(word in other for other in counts)
    assert set(counts.values()) <= others


@pytest.mark.parametrize("task", KINDS)
def test_the_question_comes_last(small, task):
    asked = build(small, task, 9000)
    tail = small.decode(asked.prompt).rpartition("assistant\n")
    assert tail[0].rstrip().endswith(("?", "in the text above."))
    assert tail[2].endswith(("", "is", "are", ":"))
    assert bool(tail[2]) == (task not in ("passkey", "niah"))


@pytest.mark.parametrize("task", KINDS)
def test_equal_arguments_give_equal_prompts_and_others_give_others(small, task):
    asked = build(small, task, 9001, seed=1)
    assert build(small, task, 9001, seed=1) == asked
    others = [
        build(small, task, 9001, seed=2),
        build(small, task, 9001, sample=1, seed=1),
        build(small, task, 9002, seed=1),
    ]
    if KINDS[task].has_depth:
        others.append(build(small, task, 9001, 0.6, seed=1))
    assert len({asked.expected, *(other.expected for other in others)}) == len(others) + 1


@pytest.mark.parametrize("task", KINDS)
def test_prompts_are_the_recorded_ones(small, task):
    prompt = build(small, task, 9000, 0.3, seed=5).prompt
    assert hashlib.sha256(repr(prompt).encode()).hexdigest()[:16] == DIGESTS[task]


def test_a_prompt_does_not_depend_on_those_built_before(small):
    used = Material(small)
    for task in KINDS:
        KINDS[task].build(used, cell(task, 12000))
    for task in KINDS:
        assert KINDS[task].build(used, cell(task, 9000)) == build(small, task, 9000)


def test_needles_are_hidden_in_a_text_that_is_given(small):
    given = "\n\n".join(f"Chapter {n}. It had 7654321 words. Then, nothing!" for n in range(200))
    sentences = itertools.cycle(text.cut(given))
    material = Material(small, sentences=sentences, known=given)
    asked = KINDS["niah_multivalue"].build(material, cell("niah_multivalue", 5000))
    assert len(asked.prompt) == 5000
    said = small.decode(asked.prompt)
    assert "Chapter 0. It had 7654321 words. Then, nothing!\n\nChapter 1. It" in re.sub(
        r" One of the special magic numbers for [a-z-]+ is: \d{7}\.", "", said
    )
    assert all(said.count(value) == 1 for value in asked.expected)


def test_an_answer_is_never_one_that_a_given_text_holds(small):
    material = Material(small, known="a b c")
    assert sorted(material.draw(2, iter("aabcddae").__next__)) == ["d", "e"]


@pytest.mark.parametrize("task", KINDS)
def test_a_length_too_short_is_refused_with_what_it_takes(small, task):
    wanted = rf"length=50 is too short: the question of {task} alone takes \d+ tokens"
    with pytest.raises(TaskError, match=wanted) as error:
        build(small, task, 50)
    least = int(re.findall(r"\d+", str(error.value))[-1])
    enough = least + least // 10  # names and words of another length may be longer
    assert len(build(small, task, enough).prompt) == enough
    with pytest.raises(TaskError, match="is too short"):
        build(small, task, least - least // 10)


def test_a_grid_holds_every_cell_once_shortest_first():
    cells = catalog.grid(["niah_single", "vt"], [400, 200], [0.9, 0.1], 2)
    assert len(set(cells)) == len(cells) == 12
    assert [each.length for each in cells] == 6 * [200] + 6 * [400]
    assert {each.depth for each in cells if each.task == "vt"} == {None}


@pytest.mark.parametrize(
    ("tasks", "lengths", "depths", "samples", "named"),
    [
        (["vt", "vt"], [100], [0.5], 1, "task"),
        (["niah"], [100, 100], [0.5], 1, "length"),
        (["niah"], [100], [0.5, 0.5], 1, "depth"),
        (["niah"], [100], [1.5], 1, "depth=1.5"),
        (["niah"], [0], [0.5], 1, "length=0"),
        (["niah"], [100], [0.5], 0, "samples=0"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused_by_name(tasks, lengths, depths, samples, named):
    with pytest.raises(TaskError, match=named):
        catalog.grid(tasks, lengths, depths, samples)
