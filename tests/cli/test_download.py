"""Models by name: fetched from a hub on the loopback device, then found in the local cache."""

import json
import os
import subprocess
import sys

import pytest
from support.loopback_hub import REVISION, serving

from qwen_jax.config import ConfigError
from qwen_jax.models import presets
from qwen_jax.storage import hub as local_hub

ID = "Qwen/tiny-1M"


@pytest.fixture
def hub(model):
    """A hub with the tiny model, and files beside it that nobody reads."""
    for name in ("README.md", "pytorch_model.bin", "model.onnx"):
        (model / name).write_bytes(b"unread")
    with serving({ID: model}) as served:
        yield served


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty hub cache, which this process looks into too."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf"


def command(*arguments, endpoint, **environment):
    """A command line in a process of its own, for huggingface_hub reads variables once."""
    return subprocess.run(
        [sys.executable, "-m", "qwen_jax", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"} | environment,
        check=False,
    )


def refused(done, *texts):
    """Checks that a command ended in one line of complaint."""
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    for text in texts:
        assert text in done.stderr.splitlines()[-1]


def test_a_model_is_downloaded_once_and_then_stands_for_itself(hub, home, model, run):
    done = command("download", ID, endpoint=hub.url)
    snapshot = home / "hub" / "models--Qwen--tiny-1M" / "snapshots" / REVISION
    assert (done.returncode, done.stdout) == (0, f"{snapshot}\n"), done.stderr
    assert f"{ID}: 4 files, 0.00 GB to fetch into {home / 'hub'}" in done.stderr
    read = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {each.name for each in snapshot.iterdir()} == read
    for name in read:
        assert (snapshot / name).read_bytes() == (model / name).read_bytes()
    fetched = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert len(fetched) == 4
    again = command("download", f"{ID}@main", endpoint=hub.url)
    assert again.stdout == done.stdout
    assert [path for method, path in hub.requests if method == "GET" and "/resolve/" in path] == (
        fetched
    )
    # Everything else reads the cache: from here on the hub hears nothing.
    hub.requests.clear()
    for name in (ID, f"{ID}@main", f"{ID}@{REVISION}"):
        assert local_hub.checkpoint(name) == snapshot
    code, out, err = run("inspect", ID, "--json")
    assert (code, json.loads(out)["num_parameters"]) == (0, 25_888), err
    code, _, err = run("verify", ID)
    assert code == 0, err
    found = [
        run("generate", name, "--prompt", "the bee", "--max-new-tokens", "4", "--greedy")[:2]
        for name in (ID, model)
    ]
    assert found[0] == found[1]
    assert found[0][0] == 0
    assert run("convert", ID, home / "ours")[0] == 0
    assert run("verify", home / "ours", "--full")[0] == 0
    assert run("plan", ID, "--topology", "cpu:1")[0] == 0
    assert hub.requests == []


def test_a_download_that_broke_off_says_how_it_goes_on(hub, home):
    hub.breaks = "model.safetensors"
    done = command("download", ID, endpoint=hub.url, HF_HUB_DOWNLOAD_TIMEOUT="1")
    refused(done, f"go on with: qwen-jax download {ID}")
    hub.breaks = ""
    assert command("download", ID, endpoint=hub.url).returncode == 0
    assert local_hub.checkpoint(ID).name == REVISION


def test_what_a_hub_refuses_is_said_in_one_line(hub, home, model):
    refused(
        command("download", "Qwen/other", endpoint=hub.url),
        f"there is no model Qwen/other at {hub.url} that may be read",
        "HF_TOKEN",
    )
    refused(
        command("download", ID, "--revision", "v9", endpoint=hub.url),
        f"{ID} has no revision v9 at {hub.url}",
    )
    (model / "model.safetensors").unlink()
    refused(command("download", ID, endpoint=hub.url), f"{ID} has no weights in safetensors")
    hub.gated.add(ID)
    refused(command("download", ID, endpoint=hub.url), f"{ID} is gated at {hub.url}", "HF_TOKEN")
    refused(
        command("download", ID, endpoint="http://127.0.0.1:9"),
        "http://127.0.0.1:9 cannot be reached",
    )
    refused(command("download", ID, endpoint=hub.url, HF_HUB_OFFLINE="1"), "cannot be reached")
    refused(command("download", "no-id", endpoint=hub.url), "ID no-id is no hub id")
    refused(
        command("download", f"{ID}@main", "--revision", "v9", endpoint=hub.url),
        "--revision v9 contradicts @main",
    )


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(hub, home, model):
    script = (
        "import shutil, sys; from collections import namedtuple\n"
        "shutil.disk_usage = lambda path: namedtuple('U', 'total used free')(1, 1, 100)\n"
        "from qwen_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "download", ID],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_ENDPOINT": hub.url},
        check=False,
    )
    refused(done, f"{ID} takes 0.00 GB", "0.00 GB free: set HF_HUB_CACHE")
    assert not any("/resolve/" in path and method == "GET" for method, path in hub.requests)


def test_without_huggingface_hub_the_line_to_run_is_said(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    code, out, err = run("download", ID)
    assert (code, out) == (2, "")
    assert "pip install -e '.[hub]' in a checkout of qwen-jax" in err


@pytest.mark.parametrize(
    "words",
    [
        ["ask", "MODEL", "Why?"],
        ["generate", "MODEL", "--prompt", "x"],
        ["inspect", "MODEL"],
        ["verify", "MODEL"],
        ["convert", "MODEL", "out"],
        ["plan", "MODEL", "--topology", "cpu:1"],
        ["bench", "MODEL"],
    ],
    ids=lambda words: words[0],
)
def test_a_model_that_was_not_downloaded_is_refused_with_the_line_to_run(words, run, home):
    for name, more in ((ID, ""), (f"{ID}@v1", " --revision v1")):
        code, out, err = run(*(name if word == "MODEL" else word for word in words))
        assert (code, out) == (2, "")
        assert f"{ID}: there is no such model" in err
        assert err.endswith(f"fetch it with: qwen-jax download {ID}{more}\n")


def test_a_local_directory_of_that_name_wins(home, model, tmp_path, monkeypatch):
    snapshots = home / "hub" / "models--Qwen--tiny-1M" / "snapshots"
    (snapshots / REVISION).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_hub.checkpoint(ID) == snapshots / REVISION
    (tmp_path / "Qwen").mkdir()
    model.rename(tmp_path / ID)
    assert str(local_hub.checkpoint(ID)) == ID


def test_a_revision_that_is_not_in_the_cache_is_refused(home):
    repository = home / "hub" / "models--Qwen--tiny-1M"
    (repository / "snapshots" / REVISION).mkdir(parents=True)
    for revision in ("v1", "b" * 40, "refs/pr/1"):
        with pytest.raises(ConfigError, match=f"no snapshot of revision {revision}.*--revision"):
            local_hub.checkpoint(f"{ID}@{revision}")


@pytest.mark.parametrize(
    ("variable", "place"),
    [("HF_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")],
)
def test_the_cache_lies_where_huggingface_hub_has_it(home, variable, place, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv(variable, str(tmp_path / "there"))
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(local_hub.cache()) == str(tmp_path / "there" / place)


@pytest.mark.parametrize("size", presets.PUBLISHED)
def test_a_published_model_is_planned_by_each_of_its_names(size, run, home, tmp_path):
    short, full = f"{size}-1m", presets.HUB_IDS[f"{size}-1m"]
    assert (presets.find(short), presets.find(full), presets.find("7B")) == (size, size, None)
    asked = "--topology", "v5e:4x4", "--tokens", "128K", "--json"
    found = [
        run("plan", *named, *asked)
        for named in ([short], [full], ["--config", short], ["--config", full])
    ]
    assert {code for code, _, _ in found} == {0}
    plans = [json.loads(out) for _, out, _ in found]
    assert [plan.pop("model") for plan in plans] == [short, full, short, full]
    assert all(plan == plans[0] for plan in plans)
    for name in (short, full):
        code, out, err = run(
            *"export-job slurm --topology h200:8 --partition p --time 1:00:00".split(),
            *("--model", name, "--tokens", "128K", "--command", "true", "--compile-cache", "/c"),
            *("--out", tmp_path / name.replace("/", "-")),
        )
        assert code == 0, err
        assert "fits: 131,072 tokens take" in err
        code, out, err = run("bench", "prefill", name)
        assert (code, out) == (2, "")
        assert f"{name} has no weights here" in err
        assert f"qwen-jax download {full}" in err
