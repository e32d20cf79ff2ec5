"""The layers of Z-Image, Lumina 2 and FLUX.2 by their names in the original programs, which LoRA files of ComfyUI have.

Sources: the key maps of diffusers' loaders/single_file_utils.py and of ComfyUI's comfy/utils.py (flux_to_diffusers,
z_image_to_diffusers). Qwen-Image's and HiDream's original names are diffusers' own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from . import original

Names = Iterator[tuple[str, tuple[original.Piece, ...]]]

STREAMS = ("layers", "noise_refiner", "context_refiner")
Z_IMAGE_OUTER = {
    "x_embedder": ("all_x_embedder.2-1",),
    "final_layer.linear": ("all_final_layer.2-1.linear",),
    "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
}
Z_IMAGE_BLOCK = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": ("attention.to_out.0",),
}
LUMINA2_OUTER = {
    "cap_embedder.1": ("time_caption_embed.caption_embedder.1",),
    "t_embedder.mlp.0": ("time_caption_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_caption_embed.timestep_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear_1",),
    "final_layer.linear": ("norm_out.linear_2",),
}
LUMINA2_BLOCK = {
    "attention.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attention.out": ("attn.to_out.0",),
    "feed_forward.w1": ("feed_forward.linear_1",),
    "feed_forward.w2": ("feed_forward.linear_2",),
    "feed_forward.w3": ("feed_forward.linear_3",),
    "adaLN_modulation.1": ("norm1.linear",),
}
FLUX2_OUTER = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    "final_layer.linear": ("proj_out",),
}
FLUX2_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
FLUX2_SINGLE = {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)}


def z_image(layers: Collection[str]) -> Names:
    yield from original.pieces(original.flat(Z_IMAGE_OUTER))
    yield from _streams(layers, Z_IMAGE_BLOCK)


def lumina2(layers: Collection[str]) -> Names:
    yield from original.pieces(original.flat(LUMINA2_OUTER))
    yield from _streams(layers, LUMINA2_BLOCK)


def flux2(layers: Collection[str]) -> Names:
    yield from original.pieces(original.flat(FLUX2_OUTER) | original.SHIFT_FIRST)
    blocks = ("double_blocks", "transformer_blocks", FLUX2_DOUBLE)
    for theirs, ours, table in (blocks, ("single_blocks", "single_transformer_blocks", FLUX2_SINGLE)):
        for i in original.numbers(layers, ours):
            yield from original.pieces(original.flat(table), f"{theirs}_{i}_", f"{ours}.{i}.")


def _streams(layers: Collection[str], table: Any) -> Names:
    for blocks in STREAMS:
        for i in original.numbers(layers, blocks):
            yield from original.pieces(original.flat(table), f"{blocks}_{i}_", f"{blocks}.{i}.")
