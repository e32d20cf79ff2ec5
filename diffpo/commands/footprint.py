"""What `diffpo check` says of the model: its parameters, and what caches and training will take."""

from __future__ import annotations

from typing import Any

from ..config import Config
from ..data.groups import Groups
from ..weights import copies
from . import disk

CHECKPOINTED = (  # what diffusers recomputes in the backward pass
    "ResnetBlock2D",
    "BasicTransformerBlock",
    "JointTransformerBlock",
    "FluxTransformerBlock",
    "FluxSingleTransformerBlock",
)


def footprint(config: Config, groups: Groups | None, say: Any) -> None:
    """Parameters, and rough estimates of the caches' size and of memory, from the shapes alone (meta device)."""
    from .. import models
    from ..data.batches import latents_can_be_cached
    from ..models import storage
    from ..weights.full import BASE
    from ..weights.lora import add_lora

    family = models.load(config.model, config.train.precision, config.data.resolution)
    network = family.meta_network()
    members = groups.members if groups is not None else 2
    if groups:
        family.require_sizes(groups.targets)
        text, latents = disk.size(family, network, groups, latents_can_be_cached(config.data))
        say(f"          they take up to {_amount(text)} (text) and {_amount(latents)} (latents) of disk")
    small = config.model.base_weights
    spread = small == "fp8" and not config.train.gradient_checkpointing  # autograd keeps what was computed with
    weights = storage.size(network, "full" if spread else small)
    total = sum(parameter.numel() for parameter in network.parameters())
    if config.lora is None:
        trained, what, held = total, "all of them", "network"
        half = weights if config.train.precision != "no" else 0  # autocast's copy of what is trained
        weights = sum(weights if name == BASE else 4 * total for name in copies.needed(config.objective))
    else:
        trained = sum(parameter.numel() for parameter in add_lora(network, config.lora, family.lora_targets))
        name = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr"}[config.lora.kind]
        what, held, half = f"{name} rank {config.lora.rank}", name, 0
    kept = activations(family, network, members * config.train.batch_size, config.data.resolution, config.train)
    optimizer = trained * (2 if "8bit" in config.train.optimizer else 8)
    how = "" if small == "full" else f", kept as {small}"
    say(f"model     {type(family).__name__}, {family.prediction}; {total:,} parameters in {str(family.dtype)[6:]}{how}")
    say(f"          {trained:,} trainable ({what}, float32)")
    if spread:
        say("          fp8 saves memory only with train.gradient_checkpointing=true")
    parts = {
        "frozen weights": weights,
        f"{held}, gradients, optimiser": half + 8 * trained + optimizer,
        "activations": kept,
    }
    amounts = ", ".join(f"{name} {_amount(size)}" for name, size in parts.items())
    say(f"memory    roughly {_amount(sum(parts.values()))} while training ({amounts}); encoders are freed before")


def _amount(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def activations(family: Any, network: Any, samples: int, resolution: int, train: Any) -> int:
    """Bytes that a backward pass needs, counted as the outputs of all layers; under gradient checkpointing, the
    outputs of the checkpointed blocks and the inside of the largest one. An estimate: kernels save less, and their
    work space is extra."""
    import torch

    blocks = {name: [0, 0] for name, module in network.named_modules() if type(module).__name__ in CHECKPOINTED}
    outside = 0

    def note(name: str, leaf: bool) -> Any:
        block = next((block for block in blocks if name.startswith(block + ".")), None)

        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            nonlocal outside
            size = output.numel() * output.element_size() if isinstance(output, torch.Tensor) else 0
            if not leaf:
                blocks[name][1] += size
            elif block:
                blocks[block][0] += size
            else:
                outside += size

        return hook

    hooks = []
    for name, module in network.named_modules():
        leaf = not any(True for _ in module.children())
        if leaf or name in blocks:
            hooks.append(module.register_forward_hook(note(name, leaf)))
    with torch.no_grad():
        family.predict(network, *family.meta_inputs(network, samples, resolution))
    for hook in hooks:
        hook.remove()
    inside, outputs = [size for size, _ in blocks.values()], [size for _, size in blocks.values()]
    if train.gradient_checkpointing:
        return outside + sum(outputs) + max(inside, default=0)
    return outside + sum(inside)
