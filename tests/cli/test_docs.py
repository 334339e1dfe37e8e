"""README and docs: commands run, links lead somewhere, pictures are what the code says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.fences import NEEDS, ROOT, RUN, SHOWN, fences, pages

from qwen_jax.distributed.sharding import MeshShape
from qwen_jax.engine import memory
from qwen_jax.models import presets

# Examples of this page run as tests of the Python interface.
BLOCKS = [fence for page in pages() if page.name != "python.md" for fence in fences(page)]
RUNNABLE = [each for each in BLOCKS if each.language in RUN and "needs" not in each.options]


@pytest.fixture
def place(tmp_path, tiny) -> Path:
    """A directory with the files that the commands name."""
    shutil.copytree(tiny, tmp_path / "ckpt" / "7b-1m")
    presets.write(tmp_path / "published", "7b")
    (tmp_path / "src").mkdir()
    for name in ("book.txt", "src/cache.py"):
        (tmp_path / name).write_text("the bee and the bear and the other thing.\n")
    batch = next(each for each in BLOCKS if each.where.startswith("docs/batch.md:17"))
    for name in ("requests.jsonl", "questions.jsonl"):
        (tmp_path / name).write_text(batch.text)
    return tmp_path


def shell(text: str, place: Path) -> "subprocess.CompletedProcess[str]":
    """Runs commands as a user with an activated environment does."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=place,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path, "JAX_PLATFORMS": "cpu", "HF_HOME": str(place / "hf")},
        check=False,
    )


def test_every_fence_says_what_it_is_and_what_it_needs():
    for each in BLOCKS:
        assert each.language in (*RUN, *SHOWN), f"{each.where}: what is it?"
        assert each.options.get("needs", "tpu") in NEEDS, f"{each.where}: needs what?"
        assert set(each.options) <= {"needs", "model", "output"}, each.where
    assert len(RUNNABLE) >= 8


@pytest.mark.parametrize("fence", RUNNABLE, ids=lambda fence: fence.where)
def test_commands_of_the_docs_run(fence, place):
    if fence.options.get("model") == "7b":
        shutil.rmtree(place / "ckpt" / "7b-1m")
        shutil.move(place / "published", place / "ckpt" / "7b-1m")
    if fence.language == "python":
        done = subprocess.run(
            [sys.executable, "-c", fence.text], cwd=place, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    if fence.language == "sh":
        done = shell(fence.text, place)
        assert done.returncode == 0, done.stderr
    if fence.language == "console":
        assert fence.commands(), fence.where
        for command, output in fence.commands():
            done = shell(f"{command} 2>&1", place)
            assert done.returncode == 0, done.stdout
            if output and fence.options.get("output") != "sample":
                assert done.stdout == output


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{page.name} links to {target}"
        assert there.is_relative_to(ROOT), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), flags=re.MULTILINE)
            known = {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}
            assert anchor in known, f"{page.name} links to {target}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("7b", "the 7B holds {:.1f} GB of weights and {:.1f} GB of keys and values"),
        ("14b", "the 14B {:.1f} GB and {:.1f} GB"),
    ],
)
def test_sizes_in_the_readme_are_those_of_the_models(name, said, tmp_path):
    load = memory.Workload(tokens=1_010_000, page=1, slice_len=1)
    found = memory.memory(presets.config(tmp_path, name), load, MeshShape())
    sizes = said.format(found.weights / 1e9, found.cache / 1e9)
    assert sizes in " ".join((ROOT / "README.md").read_text().split())


@pytest.mark.parametrize("script", ["draw_imports", "draw_attention"])
def test_pictures_are_what_the_code_says(script):
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{script}.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_every_page_is_in_the_site():
    listed = (ROOT / "mkdocs.yml").read_text()
    for page in sorted((ROOT / "docs").rglob("*.md")):
        assert f" {page.relative_to(ROOT / 'docs')}\n" in listed, page
