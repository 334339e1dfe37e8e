"""Text from files, names, ids and peers is printed with escapes, on one line."""

import json
import shutil

import numpy as np
import pytest
from msgspec import structs
from safetensors.numpy import save_file
from support.kept import sign
from support.tiny_model import CONFIG, random_weights

from qwen_jax.cli import flags
from qwen_jax.distributed import multihost
from qwen_jax.files import reading
from qwen_jax.storage import kv_session

EVIL = "e\x1b[2J\n\x07\u202ev\x9b"
SHOWN = reading.printable(EVIL)


def printed(result):
    """Checks that the output of a verb has no control characters but newlines; returns it."""
    code, out, err = result
    strange = {each for each in out + err if not each.isprintable()} - {"\n"}
    assert not strange
    return code, out, err


def refused(result):
    """The one line of a refusal."""
    code, out, err = printed(result)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert SHOWN in err
    return err


@pytest.mark.parametrize(
    "command",
    [
        "ask {} Q",
        "inspect {}",
        "verify {}",
        "kv inspect {}",
        "kv verify {}",
        "convert {} out",
        "export {} out",
        "plot eval {}",
        "plot recall {}",
        "generate MODEL --prompt-file {}",
        "generate MODEL --tokens {}",
        "generate MODEL --prompt x --kv {}",
        "generate MODEL --prompt x --sparse on --sparse-config {}",
        "ask MODEL Q --file {}",
        "batch MODEL {} out",
        "calibrate MODEL --data {} --lengths 1",
        "plan --topology cpu:1 --tokens 10 {}",
        "{}",
        "ask MODEL Q --dtype {}",
        "ask MODEL Q --kernels {}",
        "ask MODEL Q --mesh {}",
        "bench kernels --shapes {}",
    ],
)
def test_a_name_that_leads_nowhere(command, tiny, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    words = [word.replace("MODEL", str(tiny)).replace("{}", EVIL) for word in command.split()]
    refused(run(*words))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", json.dumps(CONFIG | {"model_type": EVIL})),
        ("config.json", json.dumps(CONFIG | {"hidden_act": EVIL})),
        ("config.json", json.dumps(CONFIG | {"rope_scaling": {"type": EVIL}})),
        ("config.json", json.dumps(CONFIG | {"num_hidden_layers": EVIL})),
        ("generation_config.json", json.dumps({"temperature": EVIL})),
        ("tokenizer_config.json", json.dumps({"chat_template": EVIL})),
        ("sparse_attention_config.json", json.dumps([{EVIL: 1}] * 2)),
    ],
)
def test_a_file_of_the_model(name, content, model, run):
    (model / name).write_text(content)
    code, out, err = printed(run("ask", model, "Q", "--sparse", "auto"))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1


def test_a_tensor(model, run):
    weights = random_weights() | {EVIL: np.zeros(2, np.float32)}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    refused(run("inspect", model))
    refused(run("ask", model, "Q"))


def test_names_of_files_and_of_the_model(tiny, fake, tmp_path, run):
    model, texts = tmp_path / f"m{EVIL}", tmp_path / f"d{EVIL}"
    shutil.copytree(tiny, model)
    texts.mkdir()
    (texts / f"a{EVIL}.txt").write_text("Ants.")
    (texts / f"b{EVIL}.png").write_bytes(b"\0")
    fake.answer = (65,)
    code, _, err = printed(run("ask", model, "Q", "--file", texts, "--max-new-tokens", 1))
    assert code == 0
    for name in (f"d{SHOWN}/a{SHOWN}.txt", f"b{SHOWN}.png"):
        assert len([line for line in err.splitlines() if name in line]) == 1
    code, out, _ = printed(run("convert", model, tmp_path / f"c{EVIL}"))
    assert code == 0
    assert f"c{SHOWN}" in out
    for verb in ("inspect", "verify"):
        assert printed(run(verb, tmp_path / f"c{EVIL}"))[0] == 0
    (tmp_path / f"c{EVIL}" / f"more{EVIL}.json").write_text("{}")
    printed(run("verify", "--full", tmp_path / f"c{EVIL}"))


def test_names_in_a_batch(tiny, tmp_path, run):
    lines = [{"custom_id": EVIL, "method": "POST", "url": EVIL, "body": {}}] * 2
    requests = tmp_path / f"i{EVIL}"
    requests.write_text(json.dumps(lines[0]))
    code, out, _ = printed(run("batch", tiny, requests, tmp_path / "out", "--dry-run"))
    assert code == 0
    assert SHOWN in out
    requests.write_text("\n".join(map(json.dumps, lines)))
    refused(run("batch", tiny, requests, tmp_path / "out"))
    (tmp_path / f"o{EVIL}").write_text("mine")
    requests.write_text(json.dumps(lines[0]))
    refused(run("batch", tiny, requests, tmp_path / f"o{EVIL}"))


def test_words_of_a_session(tmp_path, run):
    directory = tmp_path / f"kv{EVIL}"
    directory.mkdir()
    identity = kv_session.Identity(
        weights=EVIL,
        tokenizer=EVIL,
        settings={"dca": None, "dca_original": 0, "sparse": None},
        dtype="float32",
        shape=(1, 1, 1),
        num_tokens=4,
        tokens_sha256="0",
        is_chat=True,
    )
    found = kv_session.Session(
        versions={EVIL: EVIL}, identity=identity, documents=((EVIL, 1),), sparse=None, windows=()
    )
    (directory / "session.json").write_bytes(found.encode())
    code, out, _ = printed(run("kv", "inspect", directory))
    assert code == 0
    assert out.count(SHOWN) == 5
    refused(run("kv", "verify", directory))
    sign(directory, lambda body: body.update({EVIL: 1}))
    refused(run("kv", "verify", directory))
    assert structs.replace(identity, weights="x").difference(identity)


def test_variants_of_a_log(tmp_path, run):
    log = tmp_path / f"l{EVIL}"
    settings = {"settings": {"model": EVIL, "dca": EVIL}}
    cell = {"task": "passkey", "variant": EVIL, "length": 8, "depth": 0.5, "sample": 0}
    log.write_text("\n".join(map(json.dumps, [settings, cell | {"score": 1.0}])))
    printed(run("plot", "eval", log))


def test_words_of_a_peer(capfd):
    multihost.write_stderr(f"error: {EVIL}")
    flags.note(EVIL)
    assert capfd.readouterr().err == f"error: {SHOWN}\n{SHOWN}\n"
