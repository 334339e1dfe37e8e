"""Pass key prompts: exact in length, right in depth, the same every time."""

import pytest
from vocabularies import byte_level, save, small_vocabulary

from qwen_jax.eval import tasks
from qwen_jax.eval.tasks import Cell, TaskError
from qwen_jax.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(save(byte_level(*small_vocabulary()), tmp_path_factory.mktemp("small")))


@pytest.mark.parametrize("length", [700, 701, 702, 703, 704, 705, 706, 1999, 6000])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_prompt_has_exactly_its_length(tokenizer, length, depth):
    task = tasks.passkey(tokenizer, Cell(length=length, depth=depth))
    assert len(task.prompt) == length


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_key_lies_at_its_depth_in_the_filler(tokenizer, depth):
    task = tasks.passkey(tokenizer, Cell(length=8000, depth=depth))
    text = tokenizer.decode(task.prompt)
    needle = f"The pass key is {task.expected}. Remember it. {task.expected} is the pass key."
    assert text.count(needle) == 1
    assert text.count(task.expected) == 2
    before, after = text.split(needle)
    before = before.partition("there.\n\n")[2]
    after = after.partition("\n\nWhat is")[0]
    assert len(before) / len(before + after) == pytest.approx(depth, abs=0.01)


def test_the_question_comes_last_in_the_turn_of_the_user(tokenizer):
    task = tasks.passkey(tokenizer, Cell(length=900, depth=0.5))
    tail = [*tokenizer.encode_text("What is the number of the pass key?"), *tokenizer.close_turn()]
    tail += tokenizer.open_answer()
    assert list(task.prompt[-len(tail) :]) == tail


def test_equal_arguments_give_equal_prompts_and_others_give_others(tokenizer):
    cell = Cell(length=900, depth=0.5)
    task = tasks.passkey(tokenizer, cell, seed=1)
    assert tasks.passkey(tokenizer, cell, seed=1) == task
    others = [
        tasks.passkey(tokenizer, cell, seed=2),
        tasks.passkey(tokenizer, Cell(length=900, depth=0.5, sample=1), seed=1),
        tasks.passkey(tokenizer, Cell(length=901, depth=0.5), seed=1),
        tasks.passkey(tokenizer, Cell(length=900, depth=0.6), seed=1),
    ]
    assert len({task.expected, *(other.expected for other in others)}) == 5


def test_a_length_too_short_for_the_question_is_refused(tokenizer):
    with pytest.raises(TaskError, match=r"length=50 is too short: the question alone takes \d+"):
        tasks.passkey(tokenizer, Cell(length=50, depth=0.5))


def test_a_grid_holds_every_cell_once_shortest_first():
    cells = tasks.grid([400, 200], [0.9, 0.1], 2)
    assert len(set(cells)) == len(cells) == 8
    assert cells == sorted(cells)


@pytest.mark.parametrize(
    ("lengths", "depths", "samples", "named"),
    [
        ([100, 100], [0.5], 1, "length"),
        ([100], [0.5, 0.5], 1, "depth"),
        ([100], [1.5], 1, "depth=1.5"),
        ([0], [0.5], 1, "length=0"),
        ([100], [0.5], 0, "samples=0"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused_by_name(lengths, depths, samples, named):
    with pytest.raises(TaskError, match=named):
        tasks.grid(lengths, depths, samples)
