"""What a compiled program holds, read off its text."""

import math
import re

_FREE = {"parameter", "bitcast", "get-tuple-element"}  # these allocate nothing
_HANDED_ON = {"tuple", "while", "conditional", "call", "opt-barrier", "copy-done"}
_UPDATE = "dynamic-update-slice"
_INSTRUCTION = re.compile(r" +(ROOT )?%?(\S+) = (\(.*?\)|\S+) ([\w-]+)\(([^)]*)\)(.*)")


def sizes(text: str, *opcodes: str) -> set[int]:
    """Elements of every array that an operation makes: one of `opcodes`, or any that allocates."""
    found = re.findall(r"= \w+\[([\d,]+)\]\S* ([\w-]+)\(", text)
    return {
        math.prod(map(int, dims.split(",")))
        for dims, opcode in found
        if (opcode in opcodes if opcodes else opcode not in _FREE)
    }


def copies(text: str, cache: tuple[int, ...]) -> list[str]:
    """Opcode and shape of what makes an array as large as a cache or one of its layers.

    Not of what writes a slice into an array that is there, alone or at the end of a fusion: where
    that cannot be done in place, the compiler copies the array in an operation of its own.

    Args:
        cache: the shape of one of its arrays on a device, layers first.
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
