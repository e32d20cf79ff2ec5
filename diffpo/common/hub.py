"""The Hugging Face hub: how long it is waited for, and uploading a folder to it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .errors import DiffpoError

SILENCE = 60.0  # seconds without a byte from the hub after which a request is given up


def limit_waiting() -> None:
    """To be called before anything asks the hub: its client waits for ever by default (huggingface_hub 1 and 2)."""
    from huggingface_hub.utils import get_session

    get_session().timeout = SILENCE


def client(repository: str) -> Any:
    """The hub's client; DiffpoError before any work is done if the name is no name or nobody is logged in."""
    from huggingface_hub import HfApi

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise DiffpoError(f"--push takes OWNER/NAME, not {repository!r}")
    limit_waiting()
    api = HfApi()
    try:
        api.whoami()
    except Exception as error:  # of the HTTP client, which differs between versions of huggingface_hub
        raise _unreachable(repository, error, "Nothing was written") from error
    return api


def push(api: Any, repository: str, out: Path) -> None:
    """Upload the folder; a new repository is private until its owner opens it."""
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(out), commit_message="diffpo export")
    except Exception as error:
        later = f"The export is whole, in {out}: `hf upload {repository} {out}` sends it later"
        raise _unreachable(repository, error, later) from error
    print(f"uploaded to https://huggingface.co/{repository}; a new repository is private until you open it")


def _unreachable(repository: str, error: Exception, state: str) -> DiffpoError:
    reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    return DiffpoError(
        f"cannot upload to {repository}: {reason}. {state}. Look at the network and HF_HUB_OFFLINE, and log in with "
        f"`hf auth login`"
    )
