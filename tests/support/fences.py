"""Fenced blocks of README and docs, and what their info strings say.

```sh                 runs, and ends with 0
```sh needs=tpu       does not run here; NEEDS has the words
```console            lines after `$ ` run; the others are their output, which is compared
```console model=7b   ckpt/7b-1m is the config.json of the published model, not the tiny one
```console output=sample   output is not compared
```text, ```json, ...  does not run
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDS = (
    "demo-model docker gcloud gpu gpu-compiler hosts large-model network slurm tpu tpu-compiler"
).split()
RUN, SHOWN = ("sh", "console", "python"), ("text", "json", "mermaid", "yaml", "toml")


@dataclasses.dataclass(frozen=True, slots=True)
class Fence:
    """A fenced block.

    Attributes:
        where: file and line, for messages.
        language: first word of the info string.
        options: the others, `key=value`.
    """

    where: str
    language: str
    options: dict[str, str]
    text: str

    def commands(self) -> list[tuple[str, str]]:
        """Shell commands of a console, each with the output that follows it."""
        found: list[tuple[str, str]] = []
        for part in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]:
            words, _, output = re.sub(r"\\\n", "\0", part).partition("\n")
            found.append((words.replace("\0", "\\\n"), output))
        return found


def pages() -> list[Path]:
    """The pages that users read."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def fences(page: Path) -> Iterator[Fence]:
    """The fenced blocks of a page, in order."""
    lines = page.read_text().split("\n")
    number = 0
    while number < len(lines):
        if lines[number].startswith("```"):
            info, begin = lines[number][3:].split(), number
            number = lines.index("```", number + 1)
            yield Fence(
                f"{page.relative_to(ROOT)}:{begin + 1}",
                info[0] if info else "",
                dict(word.partition("=")[::2] for word in info[1:]),
                "\n".join(lines[begin + 1 : number]) + "\n",
            )
        number += 1
