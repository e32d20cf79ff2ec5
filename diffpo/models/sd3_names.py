"""The layers of SD3's and SD3.5's transformer by their names in sd3-ref."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

from . import original

# a layer of the original and the layers of diffusers' that are stacked in it, of weights and biases alike
SD3_OUTER = {
    "x_embedder.proj": ("pos_embed.proj",),
    "context_embedder": ("context_embedder",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
SD3_BLOCK = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn.ln_q": ("attn.norm_q",),
    "x_block.attn.ln_k": ("attn.norm_k",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.attn2.ln_q": ("attn2.norm_q",),
    "x_block.attn2.ln_k": ("attn2.norm_k",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.attn.ln_q": ("attn.norm_added_q",),
    "context_block.attn.ln_k": ("attn.norm_added_k",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
}


def sd3(state: Mapping[str, Tensor], config: Any) -> original.State:
    """Of SD3 and SD3.5. In the last block and at the end the original has shift before scale, diffusers after it."""
    left = dict(state)
    found = {"pos_embed": left.pop("pos_embed.pos_embed")}
    last = f"joint_blocks.{config.num_layers - 1}"
    found |= original.stacked(left, SD3_OUTER)
    for number in range(config.num_layers):
        found |= original.stacked(left, SD3_BLOCK, f"joint_blocks.{number}.", f"transformer_blocks.{number}.")
    original.refuse(left)
    return original.swapped(found, ("final_layer.adaLN_modulation.1", f"{last}.context_block.adaLN_modulation.1"))


# ---- LoRA files

LORA_OUTER = original.flat(SD3_OUTER) | original.SHIFT_FIRST
LORA_BLOCK = original.flat(SD3_BLOCK)
LORA_LAST = LORA_BLOCK | {
    "context_block_adaLN_modulation_1": ("norm1_context.linear:second", "norm1_context.linear:first")
}


def in_loras(layers: Collection[str], config: Any) -> Iterator[tuple[str, tuple[original.Piece, ...]]]:
    """`Family.names_in_loras`."""
    blocks = original.numbers(layers, "transformer_blocks")
    yield from original.pieces(LORA_OUTER)
    for i in blocks:
        table = LORA_LAST if i == max(blocks) else LORA_BLOCK
        yield from original.pieces(table, f"joint_blocks_{i}_", f"transformer_blocks.{i}.")
