"""Download models from the Hugging Face hub and upload them; downloaded files are never executed."""

from __future__ import annotations

from pathlib import Path

from slimming.errors import ConfigError, OutputError
from slimming.models.downloads import PREFIX, first_line, hub_failures
from slimming.models.downloads import fetch as fetch
from slimming.models.downloads import is_address as is_address
from slimming.models.downloads import split as split


def check_name(repository: str) -> None:
    """Check that ``repository`` is a plain name that can be written to.

    Raises:
        ConfigError: it is not.
    """
    if is_address(repository) or split(repository)[1] is not None:
        raise ConfigError(f"{repository!r} cannot be written to; give OWNER/NAME, without {PREFIX} and @REVISION.")


def upload(directory: Path, repository: str, *, private: bool, message: str) -> str:
    """Create the repository if it does not exist, and upload the files of ``directory`` to it as one commit.

    Returns:
        The URL of the commit.

    Raises:
        ConfigError: the name is malformed.
        OutputError: no user is logged in, writing is not permitted, or the hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    check_name(repository)
    hub = huggingface_hub.HfApi(library_name="slimming")
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        done = hub.upload_folder(repo_id=repository, folder_path=directory, commit_message=message)
    except hub_failures() as error:
        reason = first_line(error)
        answer = error.response if isinstance(error, HfHubHTTPError) else None  # None without one, before 1.0
        forbidden = answer is not None and answer.status_code in (401, 403)
        if forbidden or isinstance(error, LocalTokenNotFoundError):
            raise OutputError(
                f"{repository} may not be written ({reason}). Log in with a token that may write to it: hf auth login."
            ) from error
        raise OutputError(
            f"{repository} was not written: the hub could not be reached, or refused ({reason}). Try again, or write "
            "the files to a directory with --to DIRECTORY."
        ) from error
    return str(done.commit_url)
