"""The image: that what it is built from is there."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def instructions():
    """Name and value of every instruction of the Dockerfile."""
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    return [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]


def values(name):
    return [value for instruction, value in instructions() if instruction == name]


def test_what_is_copied_is_there_and_not_ignored():
    sources = {source for value in values("COPY") for source in value.split()[:-1]}
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    for source in sources:
        assert (ROOT / source).exists()
        assert source.split("/")[0] in kept


def test_every_package_is_copied():
    sources = {source for value in values("COPY") for source in value.split()[:-1]}
    found = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name.rstrip("*") for name in found} <= sources
    assert {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]} <= sources


def test_the_base_is_pinned_to_a_python_with_constraints():
    (base,) = values("FROM")
    version = re.fullmatch(r"python:(\d+)\.(\d+)\.\d+-slim-bookworm", base)
    assert version is not None
    (install,) = [value for value in values("RUN") if "pip install" in value]
    constraints = f"constraints/py{version[1]}{version[2]}.txt"
    assert f"--constraint {constraints}" in install
    assert f"{constraints} {constraints}" in values("COPY")


def test_extras_are_those_of_the_project():
    text = (ROOT / "Dockerfile").read_text()
    named = re.search(r"# EXTRA: (.*) of pyproject.toml", text)[1]
    extras = PROJECT["project"]["optional-dependencies"]
    assert set(re.split(r", | or ", named)) <= set(extras)
    assert values("ARG")[0].removeprefix("EXTRA=") in extras


def test_the_user_is_not_root():
    defaults = dict(value.split("=") for value in values("ARG"))
    assert values("USER") == ["${RUN_AS}"]
    assert defaults["RUN_AS"] == "1000"
    assert any(f"useradd --uid {defaults['RUN_AS']}" in value for value in values("RUN"))
