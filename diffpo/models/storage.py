"""How the frozen network is kept in memory, and which kernels compute its attention, behind `model.base_weights`,
`model.offload` and `model.attention`.

fp8 and nf4 keep the weights of linear layers (fp8: of convolutions too, and of none within a norm) in 8 or about 4.1
bits, and compute with them in the run's precision. The network keeps a record of the weights it was made from, by which
a LoRA finds its base whatever the storage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from ..common.errors import DiffpoError
from . import frozen
from .identity import base_identity

# a weight; nf4 has a scale for each 64, and for each 256 of these
BYTES = {"fp8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
LAYERS = {"fp8": frozen.LAYERS, "nf4": (torch.nn.Linear,)}


def keep(network: torch.nn.Module, how: str, offload: bool, dtype: torch.dtype) -> torch.nn.Module:
    """Keep the frozen weights of ``network`` as ``how`` (full | fp8 | nf4) says, and in the CPU's memory if
    ``offload``; it computes in ``dtype``. On the CPU, before a LoRA is added; NF4's are packed when it moves to its
    device. DiffpoError as of `check`.

    diffusers' loader does the same with a BitsAndBytesConfig, but only on a GPU, and without a record of the
    weights."""
    check(network, how)
    network.kept_from = base_identity(network)
    if how != "nf4":
        small = {layer for _, layer in _layers(network, how)} if how == "fp8" else set()
        for layer in [layer for layer in network.modules() if isinstance(layer, frozen.LAYERS)]:
            if layer in small or offload:
                frozen.freeze(layer, dtype, torch.float8_e4m3fn if layer in small else None, offload)
        return network
    import bitsandbytes

    for name, layer in list(_layers(network, how)):
        small = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, dtype, quant_type="nf4", device="meta"
        )
        small.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        small.bias = layer.bias
        network.set_submodule(name, small)
    network.is_loaded_in_4bit = True  # peft asks
    return network.requires_grad_(False)


def size(network: torch.nn.Module, how: str, offload: bool = False) -> int:
    """Bytes that the weights of ``network`` take on the device when they are kept as ``how`` and ``offload`` say. Of
    offloaded ones the largest counts, which is there while its layer computes."""
    total = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    if offload:
        layers = [layer for layer in network.modules() if isinstance(layer, frozen.LAYERS)]
        sizes = [sum(each.numel() * each.element_size() for each in layer.parameters()) for layer in layers]
        return total - sum(sizes) + max(sizes, default=0)
    if how == "full":
        return total
    # fp8 takes a layer's bias too
    kept = [
        each for _, layer in _layers(network, how) for each in (layer.parameters() if how == "fp8" else [layer.weight])
    ]
    return total - round(sum(each.numel() * (each.element_size() - BYTES[how]) for each in kept))


def _layers(network: torch.nn.Module, how: str) -> Iterator[tuple[str, torch.nn.Module]]:
    """The layers that are kept small, by name: those that diffusers' layerwise casting takes, or for NF4, as in
    diffusers' loader, all linear ones (but proj_in and proj_out)."""
    from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

    if how == "fp8":
        patterns = (*DEFAULT_SKIP_MODULES_PATTERN, *(network._skip_layerwise_casting_patterns or ()))
    else:
        patterns = ("^proj_in$", "^proj_out$")
    skipped = re.compile("|".join((*patterns, *(network._keep_in_fp32_modules or ()))))
    for name, layer in network.named_modules():
        if isinstance(layer, LAYERS[how]) and not skipped.search(name):
            yield name, layer


def check(network: torch.nn.Module, how: str) -> None:
    """DiffpoError if ``network`` (on the meta device will do) cannot be kept as ``how``: NF4 without bitsandbytes."""
    if how == "nf4":
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise DiffpoError(
                f'model.base_weights=nf4 needs bitsandbytes ({error}): pip install "diffpo[quantised]"'
            ) from None


def set_attention(network: torch.nn.Module, name: str) -> None:
    """Compute attention by diffusers' backend ``name``. DiffpoError if there is none of that name, if its package or
    hardware is missing, or if diffusers has no such switch in this network."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = [backend.value for backend in AttentionBackendName if not backend.value.endswith("_hub")]
    if name not in known:  # those named hub run code from the hub
        raise DiffpoError(f"model.attention={name} is not a backend of diffusers: choose one of {', '.join(known)}")
    processors = [module.processor for module in network.modules() if hasattr(module, "processor")]
    try:
        if any(hasattr(processor, "_attention_backend") for processor in processors):
            network.set_attention_backend(name)
        elif name == "xformers":
            network.enable_xformers_memory_efficient_attention()
        elif name != "native":  # which is what these do
            raise DiffpoError(
                f"model.attention={name} does not work with {type(network).__name__}: choose native (torch's "
                f"scaled_dot_product_attention, which uses a flash kernel where it can) or xformers"
            )
    except (ImportError, RuntimeError, ValueError, AssertionError) as error:
        raise DiffpoError(f"model.attention={name} cannot be used here: {' '.join(str(error).split())}") from None
