"""Scores as tables and as JSON."""

import json
import sys
from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from qwen_jax.cli.console import console
from qwen_jax.eval.score import Mean, Result, mean


def print_json(settings: Mapping[str, Any], results: list[Result]) -> None:
    """Prints a JSON object: the settings, and the mean score of each cell over its samples."""
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        cell = result.cell
        groups.setdefault((cell.task, cell.length, cell.depth, result.variant), []).append(result)
    cells = []
    for key, group in groups.items():
        found = mean(group)
        cell = dict(zip(("task", "length", "depth", "variant"), key, strict=True))
        cell |= {"score": found.score, "asked": found.asked}
        if found.density is not None:
            cell |= {"density": found.density, "recall": found.recall}
        cells.append(cell)
    json.dump({**settings, "cells": cells}, sys.stdout)
    print()


def print_by_depth(results: list[Result]) -> None:
    """Prints the number of right answers by length and depth, for scores of 0 or 1."""
    lengths = sorted({result.cell.length for result in results})
    depths = sorted({result.cell.depth or 0 for result in results})
    table = _table("right answers")
    table.add_column("tokens", justify="right")
    for depth in depths:
        table.add_column(f"depth {depth:g}", justify="right")
    table.add_column("all", justify="right")
    for length in lengths:
        row = [result for result in results if result.cell.length == length]
        at = [[result for result in row if result.cell.depth == depth] for depth in depths]
        table.add_row(f"{length:,}", *(_count(mean(group)) for group in (*at, row)))
    console().print(table)
    _print_sparseness(results)


def print_by_variant(results: list[Result]) -> None:
    """Prints mean scores, a row for each length and task and a column for each variant."""
    variants = list(dict.fromkeys(result.variant for result in results))
    tasks = list(dict.fromkeys(result.cell.task for result in results))
    table = _table("mean scores in %")
    table.add_column("tokens", justify="right")
    if len(tasks) > 1:
        table.add_column("task")
    table.add_column("asked", justify="right")
    for variant in variants:
        table.add_column(variant or "score", justify="right")
    for length in sorted({result.cell.length for result in results}):
        rows = {}
        for task in tasks:
            here = [
                each for each in results if (each.cell.length, each.cell.task) == (length, task)
            ]
            rows[task] = [mean(each for each in here if each.variant == name) for name in variants]
        for task, found in rows.items():
            names = [task] if len(tasks) > 1 else []
            cells = [_percent(each.score) for each in found]
            table.add_row(f"{length:,}", *names, str(found[0].asked), *cells)
        if len(tasks) > 1:
            scores = [
                [each.score for each in column] for column in zip(*rows.values(), strict=True)
            ]
            averages = [_percent(sum(each) / len(tasks)) for each in scores]
            table.add_row(f"{length:,}", "mean of tasks", "", *averages)
    console().print(table)
    _print_sparseness(results)


def _print_sparseness(results: list[Result]) -> None:
    """Prints density and recall of each variant whose prompts were prefilled sparsely."""
    for variant in dict.fromkeys(result.variant for result in results):
        found = mean(result for result in results if result.variant == variant)
        if found.density is not None:
            console().print(
                f"{variant or 'prefill'}: {found.density:.1%} of the attention computed, "
                f"{found.recall:.1%} of it found (means)"
            )


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, pad_edge=False)


def _count(found: Mean) -> Text:
    return _colored(found.score, f"{found.total:g}/{found.asked}")


def _percent(score: float) -> Text:
    return _colored(score, f"{100 * score:.1f}")


def _colored(score: float, text: str) -> Text:
    color = "green" if score == 1 else "red" if score == 0 else "yellow"
    return Text(text, color)
