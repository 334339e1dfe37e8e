"""eval: retrieval scores by prompt length and depth."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from qwen_jax.cli import command, evaluate, quantities, scores, variants
from qwen_jax.cli.flags import Json, ModelArgument, ModelFlags, Reads, not_one_of, option
from qwen_jax.cli.on_hosts import expand_on_hosts
from qwen_jax.cli.profile import profiled
from qwen_jax.cli.quantities import split
from qwen_jax.config import ConfigError
from qwen_jax.distributed import multihost
from qwen_jax.eval import catalog
from qwen_jax.eval.log import Log
from qwen_jax.eval.tasks import Cell
from qwen_jax.llm import documents
from qwen_jax.llm.documents import DocumentError
from qwen_jax.llm.model import open_model
from qwen_jax.llm.options import Within, check_number

app = command.App("Measure what a model still finds in long texts.")

_COMMON_HELP = """
Each length is that of the whole prompt, exactly. Answers are greedy. With --out every
answer is kept as it comes, and the same command goes on where it was stopped.
--compare rope,dca,sparse asks the same without Dual Chunk Attention, with it, and with
sparse prefill too, and shows them side by side.
"""


def _depths(text: str) -> list[float]:
    """Parses comma-separated numbers from 0 to 1, the value of `--depths`."""
    found = []
    for each in split("--depths", text):
        try:
            found.append(float(each))
        except ValueError:
            raise ConfigError(f"--depths {each!r} must be a number from 0 to 1") from None
    check_number("--depths", found, [Within(0, 1)])
    return found


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GridFlags:
    """Flags of every task: cells, log of answers, output."""

    lengths: Annotated[
        str,
        typer.Option(help="Prompt lengths in tokens; 1K is 1,024, 1M is 1,048,576, 1k is 1,000."),
        Reads(quantities.lengths),
    ] = "2k,4k,8k"
    depths: Annotated[
        str,
        typer.Option(help="Where the needle lies, from 0 (first) to 1 (last)."),
        Reads(_depths),
    ] = "0.1,0.5,0.9"
    samples: Annotated[
        int, typer.Option(help="Questions per length, task and depth."), Within(1)
    ] = 1
    seed: Annotated[int, typer.Option(help="The same seed gives the same prompts."), Within(0)] = 0
    compare: Annotated[
        str | None, option("Ways to run the model, of rope, dca and sparse.", metavar="NAMES")
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(help="A file that keeps the answers, one JSON object a line.", metavar="FILE"),
    ] = None
    json: Json = False

    def cells(self, tasks: list[str]) -> list[Cell]:
        """Returns all cells.

        Raises:
            ConfigError: if a value is malformed, out of range or given twice.
        """
        return catalog.grid(
            tasks,
            quantities.lengths(self.lengths),
            _depths(self.depths),
            self.samples,
        )

    def compared(self) -> list[str]:
        """Returns the variants to compare; [] to run the model by its flags.

        Raises:
            ConfigError: if a name is empty.
        """
        return [] if self.compare is None else split("--compare", self.compare)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TextFlags:
    """Flags of tasks that hide needles in a text."""

    text: Annotated[
        list[Path] | None,
        option("A text to hide things in; may be given repeatedly.", metavar="FILE"),
    ] = None

    def read(self) -> str | None:
        """Reads the text; None if it is to be generated.

        Raises:
            DocumentError: if a file holds no text or cannot be read.
        """
        texts = []
        for path in self.text or ():
            texts.append(documents.read_text(path))
            if not texts[-1].strip():
                raise DocumentError(f"{path}: it is empty")
        return "\n\n".join(texts) or None


@expand_on_hosts
@profiled
def passkey(model: ModelArgument, model_flags: ModelFlags, grid_flags: GridFlags):
    """Hide five digits in filler and ask for them, over lengths and depths.

    Answers are right if they contain the digits.

    Examples:
        qwen-jax eval passkey ckpt/7b-1m --lengths 32k,128k,512k --depths 0.1,0.5,0.9
        qwen-jax eval passkey demo --lengths 8k,12k --samples 3 --dca off --out off.jsonl

    Raises:
        ConfigError, DocumentError, RequestError: see `_run`.
    """
    _run("passkey", list(catalog.FAMILIES["passkey"]), model, model_flags, grid_flags)


@expand_on_hosts
@profiled
def niah(
    model: ModelArgument, model_flags: ModelFlags, grid_flags: GridFlags, text_flags: TextFlags
):
    """Hide a sentence in prose and ask for the number in it, over lengths and depths.

    The prose is made up, no sentence twice, or that of --text. Answers are right if they
    contain the number.

    Examples:
        qwen-jax eval niah ckpt/7b-1m --lengths 128k,1m --compare rope,dca,sparse --out niah.jsonl
        qwen-jax eval niah demo --lengths 4k --text book.txt

    Raises:
        ConfigError, DocumentError, RequestError: see `_run`.
    """
    _run("niah", list(catalog.FAMILIES["niah"]), model, model_flags, grid_flags, text_flags)


@expand_on_hosts
@profiled
def ruler(
    model: ModelArgument,
    model_flags: ModelFlags,
    grid_flags: GridFlags,
    text_flags: TextFlags,
    tasks: Annotated[str | None, option("Which tasks; all of them.", metavar="NAMES")] = None,
):
    """Ask tasks of RULER: needles, chains of variables, common words.

        niah_single      a number in prose, at each of --depths
        niah_multikey    a number among three that belong to other words
        niah_multivalue  four numbers of one word
        vt               the variables that hold a value, each set to the one before
        cwe              the ten most common words of a list

    An answer scores the share of the expected numbers, names or words that it contains.

    Examples:
        qwen-jax eval ruler ckpt/7b-1m --lengths 32k,128k --samples 10 --out ruler.jsonl
        qwen-jax eval ruler demo --lengths 4k,8k --tasks vt,cwe --compare rope,dca

    Raises:
        ConfigError, DocumentError, RequestError: see `_run`.
    """
    known = list(catalog.FAMILIES["ruler"])
    chosen = known if tasks is None else split("--tasks", tasks)
    for task in chosen:
        if task not in known:
            raise ConfigError(not_one_of("--tasks", task, known))
    _run("ruler", chosen, model, model_flags, grid_flags, text_flags)


app.verb("passkey", _COMMON_HELP)(passkey)
app.verb("niah", _COMMON_HELP)(niah)
app.verb("ruler", _COMMON_HELP)(ruler)


def _run(
    family: str,
    tasks: list[str],
    directory: Path,
    model_flags: ModelFlags,
    flags: GridFlags,
    text_flags: TextFlags | None = None,
) -> None:
    """Runs the cells that are not in the log, and prints all scores.

    Raises:
        ConfigError: if a flag cannot be used, or `--out` holds something else.
        DocumentError: if a text cannot be used.
        RequestError: if the longest prompt does not fit the model.
    """
    cells, names = flags.cells(tasks), flags.compared()
    given = multihost.broadcast_json(text_flags.read) if text_flags else None
    opened = open_model(directory, model_flags)
    models = variants.models(opened, names)
    material = evaluate.material(opened, cells, seed=flags.seed, given=given)
    settings = evaluate.settings(family, opened, flags.seed, given, dense_to=0 if names else None)
    log = Log(flags.out, settings) if flags.out and multihost.is_first() else None
    results = evaluate.results(models, cells, material, log)
    if not multihost.is_first():
        return
    if flags.json:
        scores.print_json(settings, results)
    elif family == "ruler" or names:
        scores.print_by_variant(results)
    else:
        scores.print_by_depth(results)
