"""KV sessions: the answers of an undivided prompt, or a refusal; nothing is computed twice."""

import errno
import fcntl
import io
import json
import os
import shutil
import signal
from pathlib import Path

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from safetensors.numpy import save_file
from support.kept import PREFILL, TEXT, checksums, content, sign, sums
from support.tiny_model import random_weights

from qwen_jax.cli import main
from qwen_jax.distributed import multihost
from qwen_jax.engine import memory as budget
from qwen_jax.engine.engine import Engine
from qwen_jax.llm import sessions
from qwen_jax.llm.model import Model
from qwen_jax.storage import atomic, kv_session, orbax_io
from qwen_jax.text.tokenizer import Tokenizer

GREEDY = ["--greedy", "--max-new-tokens", 8]
# Of the cut points those that the default suite tries; the others are `long`.
SHORT = {("before a slice", 6), ("in a window", 2), ("in a file", 1), ("before renaming a file", 4)}
DCA = ["--dca", "on", "--dca-chunk", 256, "--dca-local", 64, "--dca-original", 300]
SPARSE = ["--sparse", "on", "--dense-tail", 50, "--sparse-config"]


@pytest.fixture
def asked(monkeypatch):
    """The prompts that engines, which are checksums, are asked."""
    prompts, add = [], Engine.add

    def remember(self, request):
        prompts.append(request.prompt)
        return add(self, request)

    monkeypatch.setattr(Engine, "add", remember)
    with checksums():
        yield prompts


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def budgets(tmp_path_factory):
    path = tmp_path_factory.mktemp("budgets") / "b.json"
    row = {str(head): ["vertical_and_slash", 30, 40, 1] for head in range(4)}
    path.write_text(json.dumps([row, row]))
    return path


@pytest.fixture(scope="module")
def made(tiny, text, budgets, tmp_path_factory):
    """Sessions that no test changes, by kind, and the flags that they were made with."""
    folder = tmp_path_factory.mktemp("made")
    kinds = {
        "dense": ["--file", text],
        "raw": ["--prompt-file", text],
        "dca": ["--file", text, *DCA],
        "sparse": ["--file", text, *SPARSE, budgets],
    }
    with checksums():
        for name, flags in kinds.items():
            arguments = ["prefill", tiny, "--out", folder / name, *PREFILL, *flags]
            assert main([str(argument) for argument in arguments]) == 0
    return folder


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return Tokenizer.load(tiny)


@pytest.fixture(scope="module")
def dense(made):
    found = kv_session.read(made / "dense")
    return sessions.Kept(directory=made / "dense", session=found, tokens=())


@pytest.fixture
def kept(made, tmp_path):
    """A copy of a session that a test may spoil."""
    return lambda name: Path(shutil.copytree(made / name, tmp_path / name))


@pytest.fixture
def prefill(tiny, text, tmp_path, run):
    """Runs `prefill` of the text into tmp_path/kv."""
    return lambda *more: run(
        "prefill", tiny, "--file", text, "--out", tmp_path / "kv", *PREFILL, *more
    )


def error(result):
    """The one line of a refusal."""
    code, out, err = result
    assert (code, out) == (2, "")
    (line,) = [each for each in err.splitlines() if each.startswith("error: ")]
    assert err.endswith(f"{line}\n")
    return line


@pytest.mark.parametrize("question", ["Why?", "Who\nis it?", "  so?", "\n\nthen", "<|im_end|>"])
def test_a_question_after_a_session_is_the_whole_prompt(tiny, text, made, asked, run, question):
    whole = run("ask", tiny, question, "--file", text, *GREEDY)
    after = run("ask", tiny, question, "--kv", made / "dense", *GREEDY)
    assert whole[:2] == after[:2]
    assert whole[0] == 0
    assert asked[0] == asked[1]
    read = len(kv_session.read_tokens(made / "dense", kv_session.read(made / "dense")))
    assert f"({read:,} from the cache)" in after[2]


def test_files_and_a_system_text_are_those_of_the_session(tiny, tmp_path, asked, run):
    (tmp_path / "a.txt").write_text("Ants. \n")
    (tmp_path / "b.txt").write_text("Bees")
    given = ["--file", tmp_path / "b.txt", "--file", tmp_path / "a.txt", "--system", "Be brief."]
    code, _, _ = run("prefill", tiny, *given, "--out", tmp_path / "kv")
    assert code == 0
    assert asked.pop() == kv_session.read_tokens(tmp_path / "kv", kv_session.read(tmp_path / "kv"))
    whole = run("ask", tiny, "Who?", *given, *GREEDY)
    after = run("ask", tiny, "Who?", "--kv", tmp_path / "kv", *GREEDY)
    assert whole[:2] == after[:2]
    assert asked[0] == asked[1]
    assert "b.txt" in after[2]


@given(text=st.text("th er\n\t.1é\u0301明<|'", max_size=12), question=st.text("th \n.1\u0301"))
@settings(deadline=None, max_examples=100)
def test_no_text_and_question_become_other_tokens_when_divided(tokenizer, dense, text, question):
    question = question.strip()  # as `ask` and `chat` do
    divided = [*tokenizer.open_turn("user", f"{text}\n\n"), *dense.question(tokenizer, question)]
    whole = tokenizer.encode_turn("user", f"{text}\n\n{question}")
    assert divided == [*whole, *tokenizer.open_answer()]


def test_a_conversation_goes_on_after_a_session_and_resets_to_it(
    tiny, made, asked, tokenizer, monkeypatch, run
):
    lines = "One?\nTwo?\n/reset\nOne?\n/tokens\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    code, out, err = run("chat", tiny, "--kv", made / "dense", *GREEDY)
    assert code == 0
    first, _, again = out.splitlines()
    assert first == again
    whole = tokenizer.encode_chat([{"role": "user", "content": f"{TEXT}\n\nOne?"}])
    assert asked[0] == asked[2] == tuple(whole)
    assert asked[1][: len(whole)] == asked[0]
    turn = [*tokenizer.close_turn(), *tokenizer.encode_turn("user", "Two?")]
    assert list(asked[1][len(whole) + 8 :]) == [*turn, *tokenizer.open_answer()]
    assert "tokens of " in err.splitlines()[-1]


def test_raw_ids_go_on_like_an_undivided_prompt(tiny, tmp_path, asked, run):
    ids = [number % 97 for number in range(1100)]
    for name, part in {"whole": ids, "first": ids[:-5], "rest": ids[-5:]}.items():
        (tmp_path / name).write_text(json.dumps(part))
    flags = [*GREEDY, "--json", "--ignore-eos"]
    _, whole, _ = run("generate", tiny, "--tokens", tmp_path / "whole", *flags)
    more = ["--out", tmp_path / "kv", "--save-every", 1]
    assert run("prefill", tiny, "--tokens", tmp_path / "first", "--slice", 300, *more)[0] == 0
    flags += ["--kv", tmp_path / "kv"]
    code, after, _ = run("generate", tiny, "--tokens", tmp_path / "rest", *flags)
    assert code == 0
    assert json.loads(after)["token_ids"] == json.loads(whole)["token_ids"]
    assert json.loads(after)["timings"]["computed_tokens"] == 5


@pytest.mark.parametrize("kind", ["dca", "sparse"])
def test_a_session_is_used_as_it_was_made(tiny, made, budgets, asked, kind, run):
    flags = {"dca": DCA, "sparse": [*SPARSE, budgets]}[kind]
    several = [["ask", tiny, "--kv", made / kind, *GREEDY, *flags, f"Q{n % 2}"] for n in range(3)]
    (code, first, err), (_, other, _), (_, again, _) = [run(*each) for each in several]
    assert code == 0
    assert first == again != other
    assert ("; sparse prefill: " in err) == (kind == "sparse")
    found = json.loads(run("kv", "inspect", made / kind, "--json")[1])
    assert found["complete"]
    assert (found["sparse"] is not None) == (kind == "sparse")
    shown = " ".join(run("kv", "inspect", made / kind)[1].split())
    assert {"dca": "chunk 256, local 64, original 300", "sparse": "sparse: "}[kind] in shown
    code, out, _ = run("kv", "verify", made / kind)
    assert code == 0
    assert "is intact" in out


def test_a_converted_model_reads_the_sessions_of_its_source(tiny, text, made, tmp_path, asked, run):
    assert run("convert", tiny, tmp_path / "ours")[0] == 0
    after = run("ask", tmp_path / "ours", "Why?", "--kv", made / "dense", *GREEDY)
    assert after[:2] == run("ask", tiny, "Why?", "--file", text, *GREEDY)[:2]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def largest(folder):
    """The file with a window's data."""
    return max((path for path in folder.rglob("*") if path.is_file()), key=os.path.getsize)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def edit(directory, old, new):
    path = directory / "session.json"
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))


def move(path):
    """Puts a link in the place of a path."""
    root = next(folder for folder in path.parents if (folder / "lock").exists())
    elsewhere = path.rename(root.with_name("elsewhere"))
    path.symlink_to(elsewhere)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


DATA = "window_000001"
FILES = 10  # of a window
# What is done to a directory, and what the error says; the file is named by its end.
SPOILED = {
    "no session": (shutil.rmtree, "is not a KV session, it has no session.json"),
    "no manifest": (lambda d: (d / "session.json").unlink(), "it has no session.json: make one"),
    "an edited manifest": (
        lambda d: edit(d, '"stop": 256', '"stop": 255'),
        "session.json is damaged or was edited: prefill again with --overwrite",
    ),
    "an edited checksum": (lambda d: edit(d, '"sha256": "', '"sha256": "0'), "was edited"),
    "half a manifest": (lambda d: cut(d / "session.json"), "session.json is damaged"),
    "an empty manifest": (lambda d: (d / "session.json").write_text(""), "is damaged"),
    "a manifest that is a pipe": (lambda d: pipe(d / "session.json"), "a pipe, not a regular file"),
    "a manifest elsewhere": (lambda d: move(d / "session.json"), "a link, not a regular file"),
    "another format": (
        lambda d: sign(d, lambda body: body.update(format="qwen-jax session 2")),
        "session.json is not of the format 'qwen-jax session 1': prefill again",
    ),
    "other tokens": (lambda d: flip(d / "tokens"), "tokens is damaged: its SHA-256"),
    "fewer tokens": (lambda d: cut(d / "tokens"), "tokens is damaged"),
    "no tokens": (lambda d: (d / "tokens").unlink(), "tokens is missing"),
    "tokens that are a pipe": (lambda d: pipe(d / "tokens"), "tokens is a pipe, not a regular"),
    "tokens elsewhere": (lambda d: move(d / "tokens"), "tokens is a link, not a regular file"),
    "a flipped bit": (lambda d: flip(largest(d / DATA)), "its SHA-256 is not that of session.json"),
    "half a file": (lambda d: cut(largest(d / DATA)), "bytes instead of "),
    "a missing file": (lambda d: largest(d / DATA).unlink(), "is missing or not a file"),
    "a missing window": (lambda d: shutil.rmtree(d / DATA), "is missing or not a file"),
    "a file too many": (lambda d: (d / DATA / "x").write_text(""), "not in session.json: remove"),
    "a pipe too many": (lambda d: os.mkfifo(d / DATA / "x"), "not in session.json: remove"),
    "a file that is a pipe": (lambda d: pipe(largest(d / DATA)), "is missing or not a file"),
    "a file elsewhere": (lambda d: move(largest(d / DATA)), "is a link, a session holds"),
    "a folder elsewhere": (lambda d: move(largest(d / DATA).parent), "is a link, a session holds"),
    "a window elsewhere": (lambda d: move(d / DATA), "is a link, a session holds"),
    "not finished": (
        lambda d: sign(d, lambda body: body["windows"].pop()),
        "the `qwen-jax prefill` that began it goes on there",
    ),
}


@pytest.fixture
def nothing_allocated(monkeypatch):
    """Fails where weights or a cache would be made."""

    def fail(*_, **__):
        raise AssertionError("this was to be refused before")

    monkeypatch.setattr(Model, "engine", fail)
    monkeypatch.setattr(Model, "weights", fail)


@pytest.mark.usefixtures("nothing_allocated")
@pytest.mark.parametrize("spoiled", SPOILED)
def test_a_damaged_session_is_refused(spoiled, tiny, kept, run):
    directory = kept("dense")
    spoil, message = SPOILED[spoiled]
    spoil(directory)
    line = error(run("ask", tiny, "Why?", "--kv", directory))
    assert message in line
    assert str(directory) in line
    if spoiled != "not finished":
        assert error(run("kv", "verify", directory)) == line


@pytest.mark.usefixtures("nothing_allocated")
@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("dense", DCA, "(dca: none there, [256, 64] here): use the model and the options"),
        ("dense", ["--dtype", "bf16"], "(dtype: float32 there, bfloat16 here)"),
        ("dense", ["--vllm-parity"], "(vllm_parity: false there, true here)"),
        ("dense", ["--file", "x"], "--kv contradicts --file"),
        ("dense", ["--system", "x"], "--kv contradicts --system"),
        ("dense", ["--sparse-config", "B", "--sparse", "on"], "(sparse: none there, {"),
        ("dca", [], "(dca: [256, 64] there, none here)"),
        ("dca", ["--dca", "off"], "(dca: [256, 64] there, none here)"),
        ("dca", [*DCA, "--dca-chunk", 255], "(dca: [256, 64] there, [255, 64] here)"),
        ("dca", [*DCA, "--dca-local", 63], "(dca: [256, 64] there, [256, 63] here)"),
        ("dca", [*DCA, "--dca-original", 301], "(dca_original: 300 there, 301 here)"),
        ("sparse", [], "there, none here)"),
        ("sparse", [*SPARSE, "B"], "(sparse: {"),
        ("sparse", [*SPARSE, "OWN", "--least-recall", 0.5], '"least_recall": 0.5'),
        ("sparse", [*SPARSE, "OWN", "--dense-tail", 49], '"dense_tail": 49'),
        ("sparse", [*SPARSE, "OWN", "--sparse", "off"], "--sparse off contradicts"),
        ("raw", [], "holds raw text, after which no question can follow: use `generate`"),
    ],
)
def test_a_session_of_other_settings_is_refused(
    kind, flags, message, tiny, made, budgets, tmp_path, run
):
    (tmp_path / "b.json").write_text(budgets.read_text().replace("30", "31"))
    paths = {"B": tmp_path / "b.json", "OWN": budgets}
    flags = [paths.get(flag, flag) for flag in flags]
    line = error(run("ask", tiny, "Why?", "--kv", made / kind, *flags))
    assert message in line
    assert "contradicts" in line or str(made / kind) in line


def other_weights(model):
    save_file(random_weights(1), model / "model.safetensors", metadata={"format": "pt"})


def other_tokenizer(model):
    (model / "tokenizer.json").write_text((model / "tokenizer.json").read_text() + "\n")


@pytest.mark.usefixtures("nothing_allocated")
@pytest.mark.parametrize(
    ("change", "message"),
    [(other_weights, "(weights: "), (other_tokenizer, "(tokenizer files: ")],
)
def test_a_session_of_another_model_is_refused(change, message, model, made, text, kept, run):
    change(model)
    assert message in error(run("ask", model, "Why?", "--kv", made / "dense"))
    there = kept("dense")
    line = error(run("prefill", model, "--file", text, "--out", there, *PREFILL))
    assert message in line
    assert "name another directory or --overwrite it" in line
    assert content(there) == content(made / "dense")


DEEP = "[" * 100_000
# Places in a manifest, and what a stranger may put there.
HOSTILE = {
    "identity shape": [[2, 2], [2, 2, -8], [2.0, 2, 8], ["2", 2, 8], [1 << 40, 2, 8], None, "288"],
    "identity num_tokens": [0, -1, 1 << 60, 1e300, float("nan"), "700", True],
    "identity dtype": ["float64", ["float32"], None, "../float32"],
    "identity weights": [1, None, {}],
    "identity is_chat": [1, "yes", None],
    "identity settings": [None, [], "x", {}, {"dca": [1], "dca_original": 0, "sparse": None}],
    "identity settings dca": ["ab", [64], [64, -1], [[], []], 7],
    "identity settings dca_original": [None, "x", float("inf")],
    "identity settings sparse": [[], "x", 1],
    "identity more": [1],
    "documents": [[["x", "y"]], [[1, 2]], [["x"]], "ab", None, [["x", 1.5]]],
    "versions": [[], None, {"jax": 1}, {"jax": {"jax": {}}}],
    "sparse": [{}, [], {"density": 1}, "x"],
    "windows": [None, {}, [[]], [None], "x"],
    "windows 0 name": ["../window_000000", "window_000001", "/etc", 0, None],
    "windows 0 start": [1, -1, False, 0.5, "0", None],
    "windows 0 stop": [0, -5, 1 << 60, 256.0, float("nan"), "256", None],
    "windows 0 size": [-1024, 0, 255, 1 << 60, 1024.0, "1024", None],
    "windows 0 files": [
        {},
        [],
        {"window_000000/../../secret": {"size": 6, "sha256": ""}},
        {"window_000000/..": {"size": 6, "sha256": ""}},
        {"/etc/passwd": {"size": 6, "sha256": ""}},
        {"window_000001/x": {"size": 6, "sha256": ""}},
        {"window_000000/x\n": {"size": 6, "sha256": ""}},
        {"window_000000/x": {"size": "6", "sha256": ""}},
        {"window_000000/x": {"size": -1, "sha256": ""}},
        {"window_000000/x": {"size": 0, "sha256": None}},
        {"window_000000/x": None},
    ],
    "more": [1],
    "format": [None, 1, ["qwen-jax session 1"]],
}


def put(body, place, value):
    *folders, name = place.split()
    for folder in folders:
        body = body[int(folder) if folder.isdigit() else folder]
    body[name] = value


@pytest.mark.usefixtures("nothing_allocated", "unchecked")
@pytest.mark.parametrize("place", HOSTILE)
def test_a_manifest_of_a_stranger_is_data(place, tiny, text, kept, made, tmp_path, run):
    directory = kept("dense")
    (tmp_path / "secret").write_text("secret")
    for value in HOSTILE[place]:
        shutil.copy(made / "dense" / "session.json", directory)
        sign(directory, lambda body, value=value: put(body, place, value))
        for verb in (["ask", tiny, "Why?", "--kv", directory], ["kv", "verify", directory]):
            line = error(run(*verb))
            assert str(directory) in line, (value, line)
        assert run("kv", "inspect", directory)[0] in (0, 2)
        error(run("prefill", tiny, "--file", text, "--out", directory, *PREFILL))
    assert (tmp_path / "secret").read_text() == "secret"


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_manifest_is_said_to_be_damaged(kept, run):
    path = kept("dense") / "session.json"
    nested = '{"a":' * 900 + "1" + "}" * 900
    for body in (DEEP, DEEP + "]" * len(DEEP), nested, "null", "[]", "\xff", '{"sha256": 1}'):
        path.write_bytes(body.encode("latin-1"))
        for verb in ("inspect", "verify"):
            assert "is damaged or was edited" in error(run("kv", verb, path.parent))


@pytest.mark.usefixtures("asked")
def test_arrays_of_another_shape_are_refused(tiny, kept, run):
    directory = kept("dense")
    window = kv_session.read(directory).windows[0]
    whole = jnp.zeros((2, 2 * window.size, 2, 8))
    orbax_io.save((directory / window.name).resolve(), {"keys": whole, "values": whole})
    files = sums(directory / window.name)
    sign(directory, lambda body: body["windows"][0].update(files=files))
    for command in ["kv", "verify", directory], ["ask", tiny, "Why?", "--kv", directory]:
        line = error(run(*command))
        assert f"{directory / window.name}: keys is float32(2, 2048, 2, 8) instead of" in line


@pytest.mark.usefixtures("asked")
def test_arrays_that_nobody_can_find_are_not_intact(tiny, kept, run):
    directory = kept("dense")
    window = kv_session.read(directory).windows[0]
    for path in (directory / window.name / "state").glob("*.ocdbt"):
        path.write_bytes(b"")
    files = sums(directory / window.name)
    sign(directory, lambda body: body["windows"][0].update(files=files))
    for command in ["kv", "verify", directory], ["ask", tiny, "Why?", "--kv", directory]:
        assert f"{directory / window.name} holds no array keys" in error(run(*command))


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("name", ["kv[v2]", "k*v?", "{a}", "%41", "a\nb", "x/y/kv"])
def test_a_session_can_have_any_name(name, prefill, tiny, made, tmp_path, run):
    directory = tmp_path / "[new]" / name / "kv"
    assert prefill("--out", directory)[0] == 0
    assert run("kv", "verify", directory)[0] == 0
    assert content(directory) == content(made / "dense")
    whole = run("ask", tiny, "Why?", "--kv", made / "dense", *GREEDY)
    assert run("ask", tiny, "Why?", "--kv", directory, *GREEDY)[:2] == whole[:2]


@pytest.mark.usefixtures("asked")
def test_what_cannot_be_found_again_is_not_called_saved(prefill, tmp_path, monkeypatch):
    saved = orbax_io.ocp.save
    monkeypatch.setattr(orbax_io.ocp, "save", lambda path, _: saved(path, {"keys": jnp.ones(2)}))
    line = error(prefill())
    assert "window_000000: keys is float32(2,) instead of float32(2, 1024, 2, 8)" in line
    assert "0 tokens are saved, the same command goes on there" in line
    assert kv_session.read(tmp_path / "kv").windows == ()


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("change", ["begun anew", "another directory", "a file", "removed"])
def test_a_session_that_changes_while_it_is_read_is_not_used(
    change, tiny, kept, made, monkeypatch, run
):
    directory, load = kept("dense"), kv_session.load

    def changed(*arguments):
        found = load(*arguments)
        if change == "begun anew":
            blank = structs.replace(arguments[1], windows=())
            atomic.write(directory / "session.json", blank.encode())
        elif change == "a file":
            path = largest(directory / DATA)
            path.write_bytes(path.read_bytes())
        elif directory.exists():
            directory.rename(directory.with_name("old"))
            if change == "another directory":
                shutil.copytree(made / "dense", directory)
        return found

    monkeypatch.setattr(kv_session, "load", changed)
    line = error(run("ask", tiny, "Why?", "--kv", directory))
    if change in ("begun anew", "a file"):
        assert f"{directory} was changed while it was read" in line


class Killed(BaseException):
    """Raised where a run is killed."""


def killed(at, patch, target, name, *, torn=None):
    """Ends the run at the `at`-th call of a function, after `torn` of its arguments."""
    real, calls = getattr(target, name), 0

    def call(*arguments, **more):
        nonlocal calls
        calls += 1
        if calls == at:
            if torn is not None:
                torn(real, *arguments, **more)
            raise Killed
        return real(*arguments, **more)

    patch.setattr(target, name, call)


def half_a_window(real, folder, arrays):
    real(folder, arrays)
    cut(largest(folder))
    (folder / "commit_success.txt").unlink(missing_ok=True)


def temporary_window(real, folder, arrays):
    real(folder, arrays)
    folder.rename(folder.with_name(f"{folder.name}.orbax-checkpoint-tmp"))


def half_a_file(_, path, content):
    path.with_name(f"{path.name}.partial").write_bytes(content[: len(content) // 2])


def whole_partial(_, path, content):
    path.with_name(f"{path.name}.partial").write_bytes(content)


# Functions at whose calls the run ends, what they leave, and the calls, from 1.
CUTS = {
    "before a slice": (Engine, "step", None, (1, 4, 5, 6, 9, 11)),
    "before a window": (orbax_io, "save", None, (1, 3)),
    "in a window": (orbax_io, "save", half_a_window, (1, 2, 3)),
    "before its renaming": (orbax_io, "save", temporary_window, (1, 2)),
    "after a window": (kv_session, "_sums", None, (1, 2, 3)),
    "in a file": (atomic, "write", half_a_file, (1, 2, 3, 5)),
    "before renaming a file": (atomic, "write", whole_partial, (1, 2, 4)),
}
POINTS = [
    pytest.param(name, at, marks=[] if (name, at) in SHORT else pytest.mark.long, id=f"{name} {at}")
    for name, (_, _, _, ats) in CUTS.items()
    for at in ats
]


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(("name", "at"), POINTS)
def test_a_killed_prefill_goes_on_to_the_same_cache(name, at, prefill, made, tmp_path, monkeypatch):
    target, function, torn, _ = CUTS[name]
    with monkeypatch.context() as patch:
        killed(at, patch, target, function, torn=torn)
        with pytest.raises(Killed):
            prefill()
    saved = 0
    if (tmp_path / "kv" / "session.json").exists():
        saved = kv_session.read(tmp_path / "kv").saved
    code, _, err = prefill()
    assert code == 0
    assert ("going on there" in err) == (saved > 0)
    assert f"{kv_session.read(tmp_path / 'kv').saved - saved:,} tokens in " in err
    assert content(tmp_path / "kv") == content(made / "dense")
    names = set(os.listdir(tmp_path / "kv"))
    windows = {window.name for window in kv_session.read(tmp_path / "kv").windows}
    assert names == {"session.json", "tokens", "lock", *windows}


def test_there_are_twenty_cut_points_and_more():
    assert len(POINTS) >= 20


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("at", [1, 3, 7, 11, 12])
def test_sigterm_saves_all_that_was_read(at, prefill, made, tmp_path, monkeypatch):
    step, steps = Engine.step, 0

    def stopped(self):
        nonlocal steps
        steps += 1
        if steps == at:
            signal.raise_signal(signal.SIGTERM)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", stopped)
        code, _, err = prefill()
    total = kv_session.read(made / "dense").saved
    read = min(64 * at, total)
    assert code == multihost.PREEMPTED
    assert steps == at  # none after the signal
    assert err.splitlines()[-1] == (
        f"stopped: {read:,} of {total:,} tokens are saved, the same command goes on there"
    )
    code, _, err = prefill()
    assert code == 0
    said = "is complete already" if read == total else f"holds {read:,} of {total:,} tokens: going"
    assert said in err
    assert content(tmp_path / "kv") == content(made / "dense")


@pytest.mark.usefixtures("asked")
def test_the_same_command_goes_on_though_it_says_overwrite(prefill, made, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        killed(6, patch, Engine, "step")
        with pytest.raises(Killed):
            prefill("--overwrite")
    code, _, err = prefill("--overwrite")
    assert code == 0
    assert "holds 256 of" in err
    assert content(tmp_path / "kv") == content(made / "dense")
    assert "is complete already" in prefill("--overwrite")[2]


@pytest.mark.usefixtures("asked")
def test_a_damaged_window_is_not_gone_on_after(prefill, made, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        killed(6, patch, Engine, "step")
        with pytest.raises(Killed):
            prefill()
    flip(largest(tmp_path / "kv" / "window_000000"))
    line = error(prefill())
    assert "its SHA-256 is not that of session.json; prefill again with --overwrite" in line
    assert prefill("--overwrite")[0] == 0
    assert content(tmp_path / "kv") == content(made / "dense")


@pytest.mark.usefixtures("asked")
def test_another_session_is_replaced_on_demand_only(prefill, kept, tiny, text, made, run):
    directory = kept("raw")
    before = content(directory)
    arguments = ["prefill", tiny, "--file", text, "--out", directory, *PREFILL]
    line = error(run(*arguments))
    assert "holds another session" in line
    assert "--overwrite it" in line
    assert content(directory) == before
    assert run(*arguments, "--overwrite")[0] == 0
    assert content(directory) == content(made / "dense")


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("name", ["session.json", "tokens", "thesis.partial", "window_000000", "x"])
@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_what_is_no_session_is_never_emptied(name, more, prefill, tmp_path):
    (tmp_path / "kv").mkdir()
    (tmp_path / "kv" / name).write_text("mine")
    line = error(prefill(*more))
    assert f"holds {name}, which is no part of a KV session: name a directory of its own" in line
    assert os.listdir(tmp_path / "kv") == [name]
    assert (tmp_path / "kv" / name).read_text() == "mine"


@pytest.mark.usefixtures("asked")
def test_files_of_the_user_in_a_session_stay(kept, tiny, text, run):
    directory = kept("raw")
    (directory / "notes.txt").write_text("mine")
    before = content(directory)
    arguments = ["prefill", tiny, "--file", text, "--out", directory, *PREFILL, "--overwrite"]
    assert "holds notes.txt, which is no part" in error(run(*arguments))
    assert content(directory) == before
    assert (directory / "notes.txt").read_text() == "mine"


@pytest.mark.usefixtures("asked")
def test_links_lead_nowhere(prefill, made, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (tmp_path / "kv").mkdir()
    for name in ("session.json.partial", "tokens.partial"):
        (tmp_path / "kv" / name).symlink_to(tmp_path / "mine" / "file")
    assert prefill()[0] == 0
    assert content(tmp_path / "kv") == content(made / "dense")
    sign(tmp_path / "kv", lambda body: body["windows"].pop())
    shutil.rmtree(tmp_path / "kv" / "window_000002")
    (tmp_path / "kv" / "window_000002").symlink_to(tmp_path / "mine")
    assert prefill()[0] == 0
    assert content(tmp_path / "kv") == content(made / "dense")
    assert (tmp_path / "mine" / "file").read_text() == "mine"


@pytest.mark.usefixtures("nothing_allocated")
def test_a_whole_session_says_so(kept, tiny, text, run):
    directory = kept("dense")
    code, out, err = run("prefill", tiny, "--file", text, "--out", directory, *PREFILL)
    assert (code, out) == (0, "")
    assert f"{directory} is complete already: " in err.splitlines()[-1]


@pytest.mark.usefixtures("nothing_allocated")
def test_two_writers_at_once_are_refused(kept, tiny, text, run):
    directory = kept("dense")
    with (directory / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for more in ([], ["--overwrite"]):
            result = run("prefill", tiny, "--file", text, "--out", directory, *PREFILL, *more)
            assert f"{directory} is being written by another run" in error(result)


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("target", ["window", "sums", "manifest"])
def test_a_full_disk_leaves_earlier_windows(target, prefill, made, tmp_path, monkeypatch):
    place, name, at = {
        "window": (orbax_io.ocp, "save", 2),
        "sums": (orbax_io, "file_sums", FILES + 5),
        "manifest": (atomic, "write", 4),
    }[target]
    real, calls = getattr(place, name), 0

    def full(*arguments, **more):
        nonlocal calls
        calls += 1
        if calls >= at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, full)
        line = error(prefill())
    assert "No space left on device" in line
    assert "256 tokens are saved, the same command goes on there" in line
    assert str(tmp_path / "kv") in line
    code, _, err = prefill()
    assert code == 0
    assert "holds 256 of" in err
    assert content(tmp_path / "kv") == content(made / "dense")


@pytest.mark.usefixtures("asked")
def test_windows_that_a_device_does_not_hold_are_refused_before_weights_are_read(
    tiny, text, tmp_path, monkeypatch, run
):
    totals, memory = [], budget.memory

    def noted(*arguments):
        totals.append(memory(*arguments).total)
        return memory(*arguments)

    monkeypatch.setattr(budget, "memory", noted)
    windows = {"one": 2**31 - 1, "many": 64}

    def prefill(name, out):
        flags = ["--out", tmp_path / out, "--slice", 64, "--save-every", windows[name]]
        return run("prefill", tiny, "--file", text, *flags)

    for name in windows:
        assert prefill(name, name)[0] == 0
    one, many = totals
    assert one > many
    monkeypatch.setattr("qwen_jax.planner.devices.host_bytes", lambda: one - 1)
    ask = ["ask", tiny, "Why?", "--slice", 64, "--max-new-tokens", 1, "--kv"]
    with monkeypatch.context() as patch:
        patch.setattr(Model, "weights", None)
        lines = error(prefill("one", "other")), error(run(*ask, tmp_path / "one"))
    for line in lines:
        assert ", and 768 of them once more on their way to or from the disk, take " in line
        assert line.endswith(
            "a session prefilled with a smaller --save-every moves fewer at a time"
        )
    assert prefill("many", "other")[0] == 0
    assert run(*ask, tmp_path / "many")[0] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give one of --file, --prompt-file, --tokens, not none"),
        (["--file", "T", "--prompt-file", "T"], "not --file and --prompt-file"),
        (["--prompt-file", "T", "--system", "x"], "--system contradicts --prompt-file"),
        (["--file", "T", "--save-every", 0], "--save-every 0 must be at least 1"),
        (["--file", "T", "--out", "T"], "T cannot be written: "),
        (["--file", "T", "--out", "T/kv"], "T/kv cannot be written: Not a directory"),
        (["--file", "T", "--out", "gs:/kv"], "gs:/kv reads as a path of remote storage"),
        (["--file", "T", "--out", os.fsdecode(b"\xff")], "\\udcff is not UTF-8: name another"),
        (["--file", "T", "--max-len", 100], "do not fit into the 100 that --max-len says"),
        (["--file", "nowhere"], "nowhere is missing"),
    ],
)
@pytest.mark.usefixtures("nothing_allocated")
def test_a_prefill_that_makes_no_sense_is_refused(
    flags, message, tiny, text, tmp_path, monkeypatch, run
):
    monkeypatch.chdir(tmp_path)
    shutil.copy(text, "T")
    assert message in error(run("prefill", tiny, "--out", "kv", *flags))
    assert os.listdir() == ["T"]


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(
    "name",
    [
        "window_000000/notes",
        "window_000000/state/notes.txt",
        "window_000000/mine/deep/x",
        "window_000007/x",
        "window_000007",
        "window_000000.orbax-checkpoint-tmp/notes",
    ],
)
def test_a_session_with_a_file_of_the_user_in_a_window_is_not_replaced(
    name, prefill, kept, tiny, text, run
):
    directory = kept("raw")
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    before = {each: each.read_bytes() for each in directory.rglob("*") if each.is_file()}
    arguments = ["prefill", tiny, "--file", text, "--out", directory, *PREFILL]
    line = error(run(*arguments, "--overwrite"))
    assert f"holds {name}, which is no part of a KV session" in line
    assert {each: each.read_bytes() for each in directory.rglob("*") if each.is_file()} == before
    path.unlink()
    assert run(*arguments, "--overwrite")[0] == 0
