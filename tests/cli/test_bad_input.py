"""Mistakes that new users make: one line on stderr, a code that is not 0, nothing written."""

import errno
import json
import os

import pytest

TOO_LONG = "word " * 4000


def spoil(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


MISTAKES = {
    # name: (spoils the model and makes files, command line, what the error says)
    "no verb of that name": (None, "frobnicate", "No such command 'frobnicate'"),
    "no model given": (None, "chat", "Missing argument 'MODEL'"),
    "no question given": (None, "ask MODEL", "Missing argument 'QUESTION'"),
    "unknown flag": (None, "generate MODEL --promt hello", "--prompt"),
    "a name of plan": (
        None,
        "ask 7b-1m Why?",
        "7b-1m: there is no such model; its hub id is Qwen/",
    ),
    "no such model": (None, "ask nowhere Why?", "nowhere: there is no such model"),
    "a file as the model": (None, "ask MODEL/config.json Why?", "is a file; give the directory"),
    "an empty directory": (None, "score EMPTY --tokens T --out O.npz", "config.json is missing"),
    "unknown dtype": (None, "generate MODEL --prompt x --dtype f16", "'f16' is not one of"),
    "a word for a number": (None, "generate MODEL --prompt x --slice big", "--slice"),
    "a negative slice": (None, "generate MODEL --prompt x --slice -1", "--slice -1 must be"),
    "no prompt": (None, "generate MODEL", "give one of --prompt"),
    "two prompts": (None, "generate MODEL --prompt x --tokens T", "--prompt and --tokens"),
    "an empty prompt": (None, ["generate", "MODEL", "--prompt", ""], "--prompt must not be empty"),
    "an empty question": (None, ["ask", "MODEL", " "], "the question is empty"),
    "no answer wanted": (
        None,
        "generate MODEL --prompt x --max-new-tokens 0",
        "--max-new-tokens 0 must be",
    ),
    "too long a prompt": (
        None,
        ["ask", "MODEL", TOO_LONG],
        "do not fit into the 2,048 that config.json declares",
    ),
    "sizes missing": (None, "generate MODEL --prompt x --dca on", "needs --dca-chunk"),
    "contradiction": (None, "chat MODEL --dca off --dca-local 8", "--dca off contradicts"),
    "greedy and not": (None, "ask MODEL Q --greedy --temperature 1", "--greedy contradicts"),
    "no budgets": (None, "ask MODEL Q --sparse on", "has no budgets"),
    "budgets and no sparseness": (
        ("B", "[]"),
        "ask MODEL Q --sparse off --sparse-config B",
        "--sparse off contradicts --sparse-config",
    ),
    "no such budgets": (None, "ask MODEL Q --sparse-config B", "B is missing"),
    "budgets of another size": (
        ("B", "[{}]"),
        "generate MODEL --prompt x --sparse-config B",
        "B must hold a list of 2 layers",
    ),
    "budgets of other heads": (
        ("B", '[{"0": ["vertical_and_slash", 1, 1, 1]}, {}]'),
        "generate MODEL --prompt x --sparse-config B",
        "B: layer 0 must have heads 0 to 3",
    ),
    "a directory of budgets": (
        None,
        "ask MODEL Q --sparse-config EMPTY",
        "EMPTY is a directory, not a regular file",
    ),
    "no text to calibrate on": (None, "calibrate MODEL", "Missing option '--data'"),
    "too little text": (
        ("D", "abc"),
        "calibrate MODEL --data D --lengths 8,2K",
        "--data holds 3 tokens, --lengths asks for 2,048",
    ),
    "a length that is none": (("D", "abc"), "calibrate MODEL --data D --lengths 8,x", "'x' must"),
    "an empty length": (("D", "abc"), "calibrate MODEL --data D --lengths 8,", "--lengths '8,'"),
    "a length of nothing": (("D", "abc"), "calibrate MODEL --data D --lengths 0", "'0' must be"),
    "a length over the model's": (
        ("D", "abc"),
        "calibrate MODEL --data D --lengths 4K",
        "4,096 prompt tokens do not fit into the 2,048",
    ),
    "no recall": (
        ("D", "abc"),
        "calibrate MODEL --data D --lengths 2 --target-recall 0",
        "--target-recall 0.0 must be over 0",
    ),
    "too much recall": (
        ("D", "abc"),
        "calibrate MODEL --data D --lengths 2 --target-recall 1.1",
        "--target-recall 1.1 must be over 0 and at most 1",
    ),
    "a margin of everything": (
        ("D", "abc"),
        "calibrate MODEL --data D --lengths 2 --margin 1",
        "--margin 1.0 must be at least 0 and under 1",
    ),
    "no samples": (
        ("D", "abc"),
        "calibrate MODEL --data D --lengths 2 --samples 0",
        "--samples 0 must be at least 1",
    ),
    "a file above budgets": (
        ("D", "abc"),
        "calibrate MODEL --data D --lengths 2 --out D/b.json",
        "error: D: it is not a directory",
    ),
    "a file above a report": (
        ("D", "abc"),
        "calibrate MODEL --data D --lengths 2 --report D/b/r.json",
        "error: D/b: Not a directory",
    ),
    "budgets to a directory": (
        ("D", "abc"),
        "calibrate MODEL --data D --lengths 2 --out EMPTY",
        "EMPTY is a directory",
    ),
    "budgets to this directory": (
        ("D", "abc"),
        "calibrate MODEL --data D --lengths 2 --out .",
        ". is a directory",
    ),
    "budgets and report in one file": (
        ("D", "abc"),
        "calibrate MODEL --data D --lengths 2 --out b.json --report b.json",
        "--out and --report are one file, b.json",
    ),
    "no text to plan": (None, "plot plan MODEL", "Missing option '--file'"),
    "a plan without budgets": (("D", "abc"), "plot plan MODEL --file D", "has no budgets"),
    "no topology": (None, "plan MODEL", "Missing option '--topology'"),
    "no such topology": (None, "plan MODEL --topology b2000:8", "did you mean b200"),
    "sides that are not sold": (None, "plan MODEL --topology v5e:3x3", "v5e has 1x1, 2x2, 2x4"),
    "a plan for nothing": (None, "plan MODEL --topology cpu:8 --tokens 0", "--tokens 0 must be"),
    "a plan of empty slices": (None, "plan MODEL --topology cpu:8 --slice 0", "--slice 0 must be"),
    "what is no mesh": (
        None,
        "plan MODEL --topology cpu:8 --mesh 2x4",
        "mesh '2x4' must look like seq=4,tensor=4",
    ),
    "a mesh of other devices": (
        None,
        "plan MODEL --topology cpu:8 --mesh seq=4",
        "mesh seq=4,tensor=1 has 4 devices, there are 8: this model would take seq=4,tensor=2",
    ),
    "a mesh that cuts heads": (
        None,
        "plan MODEL --topology cpu:8 --mesh seq=2,tensor=4",
        "tensor=4 does not divide num_kv_heads=2",
    ),
    "a mesh of more devices than there are": (
        None,
        "generate MODEL --prompt x --mesh seq=2,tensor=2",
        "mesh seq=2,tensor=2 has 4 devices, there are 1: this model would take seq=1,tensor=1",
    ),
    "what is no mesh to run on": (None, "ask MODEL Q --mesh 2x4", "mesh '2x4' must look like"),
    "a mesh to calibrate on": (
        ("D", "abc"),
        "calibrate MODEL --data D --lengths 2 --mesh seq=2",
        "--mesh seq=2: texts are surveyed on one device: leave it out",
    ),
    "a mesh to plan on": (
        ("D", "abc"),
        "plot plan MODEL --file D --mesh tensor=2",
        "--mesh tensor=2: plans are made on one device: leave it out",
    ),
    "more than this machine holds": (
        None,
        "chat MODEL --dca on --dca-chunk 64 --dca-local 16 --max-len 2000000000",
        "weights and a cache of 2,000,000,000 tokens take 476.84 GiB on the device, which has",
    ),
    "a plan for no model": (None, "plan nowhere --topology cpu:8", "there is no such model"),
    "a long stop string": (
        None,
        ["ask", "MODEL", "Q", "--stop", "a" * 4097],
        "--stop: a stop string has 1 to 4,096",
    ),
    "an empty stop string": (
        None,
        ["ask", "MODEL", "Q", "--stop", ""],
        "--stop must not be empty",
    ),
    "no such backend": (None, "generate MODEL --prompt x --backend cuda", "no backend 'cuda'"),
    "a kernel of another device": (
        None,
        "generate MODEL --prompt x --backend mosaic_tpu",
        "'mosaic_tpu' runs on tpu; on this device (cpu) there are xla, reference",
    ),
    "no such shape": (None, "bench kernels --shapes x", "no shape 'x'; there are small at 2k"),
    "kernels of another device": (
        None,
        "generate MODEL --prompt x --kernels triton",
        "backend 'triton' runs on gpu; on this device (cpu) there are xla, reference",
    ),
    "no such kernel": (None, "bench kernels --backends x", "no backend 'x'"),
    "no runs": (None, "bench kernels --repeats 0", "--repeats 0 must be at least 1"),
    "no requests": (None, "batch MODEL I O", "I: No such file"),
    "a directory of requests": (None, "batch MODEL EMPTY O", "EMPTY is not a regular file"),
    "blank requests": (("I", "\n\n"), "batch MODEL I O", "I has no lines"),
    "results over requests": (("I", "{}"), "batch MODEL I I", "I is the file of the requests"),
    "results to a directory": (
        ("I", "{}"),
        "batch MODEL I EMPTY",
        "EMPTY is a directory: name a file to write",
    ),
    "results below a file": (("I", "{}"), "batch MODEL I I/O", "error: I: "),
    "results to a device": (
        ("I", "{}"),
        "batch MODEL I /dev/full",
        "/dev/full is a device: name a file to write",
    ),
    "results to another file": (
        ("MODEL/I", "{}"),
        "batch MODEL MODEL/I MODEL/config.json",
        "config.json is not the output of a batch",
    ),
    "two requests of one name": (
        ("I", '{"custom_id": "a"}\n[]\n{"custom_id": "a"}'),
        "batch MODEL I O",
        "I: lines 1 and 3 have one custom_id, 'a'",
    ),
    "no requests at once": (("I", "{}"), "batch MODEL I O --max-seqs 0", "--max-seqs 0 must be"),
    "a negative price": (
        ("I", "{}"),
        "batch MODEL I O --price-per-hour -1",
        "--price-per-hour -1.0 must be from 0 to 1000000",
    ),
    "devices for a run": (("I", "{}"), "batch MODEL I O --topology v5e:4x4", "is for --dry-run"),
    "no answers to requests": (
        ("I", "{}"),
        "batch MODEL I O --max-new-tokens 0",
        "--max-new-tokens 0 must be at least 1",
    ),
    "a profile in a file": (
        ("P", "x"),
        "generate MODEL --prompt x --profile P",
        "--profile P is a file: give a directory",
    ),
    "a profile under a file": (
        ("P", "x"),
        "chat MODEL --profile P/Q/R",
        "--profile P/Q/R: P is a file: give a directory",
    ),
    "a profile over other lines": (
        ("EMPTY/steps.jsonl", "{}"),
        "score MODEL --tokens T --out O.npz --profile EMPTY",
        "EMPTY/steps.jsonl is not of a profile: name another directory",
    ),
    "a profile of no model": (None, "ask nowhere Why? --profile P", "there is no such model"),
    "steps of no profile": (
        None,
        "ask MODEL Q --profile-steps 0:4",
        "--profile-steps 0:4 has no effect without --profile",
    ),
    "steps that are none": (
        None,
        "bench MODEL --profile P --profile-steps 4",
        "--profile-steps '4' must be the first step and how many, such as 0:64",
    ),
    "a word as a token": (("T", "1 2 three"), "score MODEL --tokens T --out O.npz", "item 2 is"),
    "a negative token": (("T", "[1, -2]"), "score MODEL --tokens T --out O.npz", "item 1 is -2"),
    "a token too large": (("T", "[1, 320]"), "score MODEL --tokens T --out O.npz", "0 to 319"),
    "a fractional token": (("T", "[1.5]"), "generate MODEL --tokens T", "item 0 is 1.5"),
    "a minus too many": (("T", "1 --5"), "generate MODEL --tokens T", "item 1 is '--5'"),
    "a truth value as a token": (("T", "[true]"), "generate MODEL --tokens T", "item 0 is True"),
    "a text as a token": (("T", '["1"]'), "generate MODEL --tokens T", "item 0 is '1'"),
    "a list as a token": (("T", "[[1], 2]"), "generate MODEL --tokens T", "item 0 is a list"),
    "an object as a token": (("T", "[{}]"), "score MODEL --tokens T --out O.npz", "is an object"),
    "null as a token": (("T", "[null]"), "generate MODEL --tokens T", "item 0 is None"),
    "a huge token": (("T", "9" * 5000), "generate MODEL --tokens T", "item 0 is '9999"),
    "a huge token in a list": (
        ("T", f"[{'9' * 5000}]"),
        "generate MODEL --tokens T",
        "over 4,300 digits",
    ),
    "digits of another script": (("T", "1 ٣"), "generate MODEL --tokens T", "item 1 is '٣'"),
    "an escape as a token": (("T", "\x1b[31m"), "generate MODEL --tokens T", "item 0 is '\\x1b"),
    "deep lists of tokens": (("T", "[" * 10**5), "generate MODEL --tokens T", "nested over"),
    "a device as tokens": (None, "generate MODEL --tokens /dev/zero", "is a device"),
    "a device as prompt": (None, "generate MODEL --prompt-file /dev/zero", "is a device"),
    "a device to score": (None, "score MODEL --tokens /dev/zero --out O.npz", "is a device"),
    "a directory as prompt": (None, "generate MODEL --prompt-file EMPTY", "is a directory"),
    "stdin twice": (None, "ask MODEL Q --file - --file -", "standard input (-) is given twice"),
    "nothing to exclude from": (
        ("D", "x"),
        "ask MODEL Q --file D --exclude *.py",
        "--exclude is for directories",
    ),
    "a broken list": (("T", "[1, 2"), "generate MODEL --tokens T", "JSON list"),
    "no tokens": (("T", "[]"), "generate MODEL --tokens T", "is empty"),
    "binary tokens": (("T", b"\xff\xfe"), "generate MODEL --tokens T", "T is not UTF-8"),
    "no token file": (None, "score MODEL --tokens nothing --out O.npz", "nothing is missing"),
    "more positions than tokens": (
        ("T", "1 2 3"),
        "score MODEL --tokens T --out O.npz --last 4",
        "--last 4 must be from 1 to 3",
    ),
    "output below a file": (("T", "1"), "score MODEL --tokens T --out T/O.npz", "T: it is not a d"),
    "output to a device": (("T", "1"), "score MODEL --tokens T --out /dev/full", "is a device"),
    "output is a directory": (("T", "1"), "score MODEL --tokens T --out EMPTY", "is a directory"),
    "no such document": (None, "ask MODEL Q --file nothing", "nothing is missing"),
    "a binary document": (("D", b"GIF\0\1"), "ask MODEL Q --file D", "it is binary"),
    "a document in Latin-1": (("D", b"caf\xe9"), "ask MODEL Q --file D", "it is not UTF-8"),
    "a directory without text": (None, "ask MODEL Q --file EMPTY", "holds no text files"),
    "a binary prompt": (("D", b"\0"), "generate MODEL --prompt-file D", "it is binary"),
    "a corrupt config": (
        ("MODEL/config.json", "{"),
        "ask MODEL Q",
        "config.json is not valid JSON",
    ),
    "a config that is a list": (("MODEL/config.json", "[]"), "ask MODEL Q", "JSON object"),
    "another architecture": (("MODEL/config.json", "{}"), "ask MODEL Q", "model_type"),
    "a corrupt tokenizer": (("MODEL/tokenizer.json", "{"), "ask MODEL Q", "not valid JSON"),
    "a corrupt tokenizer_config": (
        ("MODEL/tokenizer_config.json", "x"),
        "ask MODEL Q",
        "not valid JSON",
    ),
    "no chat template": (("MODEL/tokenizer_config.json", "{}"), "ask MODEL Q", "base model"),
    "a corrupt shard": (
        ("MODEL/model.safetensors", b"\0" * 99),
        "generate MODEL --prompt x",
        "model.safetensors",
    ),
}


def files(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line(mistake, model, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    spoiled, arguments, message = MISTAKES[mistake]
    if spoiled is not None:
        spoil(tmp_path / spoiled[0].replace("MODEL", "model"), spoiled[1])
    if isinstance(arguments, str):
        arguments = arguments.split()
    before = files(tmp_path)
    code, out, err = run(*[argument.replace("MODEL", "model") for argument in arguments])
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert message in err
    paths = [word.strip("'\":,;()") for word in err.split() if "/" in word]
    assert len(paths) == len(set(paths)), err
    assert files(tmp_path) == before


def test_a_missing_tokenizer_is_named_where_text_is_needed(model, run):
    (model / "tokenizer.json").unlink()
    for arguments in (["ask", model, "Q"], ["chat", model], ["generate", model, "--prompt", "x"]):
        code, _, err = run(*arguments)
        assert code == 2
        assert err == f"error: {model / 'tokenizer.json'} is missing: text needs it, ids do not\n"


def test_missing_weights_are_named(model, run):
    (model / "model.safetensors").unlink()
    code, _, err = run("generate", model, "--prompt", "x")
    assert code == 2
    assert err.count("\n") == 1
    assert str(model) in err


def test_weights_of_another_model_are_refused(model, run):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    code, _, err = run("generate", model, "--prompt", "x")
    assert code == 2
    assert err.count("\n") == 1


def test_a_tokenizer_larger_than_the_model_is_refused(model, run):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    code, _, err = run("ask", model, "Q")
    assert code == 2
    assert "they belong to different models" in err


def test_a_file_without_permission_is_named(model, tmp_path, monkeypatch, run):
    path = tmp_path / "secret.txt"
    path.write_text("x")

    def refuse(name, *flags, **more):
        if name == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(name))
        return open_file(name, *flags, **more)

    open_file = os.open
    monkeypatch.setattr(os, "open", refuse)
    code, _, err = run("generate", model, "--prompt-file", path)
    assert code == 2
    assert err == f"error: {path} cannot be read: Permission denied\n"


def test_a_full_disk_is_seen_before_the_work(model, tmp_path, monkeypatch, run):
    (tmp_path / "T").write_text("1 2 3")
    usage = type("usage", (), {"free": 100})
    monkeypatch.setattr("qwen_jax.cli.score.shutil.disk_usage", lambda path: usage)
    code, _, err = run("score", model, "--tokens", tmp_path / "T", "--out", tmp_path / "O.npz")
    assert code == 2
    assert "would take 3,840 bytes, 100 are free" in err


def test_a_bug_is_not_dressed_up_as_a_mistake(model, monkeypatch, run):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("qwen_jax.cli.doctor.examine", broken)
    with pytest.raises(ZeroDivisionError):
        run("doctor")


def test_a_failure_of_the_engine_is_said(tiny, fake, run):
    fake.error = "request 0: the logits after token 1 are not finite"
    code, _, err = run("generate", tiny, "--prompt", "x")
    assert code == 2
    assert err == f"error: {fake.error}\n"
