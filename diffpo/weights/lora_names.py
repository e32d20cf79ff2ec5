"""What LoRA files call the layers of a pipeline's parts.

The names are looked up in the model, as ComfyUI does it, so that tiny and cut networks have them too: diffusers' names,
those of its old attention processors, and those of the family's original code (`Family.names_in_loras`), in which some
layers of diffusers' are one. kohya writes underscores for dots; here all names are written so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ..models import names_in_loras
from ..models.identity import ADAPTED
from .lora_change import Part, Place


def prefixes_of(name: str, part: torch.nn.Module) -> list[str]:
    """What stands before the names of a part's layers; in the end nothing."""
    if not name.startswith("text_encoder"):
        originals = ["diffusion_model_", "model_diffusion_model_"]
        return ["unet_", "transformer_", "lora_unet_", "lora_transformer_", "lycoris_", *originals, ""]
    number = int(name[-1]) if name[-1].isdigit() else 1
    found = [f"{name}_", f"lora_te{number}_", *(["lora_te_"] if number == 1 else [])]
    if "T5" in type(part).__name__:  # FLUX's is the second here, and the third in sd-scripts and in ComfyUI
        return [*found, "lora_te3_", "text_encoders_t5xxl_transformer_", ""]
    clips = ("l", "h") if number == 1 else ("g",)
    return [*found, *(f"text_encoders_clip_{clip}_transformer_" for clip in clips), ""]


def places_of(part: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """The places of a part by all names that files have for them."""
    table: dict[str, Place] = {}
    for layer, shape in shapes.items():
        for name in _spellings(layer):
            table.setdefault(name.replace(".", "_"), (Part(layer, 0, shape[0]),))
    for name, pieces in names_in_loras(part, shapes):
        if all(layer in shapes for layer, _ in pieces):
            rows = {layer: shapes[layer][0] for layer, _ in pieces}
            cuts = {"": (0, 1), "first": (0, 0.5), "second": (0.5, 1)}
            place = tuple(Part(layer, *(int(cut * rows[layer]) for cut in cuts[half])) for layer, half in pieces)
            table.setdefault(name, place)
    return table


def _spellings(layer: str) -> Iterator[str]:
    """A layer's names in diffusers: today's, those of attention processors, and with and without the level of CLIP's
    that transformers 5 left out."""
    yield layer
    if layer.endswith(".to_out.0"):
        yield layer.removesuffix(".0")
    processors = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    attention, _, last = layer.rpartition(".")
    for name in (layer, *([f"{attention}.{processors[last]}"] if last in processors else [])):
        yield from (name, name.removeprefix("text_model."), f"text_model.{name}")


def layer_shapes(part: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights of a part's layers by name, whatever adapters it has and whatever it is kept as."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in part.named_modules():
        if any(f".{mark}" in name for mark in ADAPTED):
            continue
        if isinstance(module, torch.nn.Linear):  # NF4's weight is packed
            shape = (module.out_features, module.in_features)
        elif isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.dim():
            shape = tuple(module.weight.shape)
        else:
            continue
        shapes[name.removesuffix(".base_layer")] = shape
    return shapes


def matching(layers: Iterable[str], targets: Iterable[Any]) -> set[str]:
    """Which of ``layers`` peft's target_modules name: wholly, or the end of their names."""
    wanted = {str(target) for target in targets}
    steps = {layer: layer.split(".") for layer in layers}
    return {layer for layer, names in steps.items() if any(".".join(names[i:]) in wanted for i in range(len(names)))}


def targets_of(adapted: Iterable[str], layers: Iterable[str]) -> list[str]:
    """The shortest targets that name the ``adapted`` of the ``layers``."""
    adapted = set(adapted)
    steps = [layer.split(".") for layer in adapted]
    short = sorted({".".join(names[-2:] if names[-1].isdigit() else names[-1:]) for names in steps})
    return short if matching(layers, short) == adapted else sorted(adapted)
