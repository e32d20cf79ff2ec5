"""What a run trains and writes: a LoRA (lora.py), or with `lora: null` the whole network (full.py).

The rest of the program asks here, and need not know which of them it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config
from . import copies, full, lora, lora_apply, lora_file

if TYPE_CHECKING:
    import torch


def load_network(config: Config, family: Any, device: Any) -> torch.nn.Module:
    """The network before training; a fully trained one with the frozen copies that the objective compares it with."""
    if config.lora is not None:
        return family.load_network(device)
    return full.load(family, device, copies.needed(config.objective))


def begin(config: Config, family: Any, network: torch.nn.Module) -> list[torch.nn.Parameter]:
    """What is trained, float32; a LoRA is added to the network."""
    if config.lora is None:
        return list(network.parameters())
    parameters = lora.add_lora(network, config.lora, family.lora_targets, config.train.seed)
    if config.lora.start:
        lora_apply.start_from(network, config.lora)
    return parameters


def frozen(network: torch.nn.Module) -> list[torch.nn.Module]:
    """The frozen copies that are computed beside it."""
    return list(network.frozen_copies.modules.values()) if full.trains(network) else []


def state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What is trained, on the CPU."""
    return full.state(network) if full.trains(network) else lora.lora_state(network)


def set_state(network: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put `state` back."""
    if full.trains(network):
        network.load_state_dict(weights)
    else:
        lora.set_lora_state(network, weights)


# ---- files


def gather(network: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """What `save` needs of a network that is sharded over processes: to be called by all of them alike."""
    return None if full.trains(network) else lora.lora_state(network)


def place(folder: Path, network: torch.nn.Module, component: str) -> Path:
    """Where `save` writes to: the LoRA file, or the folder of the network."""
    return folder / (component if full.trains(network) else lora_file.FILE_NAME)


def save(
    folder: Path, network: torch.nn.Module, weights: dict[str, torch.Tensor] | None, component: str, about: dict
) -> None:
    """Write it into ``folder``, all of it or nothing; ``weights`` of `gather`."""
    if full.trains(network):
        full.save(folder, network, component, about)
    else:
        lora.save_lora(folder / lora_file.FILE_NAME, network, component, about, weights)


def restore(folder: Path, network: torch.nn.Module, component: str) -> None:
    """Put back what `save` wrote into ``folder``."""
    if full.trains(network):
        full.read_into(network, folder / component)
    else:
        weights, _ = lora_file.read_lora(folder)
        lora.set_lora_state(network, {name.split(".", 1)[1]: value for name, value in weights.items()})


def find(path: str | Path) -> Path:
    """What ``path`` (a file, or the folder of a run or checkpoint) means: a LoRA file, or the folder of a fully trained
    network. DiffpoError if there is neither."""
    return full.find(path) or lora_file.lora_file(path)


def file_hash(path: str | Path) -> str:
    """sha256 of what ``path`` means."""
    found = find(path)
    return full.weights_hash(found) if found.is_dir() else lora_file.file_hash(found)


def knows_users(path: str | Path) -> bool:
    """Was it trained with users?"""
    found = find(path)
    return not found.is_dir() and lora_file.users_file(found).is_file()


def check(pipe: Any, path: str | Path) -> None:
    """Does it belong to the base model ``pipe``? DiffpoError as of `lora.check_lora` if not."""
    found = find(path)
    full.check(pipe, found) if found.is_dir() else lora_apply.check_lora(pipe, found)


def load_into(pipe: Any, path: str | Path) -> None:
    """Turn the base model ``pipe`` into the trained one, after `check`."""
    found = find(path)
    if found.is_dir():
        full.check(pipe, found)
        full.read_into(lora.network_of(pipe), found)
    else:
        lora_apply.load_lora(pipe, found)
