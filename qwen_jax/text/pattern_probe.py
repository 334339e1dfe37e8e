"""Probe of a pre-tokenizer on texts that are hard for regular expressions.

`files.limited` runs this file in a child: such a pattern may backtrack without end, or panic.
"""

import json
import signal
from typing import Any

_CHARACTERS = 1 << 16
_SECONDS = 1.0  # processor time for one text; patterns of linear time take a twentieth of it
_UNITS = (*" \t\naA1_é漢🙂!'.\u0301\u200d", "\r\n", "ab", "a ", "a1", "a'", "1,", " !", "aA")
_MINED = 40


def prepare() -> None:
    """Imports the tokenizer library while files can still be opened."""
    import tokenizers  # noqa: F401


def answer(tokenizer: dict[str, Any]) -> None:
    """Encodes long runs of characters, including those of the patterns; is killed if that hangs.

    Args:
        tokenizer: a `tokenizer.json` with the steps in question and a small vocabulary.
    """
    from tokenizers import Tokenizer

    model = Tokenizer.from_str(json.dumps(tokenizer))
    spelled = dict.fromkeys(json.dumps(tokenizer["pre_tokenizer"], ensure_ascii=False))
    for unit in dict.fromkeys((*_UNITS, *list(spelled)[:_MINED])):
        run = unit * (_CHARACTERS // len(unit))
        for text in (run, f"{run}\0"):
            # The signal's own action ends the process: nothing else interrupts the library.
            signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
            model.encode(text, add_special_tokens=False)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
