"""The layers of SD's and SDXL's UNet by their names in the original programs and in kohya's files.

The original UNet numbers all its blocks in sequence. A down block of diffusers has ``layers_per_block`` of them and one
that samples down. An up block has ``layers_per_block + 1``, and the last one also samples up.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

from ..common.errors import DiffpoError
from . import original
from .kohya_names import Kohya, nameless

UNET_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_LAYER = re.compile(r"(down_blocks|up_blocks|mid_block)(?:\.(\d+))?\.(\w+)\.(\d+)\.(.+)")


def unet(state: Mapping[str, Tensor], config: Any) -> original.State:
    """Of SD 1.x, 2.x and SDXL; ``config`` is the UNet's. DiffpoError for a layer that has no name there."""
    return original.renamed(state, lambda layer: unet_layer(layer, config))


def unet_layer(layer: str, config: Any) -> str | None:
    """The original's name of a layer of diffusers' UNet; None if it has no name."""
    if layer in UNET_OUTER:
        return UNET_OUTER[layer]
    found = UNET_LAYER.fullmatch(layer)
    if not found:
        return None
    where, block, kind, index, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    first = block * (config.layers_per_block + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + config.layers_per_block + 1}.0.op"
    if kind == "upsamplers":
        attends = "Attn" in config.up_block_types[block]
        return f"output_blocks.{first + config.layers_per_block}.{1 + attends}.conv"
    if kind not in ("resnets", "attentions") or (kind == "resnets" and rest not in UNET_RESNET):
        return None
    rest = UNET_RESNET[rest] if kind == "resnets" else rest
    if where == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{rest}"
    number = f"input_blocks.{1 + first + index}" if where == "down_blocks" else f"output_blocks.{first + index}"
    return f"{number}.{int(kind == 'attentions')}.{rest}"


# ---- LoRA files: kohya trains SD by diffusers' names, SDXL by the original's

KOHYA_OUTER = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}
KOHYA_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}


def kohya_sd(layer: str, config: Any) -> tuple[str, tuple[str, ...]]:
    return layer.replace(".", "_"), (layer,)


def kohya_sdxl(layer: str, config: Any) -> tuple[str, tuple[str, ...]]:
    if layer in KOHYA_OUTER:
        return KOHYA_OUTER[layer], (layer,)
    found = UNET_LAYER.fullmatch(layer)
    if not found:
        raise nameless(layer)
    where, block, kind, index, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    first = block * (config.layers_per_block + 1)
    if kind == "downsamplers":
        return f"input_blocks_{first + config.layers_per_block + 1}_0_op", (layer,)
    if kind == "upsamplers":
        return f"output_blocks_{first + config.layers_per_block}_2_conv", (layer,)
    if kind not in ("resnets", "attentions") or (kind == "resnets" and rest not in KOHYA_RESNET):
        raise nameless(layer)
    rest = KOHYA_RESNET[rest] if kind == "resnets" else rest.replace(".", "_")
    if where == "mid_block":
        return f"middle_block_{1 if kind == 'attentions' else 2 * index}_{rest}", (layer,)
    number = f"input_blocks_{1 + first + index}" if where == "down_blocks" else f"output_blocks_{first + index}"
    return f"{number}_{int(kind == 'attentions')}_{rest}", (layer,)


def _sd_header(config: Any) -> dict[str, str]:
    second = config.cross_attention_dim == 1024
    version = "sd_v2" if second else "sd_v1"
    return {"ss_network_module": "networks.lora", "ss_base_model_version": version, "ss_v2": str(second)}


def _sdxl_header(config: Any) -> dict[str, str]:
    return {"ss_network_module": "networks.lora", "ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}


SD_KOHYA, SDXL_KOHYA = Kohya(kohya_sd, _sd_header), Kohya(kohya_sdxl, _sdxl_header)


def in_loras(layers: Collection[str], config: Any) -> Iterator[tuple[str, tuple[original.Piece, ...]]]:
    """`Family.names_in_loras`: SD 1.x and 2.x have the blocks of SDXL."""
    for layer in layers:
        with contextlib.suppress(DiffpoError):
            name, _ = kohya_sdxl(layer, config)
            yield name, ((layer, ""),)
            if ".upsamplers." in layer:  # where a block has no attention
                yield name.replace("_2_conv", "_1_conv"), ((layer, ""),)
