"""What a compiled program holds, read off its text."""

import math
import re

_FREE = {"parameter", "bitcast", "get-tuple-element"}  # these allocate nothing


def sizes(text: str, *opcodes: str) -> set[int]:
    """Elements of every array that an operation makes: one of `opcodes`, or any that allocates."""
    found = re.findall(r"= \w+\[([\d,]+)\]\S* ([\w-]+)\(", text)
    return {
        math.prod(map(int, dims.split(",")))
        for dims, opcode in found
        if (opcode in opcodes if opcodes else opcode not in _FREE)
    }
