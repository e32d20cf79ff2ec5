"""What `diffpo check` prints about the model: its parameters, and the memory that caches and training need."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import Config, Data, Train
from ..data.groups import Groups
from . import disk

if TYPE_CHECKING:
    import torch

    from ..models import Family


def footprint(config: Config, groups: Groups | None, say: Callable[[str], None], sources: int | None = None) -> None:
    """Parameters, and rough estimates of the caches' size and of memory, from the shapes alone (meta device).
    ``sources``: see `activations`."""
    from .. import models
    from ..data.batches import latents_can_be_cached

    family = models.load(config.model, config.train.precision, config.data.resolution)
    network = family.meta_network()
    if groups:
        family.require_sizes(groups.targets)
        text, latents = disk.size(family, network, groups, latents_can_be_cached(config.data))
        say(f"          they take up to {_amount(text)} (text) and {_amount(latents)} (latents) of disk")
    small = config.model.base_weights
    total = sum(parameter.numel() for parameter in network.parameters())
    weights = _weights(config, family, network)
    samples = members(groups) * config.train.batch_size
    kept = activations(family, network, samples, config.data, config.train, sources)
    how = "" if small == "full" else f", kept as {small}"
    say(f"model     {type(family).__name__}, {family.prediction}; {total:,} parameters in {str(family.dtype)[6:]}{how}")
    say(f"          {weights.numbers:,} trainable ({weights.what}, float32)")
    parts = {"frozen weights": weights.frozen, f"{weights.held}, gradients, optimiser": weights.trained}
    after = "encoders are freed before"
    if kept is None:
        after += f"; activations are not known: {type(family).__name__}.repeated_blocks is not set"
    else:
        parts["activations"] = kept
    amounts = ", ".join(f"{name} {_amount(size)}" for name, size in parts.items())
    say(f"memory    roughly {_amount(sum(parts.values()))} while training ({amounts}); {after}")


def members(groups: Groups | None) -> int:
    """Images of a group; of an objective without data, those of a pair."""
    return groups.members if groups is not None else 2


class Weights(NamedTuple):
    """Bytes on the device: of the ``frozen`` weights, and of what is ``trained`` (so many ``numbers``) with gradients
    and optimiser; ``held`` and ``what``: that in words."""

    frozen: int
    trained: int
    numbers: int
    held: str
    what: str


def _weights(config: Config, family: Family, network: torch.nn.Module) -> Weights:
    """Adds the LoRA to ``network``."""
    import torch

    from ..models import storage
    from ..weights import full
    from ..weights.lora import add_lora

    frozen = storage.size(network, config.model.base_weights, config.model.offload)
    if config.lora is None:
        count, what, held = sum(each.numel() for each in network.parameters()), "all of them", "network"
        half = frozen if config.train.precision != "no" else 0  # autocast's copy of what is trained
        frozen = sum(frozen if name == full.BASE else 4 * count for name in full.needed(config.objective))
    else:
        count = sum(each.numel() for each in add_lora(network, config.lora, family.lora_targets))
        held, half = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr"}[config.lora.kind], 0
        what = f"{held} rank {config.lora.rank}"
        if config.lora.text_encoders:
            from ..weights.text_encoders import attach

            clips = {name: encoder(family, name) for name in family.clips}
            frozen += sum(each.numel() for clip in clips.values() for each in clip.parameters()) * family.dtype.itemsize
            count += sum(each.numel() for each in attach(torch.nn.Module(), clips, config.lora, 0))
            what += ", of text encoders too"
    name = config.train.optimizer
    moments = 0 if "Paged" in name else 2 if "8bit" in name else 8  # paged ones leave the device when it is full
    return Weights(frozen, half + (8 + moments) * count, count, held, what)


def encoder(family: Family, name: str) -> torch.nn.Module:
    """A text encoder with shapes and no weights."""
    import torch
    import transformers

    cls = getattr(transformers, family.source.index()[name][1])
    with torch.device("meta"):
        return cls(cls.config_class(**family.source.config(name)))


def _amount(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def activations(
    family: Family, network: torch.nn.Module, samples: int, data: Data, train: Train, sources: int | None = None
) -> int | None:
    """Bytes that a backward pass needs, counted as the outputs of all layers; under gradient checkpointing, the
    outputs of the checkpointed blocks and the inside of the largest one. None if these blocks are not known. An
    estimate: kernels save less, and their work space is extra. ``sources``: pictures to edit of each sample; None is
    one if the config names their column."""
    import torch

    kinds = family.checkpointed_blocks()
    if train.gradient_checkpointing and not kinds:
        return None
    blocks = {name: [0, 0] for name, module in network.named_modules() if type(module).__name__ in kinds}
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
        batch = family.meta_inputs(network, samples, data.resolution, sources or int(data.columns.source is not None))
        family.predict(network, *batch)
    for hook in hooks:
        hook.remove()
    inside, outputs = [size for size, _ in blocks.values()], [size for _, size in blocks.values()]
    if train.gradient_checkpointing:
        return outside + sum(outputs) + max(inside, default=0)
    return outside + sum(inside)
