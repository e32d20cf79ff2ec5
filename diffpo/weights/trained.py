"""What a run trains and writes: a LoRA (adapter.py), or with `lora: null` the whole network (full.py).

The rest of the program uses `Weights`, and does not ask which of the two it is.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..config import Config
from . import lora_file
from .adapter import LoraWeights
from .full import WholeNetwork

if TYPE_CHECKING:
    import torch

    from ..models import Family


class Weights(Protocol):
    """What is trained of ``network``, the bare module.

    Its copies have names: `lora.ADAPTER` is the policy, `lora.REFERENCE` the copy that a moving reference keeps,
    `lora.BEHAVIOUR` that of the behaviour policy, and None the base model.
    """

    network: torch.nn.Module

    def begin(self, config: Config, family: Family) -> list[torch.nn.Parameter]:
        """The parameters that are trained, float32; a LoRA is added to the network."""

    def state(self) -> dict[str, torch.Tensor]:
        """What is trained, on the CPU."""

    def set_state(self, state: dict[str, torch.Tensor]) -> None:
        """Put `state` back."""

    # ---- the base and further copies

    def frozen(self) -> list[torch.nn.Module]:
        """The frozen copies that are computed beside the network."""

    def switched(self, adapter: str | None) -> contextlib.AbstractContextManager[torch.nn.Module]:
        """A context whose value is the network with ``adapter`` alone active, without gradients."""

    def add_copy(self, name: str) -> None:
        """Begin the copy ``name``, equal to the policy."""

    def parameters(self, adapter: str) -> dict[str, torch.nn.Parameter]:
        """Those of the policy or of a copy, by the same names."""

    # ---- files

    def gather(self) -> dict[str, torch.Tensor] | None:
        """What `save` needs of a network that is sharded over processes: to be called by all of them alike."""

    def path_in(self, folder: Path, component: str) -> Path:
        """Where `save` writes to: the LoRA file, or the folder of the network."""

    def save(self, folder: Path, gathered: Any, component: str, about: dict[str, Any]) -> None:
        """Write it into ``folder``, all of it or nothing; ``gathered`` is of `gather`."""

    def restore(self, folder: Path, component: str) -> None:
        """Put back what `save` wrote into ``folder``."""

    # ---- of a file or folder that `find` found

    @staticmethod
    def file_hash(file: Path) -> str:
        """sha256 of the content."""

    @staticmethod
    def knows_users(file: Path) -> bool:
        """Was it trained with users?"""

    @staticmethod
    def check(pipe: Any, file: Path) -> None:
        """DiffpoError unless it belongs to the base model ``pipe`` and all of it can be applied."""

    @staticmethod
    def load_into(pipe: Any, file: Path, strength: float = 1.0) -> None:
        """Turn the base model ``pipe`` into the trained one, after `check`; ``strength``: of a LoRA."""


def load(config: Config, family: Family, device: Any) -> Weights:
    """The network before training; a network that is trained as a whole has the frozen copies that its objective
    needs."""
    return (WholeNetwork if config.lora is None else LoraWeights).load(config, family, device)


def of(network: torch.nn.Module) -> Weights:
    """What is trained of a network that `load` gave, or that a LoRA was added to."""
    return WholeNetwork(network) if WholeNetwork.owns(network) else LoraWeights(network)


# ---- files


def find(path: str | Path) -> Path:
    """What ``path`` (a file, or the folder of a run or checkpoint) means: a LoRA file, or the folder of a network that
    was trained as a whole. DiffpoError if there is neither."""
    return WholeNetwork.find(path) or lora_file.lora_file(path)


def _kind(found: Path) -> type[Weights]:
    return WholeNetwork if found.is_dir() else LoraWeights


def file_hash(path: str | Path) -> str:
    """sha256 of what ``path`` means."""
    found = find(path)
    return _kind(found).file_hash(found)


def knows_users(path: str | Path) -> bool:
    """Was it trained with users?"""
    found = find(path)
    return _kind(found).knows_users(found)


def check(pipe: Any, path: str | Path) -> None:
    """DiffpoError unless what ``path`` means belongs to the base model ``pipe``."""
    found = find(path)
    _kind(found).check(pipe, found)


def load_into(pipe: Any, path: str | Path, strength: float = 1.0) -> None:
    """Turn the base model ``pipe`` into the trained one, after `check`; ``strength``: of a LoRA."""
    found = find(path)
    _kind(found).load_into(pipe, found, strength)
