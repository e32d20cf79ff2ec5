"""Weights from a file, without running anything that is in it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a file of `torch.save` that holds a state dict, bare or as its entry
    "state_dict". A file that holds a whole pickled model is refused by torch, because reading it would run it."""
    if str(path).endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)
    return state.get("state_dict", state)
