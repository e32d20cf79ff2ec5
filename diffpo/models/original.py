"""Weights by the names of the programs that the models came from: what all families share.

Sources of the names: CompVis' latent-diffusion and Stability's generative-models (UNet, VAE), open_clip (the large CLIP
of SD 2.x and SDXL), sd3-ref and Black Forest Labs' flux (transformers), ComfyUI (text encoders beside these). diffusers
reads them back by loaders/single_file_utils.py. Tensors are renamed, stacked or transposed, and nothing is computed.
Networks have files of their own: unet_names.py, sd3_names.py, flux_names.py. Whole files are described in layouts.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..common.errors import DiffpoError

State = dict[str, Tensor]
Table = Mapping[str, tuple[str, ...]]  # a layer of the original -> the layers of diffusers' that are stacked in it
Piece = tuple[str, str]  # a layer of diffusers', and which of its rows: "" (all), "first" or "second" half

VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
VAE_LAYER = re.compile(r"(encoder|decoder)\.(down_blocks|up_blocks|mid_block)(?:\.(\d+))?\.(\w+)\.(\d+)\.(.+)")
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
OPEN_CLIP_OUTER = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
# layers that are read only: halves exchanged, where the original has shift before scale
SHIFT_FIRST = {"final_layer_adaLN_modulation_1": ("norm_out.linear:second", "norm_out.linear:first")}


# ---- tools


def renamed(state: Mapping[str, Tensor], rename: Callable[[str], str | None]) -> State:
    """``state`` with its layers' names replaced by ``rename``. DiffpoError if a layer has no name there."""
    names = {}
    for name in state:
        layer, _, kind = name.rpartition(".")
        if (original := rename(layer)) is not None:
            names[name] = f"{original}.{kind}"
    refuse(set(state) - set(names))
    return {names[name]: value for name, value in state.items()}


def stacked(left: State, table: Mapping[str, tuple[str, ...]], prefix: str = "", theirs: str = "") -> State:
    """Take the layers of ``table`` out of ``left``: query, key and value become one matrix."""
    found = {}
    for name, layers in table.items():
        for kind in ("weight", "bias"):
            popped = [left.pop(f"{theirs}{layer}.{kind}", None) for layer in layers]
            values = [value for value in popped if value is not None]
            if len(values) == len(layers):
                found[f"{prefix}{name}.{kind}"] = values[0] if len(values) == 1 else torch.cat(values)
    return found


def swapped(found: State, layers: Iterable[str]) -> State:
    """Exchange the halves of ``layers``: the original has shift before scale, diffusers after it."""
    for layer in layers:
        for kind in ("weight", "bias"):
            first, second = found[f"{layer}.{kind}"].chunk(2)
            found[f"{layer}.{kind}"] = torch.cat([second, first])
    return found


def refuse(left: Iterable[str]) -> None:
    """DiffpoError if weights are left over."""
    if left := sorted(left):
        raise DiffpoError(
            f"{left[0]} ({len(left)} such weights) has no name in the original's format: use --to merged, which keeps "
            f"diffusers' names"
        )


# ---- names in LoRA files, which have underscores for dots


def flat(table: Table) -> dict[str, tuple[str, ...]]:
    """The ``table`` with underscores for dots in the original's names."""
    return {name.replace(".", "_"): parts for name, parts in table.items()}


def pieces(table: Table, prefix: str = "", theirs: str = "") -> Iterator[tuple[str, tuple[Piece, ...]]]:
    """The names of ``table`` behind ``prefix``, each with its layers behind ``theirs``; "layer:first" is half a
    layer."""
    for name, parts in table.items():
        found = (f"{theirs}{part}".partition(":") for part in parts)
        yield f"{prefix}{name}", tuple((layer, half) for layer, _, half in found)


def numbers(layers: Iterable[str], blocks: str) -> list[int]:
    """Which of a network's ``blocks``, e.g. transformer_blocks, have ``layers``."""
    found = (re.match(rf"{blocks}\.(\d+)\.", layer) for layer in layers)
    return list(dict.fromkeys(int(each[1]) for each in found if each))


# ---- the VAE and the text encoders


def vae(state: Mapping[str, Tensor], config: Any) -> State:
    """The original's attention is made of 1 x 1 convolutions, diffusers' of linear layers."""
    found = renamed(state, lambda layer: _vae_layer(layer, len(config.block_out_channels)))
    attention = re.compile(r".*\.attn_1\.(q|k|v|proj_out)\.weight")
    return {
        name: value[:, :, None, None] if attention.fullmatch(name) and value.ndim == 2 else value
        for name, value in found.items()
    }


def _vae_layer(layer: str, blocks: int) -> str | None:
    if layer in ("quant_conv", "post_quant_conv") or re.fullmatch(r"(en|de)coder\.conv_(in|out)", layer):
        return layer
    if layer in ("encoder.conv_norm_out", "decoder.conv_norm_out"):
        return layer.replace("conv_norm_out", "norm_out")
    found = VAE_LAYER.fullmatch(layer)
    if not found:
        return None
    half, where, block, kind, index, rest = found[1], found[2], int(found[3] or 0), found[4], int(found[5]), found[6]
    if kind == "attentions":
        return f"{half}.mid.attn_1.{VAE_ATTENTION[rest]}" if where == "mid_block" and rest in VAE_ATTENTION else None
    if kind == "resnets":
        rest = rest.replace("conv_shortcut", "nin_shortcut")
        if where == "mid_block":
            return f"{half}.mid.block_{index + 1}.{rest}"
        level = f"down.{block}" if where == "down_blocks" else f"up.{blocks - 1 - block}"
        return f"{half}.{level}.block.{index}.{rest}"
    if kind == "downsamplers":
        return f"{half}.down.{block}.downsample.conv"
    return f"{half}.up.{blocks - 1 - block}.upsample.conv" if kind == "upsamplers" else None


def clip(state: Mapping[str, Tensor]) -> State:
    """By transformers' names, all under ``text_model`` whatever the version."""
    inner = ("embeddings.", "encoder.", "final_layer_norm.")
    return {f"text_model.{name}" if name.startswith(inner) else name: value for name, value in state.items()}


def open_clip(state: Mapping[str, Tensor]) -> State:
    """One matrix for query, key and value, and the projection transposed."""
    left, found = clip(state), {}
    for name, original in OPEN_CLIP_OUTER.items():
        found[original] = left.pop(name)
    if "text_projection.weight" in left:
        found["text_projection"] = left.pop("text_projection.weight").T
    for name in list(left):
        layer = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name not in left or not layer:
            continue
        block, kind = f"transformer.resblocks.{layer[1]}", layer[3]
        if layer[2] in OPEN_CLIP:
            found[f"{block}.{OPEN_CLIP[layer[2]]}.{kind}"] = left.pop(name)
        elif layer[2] == "self_attn.q_proj":
            names = [f"text_model.encoder.layers.{layer[1]}.self_attn.{part}.{kind}" for part in PROJECTIONS]
            found[f"{block}.attn.in_proj_{kind}"] = torch.cat([left.pop(each) for each in names])
    refuse(left)
    return found


def from_open_clip(state: Mapping[str, Tensor], layers: int) -> State:
    """The inverse of `open_clip`: by transformers' names, under ``text_model``. One layer more than ``layers`` is left
    out: SD 2.x has it and does not compute it."""
    outer = {original: name for name, original in OPEN_CLIP_OUTER.items()}
    inner = {original: name for name, original in OPEN_CLIP.items()}
    found = {}
    for name, value in state.items():
        layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name)
        if layer and int(layer[1]) == layers:
            continue
        if name in outer:
            found[outer[name]] = value
        elif name == "text_projection":
            found["text_projection.weight"] = value.T.contiguous()
        elif layer and layer[2] == "attn.in_proj":
            for part, rows in zip(PROJECTIONS, value.chunk(3), strict=True):
                found[f"text_model.encoder.layers.{layer[1]}.self_attn.{part}.{layer[3]}"] = rows.contiguous()
        elif layer and layer[2] in inner:
            found[f"text_model.encoder.layers.{layer[1]}.{inner[layer[2]]}.{layer[3]}"] = value
        else:
            found[name] = value  # the loader says that it does not know it
    return found


def t5(state: Mapping[str, Tensor]) -> State:
    """By transformers' names, its embedding once."""
    return {name: value for name, value in state.items() if name != "encoder.embed_tokens.weight"}
