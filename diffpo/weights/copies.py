"""What stands beside the weights that are trained: the base model, and a second copy that a moving reference keeps.

Of a LoRA, the base is the same module with its adapter switched off, and the second copy is a second adapter. Of a
network that is trained as a whole, both are frozen copies of it (full.py).
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from ..config import ObjectiveSettings
from .lora import ADAPTER, adapter_parameters, inject

NAME = "reference"  # of the second adapter


def switched(network: torch.nn.Module, adapter: str | None) -> contextlib.AbstractContextManager[torch.nn.Module]:
    """What ``network`` is with ``adapter`` alone active (None: all off), without gradients."""
    from ..weights import full

    return network.frozen_copies.on(adapter or full.BASE) if full.trains(network) else _switched(network, adapter)


@contextlib.contextmanager
def _switched(network: torch.nn.Module, adapter: str | None) -> Iterator[torch.nn.Module]:
    """The module with ``adapter`` alone active (None: all off), blind to users (objective/users.py), without gradients.

    Afterwards the active adapters and every `requires_grad` are as they were: peft's switches set them, and optimiser
    and DDP know the policy's parameters as trainable. ``network`` is the bare module, not its DDP wrapper: a forward
    pass of the wrapper would wait for a backward pass.
    """
    import torch

    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    active = [(list(layer.active_adapters), layer.disable_adapters) for layer in layers]
    trainable = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    try:
        for layer in layers:
            if adapter is None:
                layer.enable_adapters(False)
            else:
                layer.set_adapter([adapter])
                layer.enable_adapters(True)
        for parameter, was in trainable:  # at once: FSDP keeps what it sees when it gathers a block
            parameter.requires_grad_(was)
        with torch.no_grad(), silenced(network):
            yield network
    finally:
        for layer, (names, off) in zip(layers, active, strict=True):
            layer.set_adapter(names)
            layer.enable_adapters(not off)
        for parameter, was in trainable:
            parameter.requires_grad_(was)


def adapter_off(network: torch.nn.Module) -> contextlib.AbstractContextManager[torch.nn.Module]:
    """The base model: the policy's own module with its adapter switched off, and no second copy of it unless the whole
    network is trained."""
    return switched(network, None)


@contextlib.contextmanager
def silenced(network: torch.nn.Module) -> Iterator[None]:
    """Within it the module ignores users, if it knows any."""
    module = getattr(network, "user_tokens", None)
    if module is None:
        yield
        return
    before, module.silent = module.silent, True
    try:
        yield
    finally:
        module.silent = before


def needed(objective: ObjectiveSettings) -> list[str]:
    """Which frozen copies of a network that is trained as a whole its objective needs."""
    from ..weights import full

    policy = objective.reference.policy
    samples = objective.source == "self_play" or objective.rollout.sampler == "reference"
    # a step scorer may read the base's features
    base = objective.weighting == "measured" or objective.source == "pool" or (policy == "none" and samples)
    names = [full.BASE] if base or policy == "adapter_off" else []
    return names + ([] if policy in ("adapter_off", "none") else [NAME])


def add_adapter(network: torch.nn.Module) -> None:
    """A second adapter with the policy's LoraConfig and weights; the policy's stays the active one."""

    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # its random start is overwritten
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # having two is meant
        inject(network, copy.deepcopy(network.peft_config[ADAPTER]), NAME)
    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(ADAPTER)
    for parameter in trainable:  # adding an adapter freezes the others
        parameter.requires_grad_(True)
    policy = weights(network, ADAPTER)
    for name, weight in weights(network, NAME).items():
        weight.requires_grad_(False)
        weight.data = policy[name].detach().clone()  # in the policy's precision, float32


def weights(network: torch.nn.Module, adapter: str) -> dict[str, torch.nn.Parameter]:
    """The parameters of one adapter, by names that do not tell which; of a network that is trained as a whole, its own
    or its copy's."""
    from ..weights import full

    if full.trains(network):
        module = network if adapter == ADAPTER else network.frozen_copies.modules[adapter]
        return dict(module.named_parameters())
    return adapter_parameters(network, adapter)
