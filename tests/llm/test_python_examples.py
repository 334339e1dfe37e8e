"""The examples of docs/python.md, run in order on a tiny model that has the name of theirs."""

import re
import shutil
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def test_the_examples_run(checkpoint, tmp_path, monkeypatch, capsys):
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    assert len(blocks) == text.count("```") // 2 == 7
    repository = tmp_path / "hub" / "models--Qwen--Qwen2.5-7B-Instruct-1M"
    shutil.copytree(checkpoint, repository / "snapshots" / "0123")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    Path("src").mkdir()
    Path("src", "cache.py").write_text("def clear(): ...\n")
    Path("book.txt").write_text("Call me Ishmael.\n")
    # The tiny model knows 320 tokens.
    source = "\n".join(blocks).replace("[9707, 11]", "[97, 11]")
    names = {"__name__": "examples"}
    exec(compile(source, str(PAGE), "exec"), names)
    names["llm"].close()
    assert [each.timings.prompt_tokens for each in names["answers"]][2] == 2
    assert [name for name, _ in names["session"].documents] == ["book.txt"]
    assert "3\n" in capsys.readouterr().out
