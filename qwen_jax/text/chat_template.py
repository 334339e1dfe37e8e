"""Examination of a checkpoint's chat template: comparison with ChatML by running it."""

import dataclasses
import functools
from collections.abc import Mapping

from qwen_jax.files import limited
from qwen_jax.text import template_probe
from qwen_jax.text.template_probe import EMPTY, GIVEN, NONE

TEMPLATE_BYTES = 256 << 10
"""Maximum size of a chat template in bytes; those of published models have up to 30 kB."""
CPU_SECONDS = 10
"""CPU time in seconds that a template may take for all probe conversations together."""
SPECIAL_NAMES = tuple(f"{name}_token" for name in "bos eos unk sep pad cls mask".split())
"""Names of special tokens in templates."""

_LISTS = ("additional_special_tokens", "extra_special_tokens")  # known to some versions only


@dataclasses.dataclass(frozen=True, slots=True)
class Chat:
    """Result of comparing a chat template with ChatML.

    Attributes:
        default: system prompt that it adds to conversations without one; None if it adds none.
        faults: reason why conversations of a kind (`template_probe.kind`) are not ChatML, by
            kind; kinds that are ChatML are missing.
    """

    default: str | None
    faults: Mapping[str, str]


def examine(template: str, variables: Mapping[str, str | None]) -> Chat:
    """Compares a chat template with ChatML.

    The comparison runs in a limited child process (`files.limited`), and its result is cached.

    Args:
        template: Jinja template of at most `TEMPLATE_BYTES`.
        variables: special tokens by name, as far as the checkpoint defines them; None for a name
            that is defined as none.
    """
    return examined(template, tuple(sorted(variables.items())))


@functools.lru_cache(maxsize=8)
def examined(template: str, variables: tuple[tuple[str, str | None], ...]) -> Chat:
    """As `examine`, by variables in order; kept in this process."""
    arguments = {
        "template": template,
        "variables": {name: value for name, value in variables if value is not None},
        "unsaid": sorted({*SPECIAL_NAMES, *_LISTS}.difference(name for name, _ in variables)),
    }
    try:
        said = limited.answer(
            template_probe,
            arguments,
            library="jinja2",
            cpu_seconds=CPU_SECONDS,
            cache="templates",
        )
    except limited.ProbeError as error:
        return Chat(None, dict.fromkeys((GIVEN, EMPTY, NONE), str(error)))
    return Chat(said["default"], said["faults"])
