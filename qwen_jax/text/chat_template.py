"""What the chat template of a checkpoint does with conversations, found out by trying it."""

import dataclasses
import functools
from collections.abc import Mapping

from qwen_jax.files import limited
from qwen_jax.text import template_probe
from qwen_jax.text.template_probe import EMPTY, GIVEN, NONE

TEMPLATE_BYTES = 256 << 10
"""Largest chat template; those of published models have up to 30 kB."""
CPU_SECONDS = 10
"""Processor time that a template may take for all probe conversations together."""
SPECIAL_NAMES = tuple(f"{name}_token" for name in "bos eos unk sep pad cls mask".split())
"""Names by which templates know special tokens."""

_LISTS = ("additional_special_tokens", "extra_special_tokens")  # known to some versions only


@dataclasses.dataclass(frozen=True, slots=True)
class Chat:
    """How far a chat template is ChatML.

    Attributes:
        default: system text that it puts before conversations that bring none, or None.
        faults: why conversations of a kind (`template_probe.kind`) are no ChatML, by kind.
    """

    default: str | None
    faults: Mapping[str, str]


def examine(template: str, variables: Mapping[str, str | None]) -> Chat:
    """Compares a chat template with ChatML, once for each content.

    The comparison runs in a child with limits (`limited`); its result is kept in a cache.

    Args:
        template: in jinja, at most `TEMPLATE_BYTES` long.
        variables: special tokens by name, as far as the checkpoint says them; None for none.
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
