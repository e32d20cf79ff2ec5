"""A LoRA as what a run trains: the adapter's weights, the base model with the adapter off, a second adapter."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from ..config import Config
from . import lora, lora_apply, lora_file, text_encoders, text_names
from .lora import ADAPTER, adapter_parameters

if TYPE_CHECKING:
    from ..models import Family


class LoraWeights:
    """The LoRA on ``network``; see `trained.Weights`."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network

    @classmethod
    def load(cls, config: Config, family: Family, device: Any) -> LoraWeights:
        return cls(family.load_network(device))

    def begin(self, config: Config, family: Family) -> list[torch.nn.Parameter]:
        assert config.lora is not None  # noqa: S101 (without one the whole network is trained, see `trained.load`)
        parameters = lora.add_lora(self.network, config.lora, family.lora_targets, config.train.seed)
        if config.lora.start:
            lora_apply.start_from(self.network, config.lora)
        if config.lora.text_encoders:
            encoders = family.load_clips(next(self.network.parameters()).device)
            parameters = [*parameters, *text_encoders.attach(self.network, encoders, config.lora, config.train.seed)]
        return parameters

    def state(self) -> dict[str, torch.Tensor]:
        return lora.lora_state(self.network)

    def set_state(self, state: dict[str, torch.Tensor]) -> None:
        lora.set_lora_state(self.network, state)

    # ---- the base and further copies

    def frozen(self) -> list[torch.nn.Module]:
        return []

    @contextlib.contextmanager
    def switched(self, adapter: str | None) -> Iterator[torch.nn.Module]:
        """The network is the bare module, not its DDP wrapper: a forward pass of the wrapper would wait for a backward
        pass. User tokens are left out (objective/users.py)."""
        layers = [module for module in self.network.modules() if isinstance(module, BaseTunerLayer)]
        before = [(layer.active_adapters, layer.disable_adapters) for layer in layers]
        try:
            for layer in layers:
                _choose(layer, layer.active_adapters if adapter is None else [adapter], off=adapter is None)
            with torch.no_grad(), _without_users(self.network):
                yield self.network
        finally:
            for layer, (names, off) in zip(layers, before, strict=True):
                _choose(layer, names, off)

    def add_copy(self, name: str) -> None:
        """Another adapter with the policy's settings and weights; the policy's stays the active one."""
        network = self.network
        trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # its random start is overwritten
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # having two is meant
            lora.inject(network, copy.deepcopy(network.peft_config[ADAPTER]), name)
        for module in network.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter(ADAPTER)
        for parameter in trainable:  # adding an adapter freezes the others
            parameter.requires_grad_(True)
        policy = self.parameters(ADAPTER)
        for own, weight in self.parameters(name).items():
            weight.requires_grad_(False)
            weight.data = policy[own].detach().clone()  # in the policy's precision, float32

    def parameters(self, adapter: str) -> dict[str, torch.nn.Parameter]:
        return adapter_parameters(self.network, adapter)

    # ---- files

    def gather(self) -> dict[str, torch.Tensor]:
        return lora.lora_state(self.network)

    def path_in(self, folder: Path, component: str) -> Path:
        return folder / lora_file.FILE_NAME

    def save(self, folder: Path, gathered: Any, component: str, about: dict[str, Any]) -> None:
        lora.save_lora(folder / lora_file.FILE_NAME, self.network, component, about, gathered)

    def restore(self, folder: Path, component: str) -> None:
        state, _ = lora_file.read_lora(folder)
        self.set_state(text_names.from_file(self.network, state))

    @staticmethod
    def file_hash(file: Path) -> str:
        return lora_file.file_hash(file)

    @staticmethod
    def knows_users(file: Path) -> bool:
        return lora_file.users_file(file).is_file()

    @staticmethod
    def check(pipe: Any, file: Path) -> None:
        lora_apply.check_lora(pipe, file)

    @staticmethod
    def load_into(pipe: Any, file: Path, strength: float = 1.0) -> None:
        lora_apply.load_lora(pipe, file, strength)


def _choose(layer: BaseTunerLayer, names: list[str], off: bool) -> None:
    """The layer's active adapters, and whether they are off. peft's own switches set `requires_grad` too, which
    optimiser, DDP and FSDP count on staying as it is. They also take longer: 0.1 s for SDXL's 560 layers, and this
    takes 0.03 s."""
    layer._active_adapter, layer._disable_adapters = names, off
    if (layer.active_adapters, layer.disable_adapters) != (names, off):
        raise RuntimeError("this version of peft keeps the active adapters elsewhere: install peft==0.21.2")


@contextlib.contextmanager
def _without_users(network: torch.nn.Module) -> Iterator[None]:
    """Within it the network ignores users, if it has user tokens."""
    module = getattr(network, "user_tokens", None)
    if module is None:
        yield
        return
    before, module.silent = module.silent, True
    try:
        yield
    finally:
        module.silent = before
