"""Arrays and copies of a compiled program, parsed from its HLO text."""

import math
import re

_FREE = {"parameter", "bitcast", "get-tuple-element"}  # these allocate nothing
_HANDED_ON = {"tuple", "while", "conditional", "call", "opt-barrier", "copy-done"}
_UPDATE = "dynamic-update-slice"
_INSTRUCTION = re.compile(r" +(ROOT )?%?(\S+) = (\(.*?\)|\S+) ([\w-]+)\(([^)]*)\)(.*)")


def sizes(text: str, *opcodes: str) -> set[int]:
    """Returns the element counts of arrays created by `opcodes`, or by any allocating operation."""
    found = re.findall(r"= \w+\[([\d,]+)\]\S* ([\w-]+)\(", text)
    return {
        math.prod(map(int, dims.split(",")))
        for dims, opcode in found
        if (opcode in opcodes if opcodes else opcode not in _FREE)
    }


def copies(text: str, cache: tuple[int, ...]) -> list[str]:
    """Returns opcode and shape of operations that create an array as large as a cache or its layer.

    Updates of a slice of an existing array are excluded, alone or at the end of a fusion: if they
    cannot be done in place, the compiler copies the array in a separate operation.

    Args:
        cache: shape of one of the cache's arrays on a device, layers first.
    """
    large = {math.prod(cache), math.prod(cache[1:])}
    found: set[str] = set()
    ends: dict[str, str] = {}  # opcode by which each computation makes its result
    name, opcodes = "", {}
    for line in text.splitlines():
        if not line.startswith(" "):
            name, opcodes = line.split(" ")[0].removeprefix("%"), {}
        if (parsed := _INSTRUCTION.match(line)) is None:
            continue
        root, made, result, opcode, operands, rest = parsed.groups()
        called = re.search(r"calls=%?([\w.-]+)", rest)
        if opcode == "fusion" and called and ends[called[1]] == _UPDATE:
            opcode = _UPDATE
        if opcode in {"bitcast", "tuple"}:
            origins = {opcodes.get(each) for each in re.findall(r"%([\w.-]+)", operands)}
            opcodes[made] = _UPDATE if origins == {_UPDATE} else opcode
        else:
            opcodes[made] = opcode
        if root:
            ends[name] = opcodes[made]
        for dims in re.findall(r"\[([\d,]+)\]", result):
            count = math.prod(map(int, dims.split(",")))
            if count in large and opcode not in _FREE | _HANDED_ON | {_UPDATE}:
                found.add(f"{opcode} {dims}")
    return sorted(found)
