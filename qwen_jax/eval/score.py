"""Runs the cells of a grid through an engine, greedily, and scores the answers."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

from qwen_jax.engine.data_parallel import Replicas
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.request import Request, RequestError, Sparseness
from qwen_jax.eval.catalog import KINDS
from qwen_jax.eval.tasks import Cell, Task
from qwen_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Answer of a model in a cell.

    Attributes:
        variant: name of the model's settings, if several are compared.
        expected: strings that a right answer contains.
        sparse: density and recall of the prompt's sparse prefill; None if it was dense.
    """

    cell: Cell
    variant: str | None = None
    expected: tuple[str, ...]
    answer: str
    sparse: Sparseness | None = None

    @property
    def score(self) -> float:
        """Fraction of the expected strings that the answer contains, ignoring case."""
        answer = self.answer.lower()
        return sum(text.lower() in answer for text in self.expected) / len(self.expected)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """Mean score of results, with density and recall of their prompts' sparse prefill.

    Attributes:
        total: sum of the scores.
        asked: number of results.
        density: computed pairs of query and key as a fraction of the causal ones.
        recall: attention mass of the computed pairs as a fraction of all, averaged over tokens.
    """

    total: float
    asked: int
    density: float | None = None
    recall: float | None = None

    @property
    def score(self) -> float:
        """Mean score, from 0 to 1."""
        return self.total / self.asked


def run(
    engine: Engine | Replicas,
    tokenizer: Tokenizer,
    cells: Iterable[Cell],
    build: Callable[[Cell], Task],
    *,
    eos_ids: tuple[int, ...],
    variant: str | None = None,
    on_tokens: Callable[[int], None] = lambda read: None,
) -> Iterator[Result]:
    """Runs and yields the result of each cell, one cell at a time.

    Args:
        on_tokens: called after each step with the tokens read of the cell's prompt.

    Raises:
        RequestError: if a prompt does not fit the engine.
    """
    for cell in cells:
        task = build(cell)
        request = Request(
            prompt=task.prompt, max_new_tokens=KINDS[cell.task].max_new_tokens, eos_ids=eos_ids
        )
        ids, sparse = _answer(engine, request, on_tokens)
        yield Result(
            cell=cell,
            variant=variant,
            expected=task.expected,
            answer=tokenizer.decode(ids),
            sparse=sparse,
        )


def _answer(
    engine: Engine | Replicas, request: Request, on_tokens: Callable[[int], None]
) -> tuple[list[int], Sparseness | None]:
    engine.add(request)
    ids: list[int] = []
    sparse = None
    while engine.busy:
        for event in engine.step():
            if event.error is not None:
                raise RequestError(event.error)
            ids.extend(event.tokens)
            sparse = event.sparse
            on_tokens(event.prefilled)
    return ids, sparse


def mean(results: Iterable[Result]) -> Mean:
    """Averages results, of which there must be at least one.

    A prefix that prompts share counts once in density and recall.
    """
    results = list(results)
    sparse = [result.sparse for result in results if result.sparse is not None]
    return Mean(
        total=sum(result.score for result in results),
        asked=len(results),
        density=_weighted([(each.density, each.pairs) for each in sparse]),
        recall=_weighted([(each.recall, each.tokens) for each in sparse]),
    )


def _weighted(values: list[tuple[float, int]]) -> float | None:
    weight = sum(weight for _, weight in values)
    return sum(value * weight for value, weight in values) / weight if weight else None
