"""The layers of FLUX.1's transformer by their names in Black Forest Labs' program, XLabs' LoRAs and kohya's files."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

from . import original
from .kohya_names import Kohya, nameless

# a layer of the original and the layers of diffusers' that are stacked in it, of weights and biases alike
FLUX_OUTER = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
FLUX_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
}
FLUX_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}


def flux(state: Mapping[str, Tensor], config: Any) -> original.State:
    left = dict(state)
    found = original.stacked(left, FLUX_OUTER)
    for number in range(config.num_layers):
        found |= original.stacked(left, FLUX_DOUBLE, f"double_blocks.{number}.", f"transformer_blocks.{number}.")
    for number in range(config.num_single_layers):
        found |= original.stacked(left, FLUX_SINGLE, f"single_blocks.{number}.", f"single_transformer_blocks.{number}.")
    original.refuse(left)
    found = original.swapped(found, ("final_layer.adaLN_modulation.1",))
    return {re.sub(r"(query|key)_norm\.weight$", r"\1_norm.scale", name): value for name, value in found.items()}


# ---- LoRA files: in kohya's, query, key and value are one layer, as in the original

KOHYA_DOUBLE, KOHYA_SINGLE = original.flat(FLUX_DOUBLE), original.flat(FLUX_SINGLE)
XLABS_DOUBLE = {  # XLabs' attention processors: 1 is the picture's stream, 2 the text's
    "qkv1": KOHYA_DOUBLE["img_attn_qkv"],
    "qkv2": KOHYA_DOUBLE["txt_attn_qkv"],
    "proj1": KOHYA_DOUBLE["img_attn_proj"],
    "proj2": KOHYA_DOUBLE["txt_attn_proj"],
}
XLABS_SINGLE = {"qkv": KOHYA_SINGLE["linear1"][:3], "proj": KOHYA_SINGLE["linear2"]}


def kohya_flux(layer: str, config: Any) -> tuple[str, tuple[str, ...]]:
    for blocks, theirs, table in (
        ("transformer_blocks", "double_blocks", KOHYA_DOUBLE),
        ("single_transformer_blocks", "single_blocks", KOHYA_SINGLE),
    ):
        if found := re.fullmatch(rf"{blocks}\.(\d+)\.(.+)", layer):
            for name, parts in table.items():
                if found[2] in parts:
                    return f"{theirs}_{found[1]}_{name}", tuple(f"{blocks}.{found[1]}.{part}" for part in parts)
    raise nameless(layer)


def _header(config: Any) -> dict[str, str]:
    return {"ss_network_module": "networks.lora_flux", "ss_base_model_version": "flux1", "ss_v2": "False"}


KOHYA = Kohya(kohya_flux, _header)


def in_loras(layers: Collection[str], config: Any) -> Iterator[tuple[str, tuple[original.Piece, ...]]]:
    """`Family.names_in_loras`."""
    yield from original.pieces(original.flat(FLUX_OUTER) | original.SHIFT_FIRST)
    for i in original.numbers(layers, "transformer_blocks"):
        yield from original.pieces(KOHYA_DOUBLE | XLABS_DOUBLE, f"double_blocks_{i}_", f"transformer_blocks.{i}.")
    for i in original.numbers(layers, "single_transformer_blocks"):
        table = KOHYA_SINGLE | XLABS_SINGLE
        yield from original.pieces(table, f"single_blocks_{i}_", f"single_transformer_blocks.{i}.")
