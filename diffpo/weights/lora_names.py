"""What LoRA files call the layers of a pipeline's parts.

The names are looked up in the model, as ComfyUI does it, so that tiny and cut networks have them too: diffusers' names,
those of its old attention processors, and those of the original code of SD, SDXL, SD3, FLUX and PixArt, in which some
layers of diffusers' are one. kohya writes underscores for dots; here all names are written so.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ..common.errors import DiffpoError
from ..models import original
from ..models.identity import ADAPTED
from ..models.kohya_names import FLUX_DOUBLE, FLUX_SINGLE, sdxl_name
from .lora_change import Part, Place

# the other layers, which are read only; a layer's halves, if the original has shift before scale
SHIFT_FIRST = {"final_layer_adaLN_modulation_1": ("norm_out.linear:second", "norm_out.linear:first")}
FLUX_OUTER = original.flat(original.FLUX_OUTER) | SHIFT_FIRST
XLABS_DOUBLE = {  # XLabs' attention processors: 1 the picture's stream, 2 the text's
    "qkv1": FLUX_DOUBLE["img_attn_qkv"],
    "qkv2": FLUX_DOUBLE["txt_attn_qkv"],
    "proj1": FLUX_DOUBLE["img_attn_proj"],
    "proj2": FLUX_DOUBLE["txt_attn_proj"],
}
XLABS_SINGLE = {"qkv": FLUX_SINGLE["linear1"][:3], "proj": FLUX_SINGLE["linear2"]}
SD3_BLOCK = original.flat(original.SD3_BLOCK)
SD3_LAST = SD3_BLOCK | {
    "context_block_adaLN_modulation_1": ("norm1_context.linear:second", "norm1_context.linear:first")
}
SD3_OUTER = original.flat(original.SD3_OUTER) | SHIFT_FIRST
PIXART_BLOCK = {
    "attn_qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn_proj": ("attn1.to_out.0",),
    "cross_attn_q_linear": ("attn2.to_q",),
    "cross_attn_kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn_proj": ("attn2.to_out.0",),
    "mlp_fc1": ("ff.net.0.proj",),
    "mlp_fc2": ("ff.net.2",),
}
PIXART_OUTER = {
    "x_embedder_proj": ("pos_embed.proj",),
    "y_embedder_y_proj_fc1": ("caption_projection.linear_1",),
    "y_embedder_y_proj_fc2": ("caption_projection.linear_2",),
    "t_embedder_mlp_0": ("adaln_single.emb.timestep_embedder.linear_1",),
    "t_embedder_mlp_2": ("adaln_single.emb.timestep_embedder.linear_2",),
    "t_block_1": ("adaln_single.linear",),
    "final_layer_linear": ("proj_out",),
}


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
    for name, pieces in _originals(part, shapes):
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
    shapes = {}
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


def _originals(network: torch.nn.Module, layers: Iterable[str]) -> Iterator[tuple[str, tuple[tuple[str, str], ...]]]:
    """The names that the ``layers`` of a network have in its family's original code, dots as underscores, each with the
    layers that lie below one another in it and what of them ("", or the "first" or "second" half of their rows)."""
    kind = type(network).__name__
    if kind == "UNet2DConditionModel":  # SD 1.x and 2.x have the blocks of SDXL
        for layer in layers:
            with contextlib.suppress(DiffpoError):
                name, parts = sdxl_name(layer, network.config)
                yield name, ((parts[0], ""),)
                if ".upsamplers." in layer:  # where a block has no attention
                    yield name.replace("_2_conv", "_1_conv"), ((parts[0], ""),)
        return
    for prefix, block, table in _tables(kind, layers):
        for name, parts in table.items():
            pieces = (f"{block}{part}".partition(":") for part in parts)
            yield f"{prefix}{name}", tuple((layer, half) for layer, _, half in pieces)


def _tables(kind: str, layers: Iterable[str]) -> Iterator[tuple[str, str, Mapping[str, tuple[str, ...]]]]:
    """The tables of a transformer's names, each with what comes before them in the original and in diffusers."""
    numbers: dict[str, list[int]] = {}
    for layer in layers:
        if (found := re.match(r"(\w+)\.(\d+)\.", layer)) and int(found[2]) not in numbers.setdefault(found[1], []):
            numbers[found[1]].append(int(found[2]))
    blocks = numbers.get("transformer_blocks", [])
    if kind == "FluxTransformer2DModel":
        yield "", "", FLUX_OUTER
        for i in blocks:
            yield f"double_blocks_{i}_", f"transformer_blocks.{i}.", FLUX_DOUBLE | XLABS_DOUBLE
        for i in numbers.get("single_transformer_blocks", []):
            yield f"single_blocks_{i}_", f"single_transformer_blocks.{i}.", FLUX_SINGLE | XLABS_SINGLE
    elif kind == "SD3Transformer2DModel":
        yield "", "", SD3_OUTER
        for i in blocks:
            yield f"joint_blocks_{i}_", f"transformer_blocks.{i}.", SD3_LAST if i == max(blocks) else SD3_BLOCK
    elif kind == "PixArtTransformer2DModel":
        yield "", "", PIXART_OUTER
        for i in blocks:
            yield f"blocks_{i}_", f"transformer_blocks.{i}.", PIXART_BLOCK


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
