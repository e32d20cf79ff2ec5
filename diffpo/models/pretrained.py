"""Calls of the libraries' `from_pretrained`: where a model is, how errors are reported, which remarks are hidden."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..common.errors import DiffpoError

HARMLESS = (
    "No LoRA keys associated to CLIPTextModel",  # our LoRAs adapt the UNet alone
    "Token indices sequence length is longer than",  # it is truncated; `too_long` counts what is
    "The following part of your input was truncated",  # the same, with all of the text
    "should be kept in float32: []",  # none should; of networks from one file
)
# peft imports bitsandbytes whether it is used or not, which then misses kernels of the hub
logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)


def hush() -> None:
    """Hide the libraries' remarks in `HARMLESS`; all others are shown."""
    for library in ("diffusers", "transformers"):
        for handler in logging.getLogger(library).handlers:
            if _worth_saying not in handler.filters:
                handler.addFilter(_worth_saying)


def _worth_saying(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in HARMLESS)


def local(path: str) -> str:
    """``~`` expanded where the path is a folder here; a hub id as it is."""
    folder = os.path.expanduser(path)
    return folder if os.path.isdir(folder) else path


def dtype_option(dtype: Any) -> dict[str, Any]:
    """`from_pretrained`'s name for the dtype: diffusers 0.42 renamed torch_dtype."""
    import diffusers
    from packaging.version import Version

    return {"dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype": dtype}


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
    """Turns what `from_pretrained` raises for a model that cannot be loaded into one message with the next step."""
    try:
        yield
    except Exception as error:
        if not hub_failed(error):
            raise
        reason, first = (" ".join(str(each).split())[:300] for each in (error, _first_cause(error)))
        if os.path.isdir(local(path)):
            raise DiffpoError(f"cannot read the model in {path}: {reason}") from error
        if path.startswith(("/", "~", ".")) or path.count("/") > 1:
            raise DiffpoError(
                f"there is no model in {path}: no such folder (relative paths start from {Path.cwd()}). A model is a "
                f"diffusers folder that holds model_index.json, or a hub id"
            ) from error
        offline = ""
        if os.environ.get("HF_HUB_OFFLINE", "0") != "0":
            offline = " HF_HUB_OFFLINE is set, so it was not looked up."
        raise DiffpoError(
            f"cannot load the model {path!r}: it is not a folder in {Path.cwd()}, and not available from the hub."
            f"{offline} With a network, run `hf download {path}` once (log in with `hf auth login` if the model is "
            f"gated). Without one, set model.path (or --model) to a local folder that holds model_index.json. ({reason}"
            f"{f'; {first}' if first not in reason else ''})"
        ) from error


def hub_failed(error: Exception) -> bool:
    """Is it what the libraries raise for files that cannot be read or fetched?"""
    # safetensors and huggingface_hub derive theirs from these three, the hub's HTTP client (httpx) does not
    return isinstance(error, (OSError, ValueError, RuntimeError)) or type(error).__module__.startswith("http")


def _first_cause(error: BaseException) -> BaseException:
    """What the hub's client wraps: a time-out, a status of the server."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
