"""export-job: what it says, writes and refuses."""

import os
import re
import stat

import pytest
import yaml

from qwen_jax.models import presets

JOBSET = ["export-job", "jobset", "--image", "image:1", "--bucket", "texts", "--command", "true"]


def exported(run, directory, *more, topology="v5e:4x4"):
    return run(*JOBSET, "--out", directory, "--topology", topology, *more)


def test_files_are_named_and_how_to_start_them(tmp_path, run):
    code, out, err = exported(run, tmp_path / "new" / "job")
    path = tmp_path / "new" / "job" / "jobset.yaml"
    assert code == 0
    assert out == f"{path}\nkubectl apply -f {path}\n"
    assert err.splitlines()[0] == "v5e:4x4: 16 chips, 4 hosts of 4"
    assert yaml.safe_load(path.read_text())["kind"] == "JobSet"


def test_scripts_may_be_executed(tmp_path, run):
    place = ["--partition", "gpu", "--time", "60", "--compile-cache", "/c"]
    where = ["--topology", "h200:8", "--out", tmp_path, "--command", "true"]
    code, out, _ = run("export-job", "slurm", *place, *where)
    assert code == 0
    assert out.splitlines()[-1] == f"sbatch {tmp_path}/job.sbatch"
    assert (tmp_path / "job.sbatch").stat().st_mode & stat.S_IXUSR


def test_a_job_that_fits_says_so(tmp_path, run):
    model = presets.write(tmp_path / "m", "7b")
    code, _, err = exported(run, tmp_path / "o", "--model", model, "--tokens", "1010000")
    assert code == 0
    assert "fits: 1,010,000 tokens take 8.27 GiB of 15.75 GiB on each of 16 devices" in err


def test_a_job_that_does_not_fit_is_not_written(tmp_path, run):
    model = presets.write(tmp_path / "m", "14b")
    code, out, err = exported(run, tmp_path / "o", "--model", model)
    assert (code, out) == (2, "")
    assert re.search(r"error: does not fit: 1,010,000 tokens take [\d.]+ GiB of 15.75 GiB", err)
    assert "--tokens" in err
    assert not (tmp_path / "o").exists()
    code, out, err = exported(run, tmp_path / "o", "--model", model, "--force")
    assert code == 0
    assert "does not fit, and --force writes it" in err
    assert (tmp_path / "o" / "jobset.yaml").exists()


def test_files_are_overwritten_only_when_that_is_asked_for(tmp_path, run):
    (tmp_path / "jobset.yaml").write_text("mine")
    code, out, err = exported(run, tmp_path)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == (
        f"error: {tmp_path}/jobset.yaml exists: take another --out, or add --overwrite"
    )
    code, out, err = exported(run, tmp_path, "--overwrite")
    assert (code, out) == (2, "")
    assert "jobset.yaml: exists and was not written by this command" in err
    assert (tmp_path / "jobset.yaml").read_text() == "mine"
    (tmp_path / "jobset.yaml").unlink()
    assert exported(run, tmp_path)[0] == 0
    first = (tmp_path / "jobset.yaml").read_text()
    assert exported(run, tmp_path)[0] == 2
    assert exported(run, tmp_path, "--overwrite", "--name", "other")[0] == 0
    second = (tmp_path / "jobset.yaml").read_text()
    assert second != first
    assert yaml.safe_load(second)["metadata"]["name"] == "other"


@pytest.mark.parametrize("kind", ["fifo", "link", "dangling"])
def test_what_is_no_file_is_neither_waited_for_nor_written_through(kind, tmp_path, run):
    out = tmp_path / "job"
    out.mkdir()
    path, other = out / "jobset.yaml", tmp_path / "other"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(other)
    if kind == "link":
        other.write_text("mine")
    for options in ([], ["--overwrite"]):
        assert exported(run, out, *options)[0] == 2
    assert not path.is_file() or path.read_text() == "mine"
    assert other.exists() == (kind == "link")


def test_every_file_of_a_job_can_be_overwritten(tmp_path, run):
    words = {
        "ray": "ray --topology h100:8",
        "slurm": "slurm --topology h100:8 --partition p --time 60",
    }
    for kind, text in words.items():
        command = ["export-job", *text.split(), "--compile-cache", "/c", "--command", "true"]
        out = tmp_path / kind
        assert run(*command, "--out", out)[0] == 0
        written = {path.name: path.read_bytes() for path in out.iterdir()}
        assert run(*command, "--out", out, "--overwrite")[0] == 0
        assert {path.name: path.read_bytes() for path in out.iterdir()} == written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "Job_1"], "--name 'Job_1' must be at most 40 lower-case letters"),
        (["--tokens", "5"], "--tokens has no effect without --model"),
        (["--mesh", "seq=4"], "--mesh has no effect without --model"),
        (["--partition", "p"], "--partition has no effect with jobset"),
        (["--command", ""], "--command must not be empty"),
        (["--model", "nowhere"], "there is no such model"),
    ],
)
def test_a_mistake_gets_one_line_and_no_file(arguments, message, tmp_path, run):
    code, out, err = exported(run, tmp_path / "o", *arguments)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert not (tmp_path / "o").exists()


def test_an_out_that_is_a_file_is_named(tmp_path, run):
    (tmp_path / "o").write_text("x")
    code, _, err = exported(run, tmp_path / "o")
    assert code == 2
    assert f"error: {tmp_path / 'o'} is a file: give a directory" in err


def test_a_kind_that_there_is_not_is_refused(tmp_path, run):
    code, _, err = run("export-job", "nomad", "--topology", "v5e:4x4", "--out", tmp_path)
    assert code == 2
    assert "KIND 'nomad' is not one of jobset, xpk, gcloud, ray, slurm" in err
