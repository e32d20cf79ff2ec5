"""The Hugging Face hub: a time limit for its answers, and the upload of a folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .errors import DiffpoError

SILENCE = 60.0  # seconds without a byte from the hub after which a request fails


def limit_waiting() -> None:
    """Set the limit `SILENCE`; call it before any request. By default huggingface_hub 1 and 2 wait without limit."""
    from huggingface_hub.utils import get_session

    get_session().timeout = SILENCE


def client(repository: str) -> Any:
    """The hub's client. DiffpoError, before any work is done, if the name is invalid or the user is not logged in."""
    from huggingface_hub import HfApi

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise DiffpoError(f"--push expects OWNER/NAME, not {repository!r}")
    limit_waiting()
    api = HfApi()
    try:
        api.whoami()
    except Exception as error:  # the HTTP client and its exceptions depend on the version of huggingface_hub
        raise _unreachable(repository, error, "Nothing was written") from error
    return api


def push(api: Any, repository: str, out: Path) -> None:
    """Upload the folder ``out``. A new repository is private."""
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(out), commit_message="diffpo export")
    except Exception as error:
        later = f"The export in {out} is complete; upload it later with `hf upload {repository} {out}`"
        raise _unreachable(repository, error, later) from error
    print(f"uploaded to https://huggingface.co/{repository}; a new repository is private until you publish it")


def _unreachable(repository: str, error: Exception, state: str) -> DiffpoError:
    reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    return DiffpoError(
        f"cannot upload to {repository}: {reason}. {state}. Check the network and HF_HUB_OFFLINE, and log in with "
        "`hf auth login`"
    )
