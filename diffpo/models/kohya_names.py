"""What kohya's sd-scripts call the layers of a diffusers network: SD's by diffusers' names, SDXL's and FLUX's by those of
the original networks, in which FLUX's query, key and value are one layer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ..common.errors import DiffpoError
from . import original

# which layers of diffusers' blocks are side by side in a layer of the original's
FLUX_DOUBLE, FLUX_SINGLE = (original.flat(table) for table in (original.FLUX_DOUBLE, original.FLUX_SINGLE))
SDXL_OUTER = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}
SDXL_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
SDXL_LAYER = re.compile(r"(down_blocks|up_blocks|mid_block)(?:\.(\d+))?\.(\w+)\.(\d+)\.(.+)")


# ---- names: a layer of diffusers' network -> its name here, and all layers that are part of it


def _sd(layer: str, config: Any) -> tuple[str, tuple[str, ...]]:
    return layer.replace(".", "_"), (layer,)


def sdxl_name(layer: str, config: Any) -> tuple[str, tuple[str, ...]]:
    """The original UNet counts through all its blocks: of each of diffusers', ``layers_per_block`` and one that samples
    down, or ``layers_per_block + 1`` of which the last samples up too."""
    if layer in SDXL_OUTER:
        return SDXL_OUTER[layer], (layer,)
    found = SDXL_LAYER.fullmatch(layer)
    if not found:
        raise _nameless(layer)
    where, block, kind, index, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    first = block * (config.layers_per_block + 1)
    if kind == "downsamplers":
        return f"input_blocks_{first + config.layers_per_block + 1}_0_op", (layer,)
    if kind == "upsamplers":
        return f"output_blocks_{first + config.layers_per_block}_2_conv", (layer,)
    if kind not in ("resnets", "attentions") or (kind == "resnets" and rest not in SDXL_RESNET):
        raise _nameless(layer)
    rest = SDXL_RESNET[rest] if kind == "resnets" else rest.replace(".", "_")
    if where == "mid_block":
        return f"middle_block_{1 if kind == 'attentions' else 2 * index}_{rest}", (layer,)
    number = f"input_blocks_{1 + first + index}" if where == "down_blocks" else f"output_blocks_{first + index}"
    return f"{number}_{int(kind == 'attentions')}_{rest}", (layer,)


def _flux(layer: str, config: Any) -> tuple[str, tuple[str, ...]]:
    for blocks, theirs, table in (
        ("transformer_blocks", "double_blocks", FLUX_DOUBLE),
        ("single_transformer_blocks", "single_blocks", FLUX_SINGLE),
    ):
        if found := re.fullmatch(rf"{blocks}\.(\d+)\.(.+)", layer):
            for name, parts in table.items():
                if found[2] in parts:
                    whole = tuple(f"{blocks}.{found[1]}.{part}" for part in parts)
                    return f"{theirs}_{found[1]}_{name}", whole
    raise _nameless(layer)


def _nameless(layer: str) -> DiffpoError:
    return DiffpoError(
        f"the LoRA changes {layer}, which has no name in kohya's format; use --to diffusers or --to merged"
    )


NAMES: dict[str, Callable[[str, Any], tuple[str, tuple[str, ...]]]] = {
    "StableDiffusionPipeline": _sd,
    "StableDiffusionXLPipeline": sdxl_name,
    "FluxPipeline": _flux,
}
