"""download: fetch a model from a Hugging Face hub into the local cache."""

import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from qwen_jax.cli.flags import note, option, says
from qwen_jax.config import ConfigError
from qwen_jax.files.reading import printable, shown
from qwen_jax.models import presets
from qwen_jax.storage import hub
from qwen_jax.storage.manifest import READ_FILES

_FILES = (*READ_FILES, "vocab.json", "merges.txt", "adapter_config.json")
_WEIGHTS = ("*.safetensors", "model.safetensors.index.json")


def download(
    model: Annotated[
        str,
        typer.Argument(
            metavar="ID",
            help="Model in the hub, as Qwen/Qwen2.5-7B-Instruct-1M, or "
            f"{' or '.join(presets.NAMES)}.",
        ),
    ],
    revision: Annotated[str | None, option("Branch, tag or commit; the main branch.")] = None,
):
    """Fetch a model from a Hugging Face hub into the local cache.

    Weights in safetensors, configuration and tokenizer are fetched, and nothing else. Afterwards
    ID stands for the model wherever a MODEL is asked for. Prints its directory. HF_TOKEN,
    HF_ENDPOINT, HF_HOME and HF_HUB_CACHE count as in huggingface_hub. No other command uses
    the network.

    Examples:
        qwen-jax download Qwen/Qwen2.5-7B-Instruct-1M
        qwen-jax download Qwen/Qwen2.5-0.5B-Instruct --revision main
    """
    name, given = hub.split_id(presets.HUB_IDS.get(model, model)) or (None, None)
    if name is None:
        raise ConfigError(
            f"ID {printable(model, 60)} is no hub id: give one as Qwen/Qwen2.5-7B-Instruct-1M"
        )
    if given is not None and revision not in (None, given):
        raise ConfigError(f"--revision {printable(revision, 60)} contradicts @{given}")
    print(shown(fetch(name, revision or given)))


def fetch(name: str, revision: str | None = None) -> Path:
    """Downloads the files of a model that are read; returns its snapshot in the local cache.

    Args:
        name: hub id.
        revision: branch, tag or commit; None for the main branch.

    Raises:
        ConfigError: if huggingface_hub is missing, the hub refuses or cannot be reached, the
            repository has no weights in safetensors, or the disk is too small.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
        from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
    except ImportError:
        raise ConfigError(
            "download needs huggingface_hub: pip install -e '.[hub]' in a checkout of qwen-jax"
        ) from None
    wanted = {
        "revision": revision,
        "cache_dir": hub.cache(),
        "allow_patterns": [*_FILES, *_WEIGHTS],
    }
    what = f"{name}@{revision}" if revision else name
    disable_progress_bars()
    try:
        files = huggingface_hub.snapshot_download(name, **wanted, dry_run=True)
        if not any(each.filename.endswith(".safetensors") for each in files):
            raise ConfigError(f"{what} has no weights in safetensors, which is what is read here")
        missing = sum(each.file_size or 0 for each in files if each.will_download)
        _check_space(what, missing)
        note(f"{what}: {len(files)} files, {missing / 1e9:.2f} GB to fetch into {hub.cache()}")
        if says() and sys.stderr.isatty():
            enable_progress_bars()
        return Path(huggingface_hub.snapshot_download(name, **wanted))
    except (
        errors.HTTPError,
        errors.DryRunError,
        errors.LocalEntryNotFoundError,
        errors.FileMetadataError,
        errors.HFValidationError,
        errors.XetDownloadError,
    ) as error:
        raise ConfigError(_complaint(name, revision, error)) from None


def _check_space(what: str, size: int) -> None:
    """Refuses a download that does not fit on the disk of the cache."""
    path = hub.cache().absolute()
    there = next(each for each in (path, *path.parents) if each.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise ConfigError(
            f"{what} takes {size / 1e9:,.2f} GB and {shown(there)} has {free / 1e9:,.2f} GB free: "
            "set HF_HUB_CACHE to a directory on a larger disk"
        )


def _complaint(name: str, revision: str | None, error: BaseException) -> str:
    """Formats an error of a hub, or of the connection to it, as one line."""
    from huggingface_hub import constants, errors

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, errors.HTTPError):
        cause = cause.__cause__
    where = constants.ENDPOINT
    if isinstance(cause, errors.GatedRepoError):
        return f"{name} is gated at {where}: accept its terms there, and set HF_TOKEN to a token"
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"{name} has no revision {printable(revision)} at {where}"
    if isinstance(cause, errors.RepositoryNotFoundError):
        return (
            f"there is no model {name} at {where} that may be read (private ones need HF_TOKEN); "
            "check the spelling"
        )
    if isinstance(cause, errors.HfHubHTTPError):
        return f"{where} answered {cause.response.status_code} about {name}: try again later"
    reason = printable(cause or error.__cause__ or error)
    again = f"qwen-jax download {shlex.quote(name)}"
    return f"{where} cannot be reached ({reason}); what came is kept, go on with: {again}"
