"""Download models from the Hugging Face hub; downloaded files are never executed."""

from __future__ import annotations

import re
from pathlib import Path

from slimming.errors import CheckpointError, ConfigError

PREFIX = "hf-hub:"
SETTINGS = ("config.json", "structure.json", "provenance.json", "preprocessor_config.json")
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "weights.safetensors")
"""Names of the files that are downloaded; code and pickles are not."""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_address(name: str | Path) -> bool:
    """Return whether ``name`` is the address of a repository on the hub."""
    return isinstance(name, str) and name.startswith(PREFIX)


def split(name: str) -> tuple[str, str | None]:
    """Split an address into repository and revision; the revision is None if it is not given.

    Raises:
        ConfigError: the address is malformed.

    >>> split("hf-hub:owner/name@main")
    ('owner/name', 'main')
    """
    repository, at, revision = name.removeprefix(PREFIX).partition("@")
    if not _NAME.fullmatch(repository) or ".." in repository or (at and not revision):
        raise ConfigError(f"{name!r} is not a repository; give {PREFIX}OWNER/NAME, or {PREFIX}OWNER/NAME@REVISION.")
    return repository, revision or None


def fetch(name: str, *, weights: bool = True) -> Path:
    """Download the files of a model to the local cache and return their directory.

    Args:
        name: ``hf-hub:owner/name``, optionally followed by ``@revision``.
        weights: whether to download the weights too.

    Raises:
        ConfigError: the address is malformed.
        CheckpointError: there is no such repository or revision, access is denied, the repository contains no model, or
            the hub cannot be reached.
    """
    import huggingface_hub

    repository, revision = split(name)
    try:
        path = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=[*SETTINGS, *(WEIGHTS if weights else ())]
        )
    except hub_failures() as error:
        raise CheckpointError(_download_failure(repository, revision, error)) from error
    directory = Path(path)
    if not (directory / "config.json").exists() and not (directory / "structure.json").exists():
        raise CheckpointError(f"{name} has no config.json: it is not a model of slimming, timm or transformers.")
    if weights and not any(directory.glob("*.safetensors")):
        raise CheckpointError(f"{name} has no model.safetensors; weights in other formats are not loaded from the hub.")
    return directory


def hub_failures() -> tuple[type[Exception], ...]:
    """Errors that huggingface_hub raises for the hub, the network (RuntimeError with Xet), the disk and bad names."""
    from huggingface_hub import errors

    # From httpx; before huggingface_hub 1.0, from requests.
    http_error: type[Exception] = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
    return http_error, errors.EntryNotFoundError, OSError, ValueError, RuntimeError


def _download_failure(repository: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return f"{repository} is gated: accept its terms on the hub, then log in with hf auth login."
    if isinstance(error, RevisionNotFoundError):
        return f"{repository} has no revision {revision!r}. Leave it out to take the main one."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"There is no repository {repository} on the hub, or it is private. Check its name; for a private one, log "
            "in with hf auth login."
        )
    return (
        f"{repository} could not be fetched ({first_line(error)}). It is not in the local cache, and the hub could not "
        "be reached: check the network and HF_HUB_OFFLINE, or give a local directory."
    )


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class if there is none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
