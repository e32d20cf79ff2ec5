"""The header of a model's file: which weights it has, of what type and shape. Nothing is ever unpickled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from ..common.errors import DiffpoError
from ..common.text import plain

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", ".sft", ".gguf", *PICKLED)
CONVERT = """python -c "import torch; from safetensors.torch import save_file
d = torch.load('{0}', map_location='cpu', weights_only=True); d = d.get('state_dict', d)
save_file({{k: v.clone().contiguous() for k, v in d.items() if isinstance(v, torch.Tensor)}}, '{1}')\""""


class Weight(NamedTuple):
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]


def is_one(path: str) -> bool:
    """Does ``path`` mean a file, rather than a folder or a hub id?"""
    expanded = os.path.expanduser(path)  # os.path knows no errors, of names that are too long for example
    named = expanded.lower().endswith(SUFFIXES) or "://" in path
    return not os.path.isdir(expanded) and (named or os.path.isfile(expanded))


def read_header(file: Path, path: str) -> tuple[dict[str, Weight], dict[str, str]]:
    """Names, types and shapes of all weights, and the metadata. DiffpoError unless it is a whole safetensors file."""
    from safetensors import safe_open

    if "://" in path:
        raise DiffpoError(f"{path} is a URL: download the file (`hf download OWNER/NAME FILE`) and give its path")
    if not os.path.isfile(file):
        raise DiffpoError(
            f"there is no file {file} (relative paths start from {Path.cwd()}). To fetch a file from the hub, run "
            f"`hf download OWNER/NAME FILE`, which prints its path"
        )
    try:
        with open(file, "rb") as opened:
            start = opened.read(64)
        if start.startswith(b"GGUF") or file.suffix.lower() == ".gguf":
            raise DiffpoError(f"{file} is quantised for llama.cpp (GGUF): take the model as safetensors")
        # safetensors begin with the header's length, 8 bytes, which may be any
        other = start[8:9] != b"{" and start.startswith((b"PK\x03\x04", b"\x80"))
        if other or file.suffix.lower() in PICKLED:
            command = CONVERT.format(file, file.with_name(f"{file.stem}-converted.safetensors"))
            raise DiffpoError(
                f"{file} is pickled, and a pickle can run any program, so it is not opened. Take the model as "
                f"safetensors, or convert it (this loads only tensors):\n{command}"
            )
        if start.startswith(b"version https://git-lfs"):
            raise DiffpoError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull`")
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            weights = {name: Weight(each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
            return weights, dict(opened.metadata() or {})
    except DiffpoError:
        raise
    except Exception as error:  # of safetensors; OSError
        reason = getattr(error, "strerror", None) or plain(error, 200)
        raise DiffpoError(
            f"cannot read the model {file}: {reason}. It is truncated, or not a safetensors file: download it again"
        ) from error
