"""The file of a LoRA: where it lies, its weights and the settings in its header."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import DiffpoError
from ..common.text import plain, read_text
from .header import known

if TYPE_CHECKING:
    import torch

FILE_NAME = "pytorch_lora_weights.safetensors"  # diffusers looks for this name in a folder
PEFT_FILE_NAME = "adapter_model.safetensors"  # and peft for this one
USERS_FILE_NAME = "user_tokens.safetensors"  # beside it, if the run trained with users (objective/users.py)
HEADER = "diffpo"  # our key in the safetensors header, beside diffusers' lora_adapter_metadata


def settings_of(path: str | Path) -> dict[str, dict[str, Any]]:
    """peft's settings of the adapters in a file, by the pipeline's part ("" if it does not say which): from the file's
    header, as diffusers writes them, or from the adapter_config.json beside peft's adapter_model.safetensors."""
    from safetensors import safe_open

    path = lora_file(path)
    try:
        with safe_open(path, "pt") as file:
            header = _header(file, "lora_adapter_metadata")
    except Exception as error:
        raise _unreadable(path, error) from error
    if not header and (beside := _config_beside(path)):
        try:
            header = json.loads(read_text(beside))
            if not isinstance(header, dict):
                raise ValueError("it is not a JSON object")
        except (OSError, ValueError, RecursionError) as error:
            raise DiffpoError(
                f"cannot read {beside}: {error}; correct or replace it, because it holds the scale of {path}"
            ) from error
    settings: dict[str, dict[str, Any]] = {}
    for key, value in header.items():
        part, dot, name = key.partition(".")
        settings.setdefault(part if dot else "", {})[name if dot else key] = value
    return settings


def _config_beside(path: Path) -> Path | None:
    """peft's settings beside its weights."""
    beside = path.with_name("adapter_config.json")
    return beside if path.name == PEFT_FILE_NAME and beside.is_file() else None


def sorted_header(content: bytes) -> bytes:
    """The same safetensors file with its header's keys in order: safetensors writes metadata in a random one, and equal
    LoRAs should be equal files. (Format: length of the header as 8 bytes, JSON padded with spaces to a multiple of 8,
    then the data, addressed from its own beginning.)"""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def read_lora(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights, and what is `known` of our header (empty for a file from elsewhere). DiffpoError if the file is
    missing or damaged."""
    from safetensors import safe_open

    path = lora_file(path)
    try:
        with safe_open(path, "pt") as file:
            about = known(_header(file, HEADER))
            return {name: file.get_tensor(name) for name in file.keys()}, about
    except Exception as error:  # of safetensors, and what it says of types that this torch does not know
        raise _unreadable(path, error) from error


def _header(file: Any, key: str) -> dict[str, Any]:
    """The JSON object under ``key`` in the header of an open safetensors file; empty if there is none."""
    found = json.loads((file.metadata() or {}).get(key, "{}"))
    if not isinstance(found, dict):
        raise ValueError(f"{key} in its header is no object")
    return found


def _unreadable(path: Path, error: Exception) -> DiffpoError:
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return DiffpoError(f"the LoRA {path} is not read: pickled files can run code; convert it to safetensors")
    return DiffpoError(f"cannot read the LoRA {path}: {plain(error, 300)} (truncated, or not a safetensors file)")


def lora_file(path: str | Path) -> Path:
    """The LoRA file that ``path`` means: itself, or in the folder ``path`` pytorch_lora_weights.safetensors or
    adapter_model.safetensors."""
    path = Path(path).expanduser()
    if path.is_dir():
        peft = path / PEFT_FILE_NAME
        path = peft if peft.is_file() and not (path / FILE_NAME).is_file() else path / FILE_NAME
    if not path.is_file():
        raise DiffpoError(f"there is no LoRA at {path}; give the file or the folder of a finished training run")
    return path


def users_file(path: str | Path) -> Path:
    """Where the user tokens of the run lie whose LoRA ``path`` means; it is there if the run trained with users."""
    return lora_file(path).parent / USERS_FILE_NAME


def file_hash(path: str | Path) -> str:
    """sha256 of the LoRA file that ``path`` means, and of peft's settings beside it."""
    path = lora_file(path)
    beside = _config_beside(path)
    return sha256(path.read_bytes() + (beside.read_bytes() if beside else b"")).hexdigest()
