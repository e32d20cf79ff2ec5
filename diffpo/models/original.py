"""A pipeline's weights by the names of the programs that the models came from: one file for ComfyUI, A1111 and Forge.

Sources of the names: CompVis' latent-diffusion and Stability's generative-models (UNet, VAE), open_clip (the large CLIP
of SD 2.x and SDXL), sd3-ref and Black Forest Labs' flux (transformers), ComfyUI (text encoders beside these). diffusers
reads them back by loaders/single_file_utils.py. Tensors are renamed, stacked or transposed, and nothing is computed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.errors import DiffpoError

State = dict[str, Tensor]


class Layout(NamedTuple):
    """How a file of a family is laid out. ``parts``: each part of the pipeline with the prefixes that its weights may
    have, the one that is written first; the empty prefix means all weights that are of no other part."""

    title: str
    pipeline: str
    parts: dict[str, tuple[str, ...]]


UNET = "model.diffusion_model."
VAE = ("first_stage_model.", "vae.")
_CLIP_L, _CLIP_G, _T5 = (f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl"))
LAYOUTS = {
    "sd1": Layout(
        "Stable Diffusion 1.x",
        "StableDiffusionPipeline",
        {"unet": (UNET,), "vae": VAE, "text_encoder": ("cond_stage_model.transformer.",)},
    ),
    "sd2": Layout(
        "Stable Diffusion 2.x",
        "StableDiffusionPipeline",
        {"unet": (UNET,), "vae": VAE, "text_encoder": ("cond_stage_model.model.",)},
    ),
    "sdxl": Layout(
        "SDXL",
        "StableDiffusionXLPipeline",
        {
            "unet": (UNET,),
            "vae": VAE,
            "text_encoder": ("conditioner.embedders.0.transformer.",),
            "text_encoder_2": ("conditioner.embedders.1.model.",),
        },
    ),
    "sd3": Layout(
        "Stable Diffusion 3",
        "StableDiffusion3Pipeline",
        {
            "transformer": (UNET, ""),
            "vae": VAE,
            "text_encoder": (_CLIP_L,),
            "text_encoder_2": (_CLIP_G,),
            "text_encoder_3": (_T5,),
        },
    ),
    "flux": Layout(
        "FLUX.1",
        "FluxPipeline",
        {"transformer": (UNET, ""), "vae": VAE[::-1], "text_encoder": (_CLIP_L,), "text_encoder_2": (_T5,)},
    ),
}

# ---- a layer of the original and the layers of diffusers' that are stacked in it, of weights and biases alike

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


# ---- a part's state_dict by the original names


def unet(state: Mapping[str, Tensor], config: Any) -> State:
    """Of SD 1.x, 2.x and SDXL; ``config`` is the UNet's. DiffpoError for a layer that has no name there."""
    return _renamed(state, lambda layer: unet_layer(layer, config))


def unet_layer(layer: str, config: Any) -> str | None:
    """The original's name of a layer of diffusers' UNet, which counts through all its blocks: of each of diffusers',
    ``layers_per_block`` and one that samples down, or ``layers_per_block + 1`` of which the last samples up too. None
    if it has no name."""
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


def vae(state: Mapping[str, Tensor], config: Any) -> State:
    """The original's attention is made of 1 x 1 convolutions, diffusers' of linear layers."""
    found = _renamed(state, lambda layer: _vae_layer(layer, len(config.block_out_channels)))
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
        place = f"down.{block}" if where == "down_blocks" else f"up.{blocks - 1 - block}"
        return f"{half}.{place}.block.{index}.{rest}"
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
    _refuse(left)
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


def sd3(state: Mapping[str, Tensor], config: Any) -> State:
    """Of SD3 and SD3.5. In the last block and at the end the original has shift before scale, diffusers after it."""
    left = dict(state)
    found = {"pos_embed": left.pop("pos_embed.pos_embed")}
    last = f"joint_blocks.{config.num_layers - 1}"
    found |= _stacked(left, SD3_OUTER)
    for number in range(config.num_layers):
        found |= _stacked(left, SD3_BLOCK, f"joint_blocks.{number}.", f"transformer_blocks.{number}.")
    _refuse(left)
    return _swapped(found, ("final_layer.adaLN_modulation.1", f"{last}.context_block.adaLN_modulation.1"))


def flux(state: Mapping[str, Tensor], config: Any) -> State:
    left = dict(state)
    found = _stacked(left, FLUX_OUTER)
    for number in range(config.num_layers):
        found |= _stacked(left, FLUX_DOUBLE, f"double_blocks.{number}.", f"transformer_blocks.{number}.")
    for number in range(config.num_single_layers):
        found |= _stacked(left, FLUX_SINGLE, f"single_blocks.{number}.", f"single_transformer_blocks.{number}.")
    _refuse(left)
    found = _swapped(found, ("final_layer.adaLN_modulation.1",))
    return {re.sub(r"(query|key)_norm\.weight$", r"\1_norm.scale", name): value for name, value in found.items()}


def _renamed(state: Mapping[str, Tensor], rename: Any) -> State:
    names = {}
    for name in state:
        layer, _, kind = name.rpartition(".")
        if (original := rename(layer)) is not None:
            names[name] = f"{original}.{kind}"
    _refuse(set(state) - set(names))
    return {names[name]: value for name, value in state.items()}


def _stacked(left: State, table: Mapping[str, tuple[str, ...]], prefix: str = "", theirs: str = "") -> State:
    """Takes the layers of ``table`` out of ``left``."""
    found = {}
    for name, layers in table.items():
        for kind in ("weight", "bias"):
            values = [left.pop(f"{theirs}{layer}.{kind}", None) for layer in layers]
            if all(value is not None for value in values):
                found[f"{prefix}{name}.{kind}"] = values[0] if len(values) == 1 else torch.cat(values)
    return found


def _swapped(found: State, layers: Iterable[str]) -> State:
    for layer in layers:
        for kind in ("weight", "bias"):
            first, second = found[f"{layer}.{kind}"].chunk(2)
            found[f"{layer}.{kind}"] = torch.cat([second, first])
    return found


def _refuse(left: Iterable[str]) -> None:
    if left := sorted(left):
        raise DiffpoError(
            f"{left[0]} ({len(left)} such weights) has no name in the original's format: use --to merged, which keeps "
            f"diffusers' names"
        )


# ---- a whole pipeline


def check_family(pipeline: str) -> None:
    """DiffpoError if there is no original format for the pipeline's class."""
    if pipeline not in {layout.pipeline for layout in LAYOUTS.values()}:
        known = ", ".join(layout.title for layout in LAYOUTS.values())
        raise DiffpoError(
            f"a {pipeline} cannot be written as one file: such files are of {known}. Use --to merged, which writes a "
            f"folder"
        )


def kind(pipe: Any) -> str:
    """Which of `LAYOUTS` a pipeline is written as. SD 2.x has open_clip's encoder, which computes the exact gelu."""
    check_family(name := type(pipe).__name__)
    if name == "StableDiffusionPipeline":
        return "sd2" if pipe.text_encoder.config.hidden_act == "gelu" else "sd1"
    return next(kind for kind, layout in LAYOUTS.items() if layout.pipeline == name)


def weights(layout: Layout, pipe: Any, parts: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Name in the file and tensor of all weights of the pipeline's ``parts``. DiffpoError for weights that have no name
    there."""
    for part in parts:
        module, prefix = getattr(pipe, part), layout.parts[part][0]
        state = module.state_dict()
        if part == "vae":
            found = vae(state, module.config)
        elif part == "unet":
            found = unet(state, module.config)
        elif part == "transformer":
            found = (flux if layout.pipeline == "FluxPipeline" else sd3)(state, module.config)
        elif prefix.endswith(".model."):
            found = open_clip(state)
        else:
            found = t5(state) if prefix == _T5 else clip(state)
        for name, value in found.items():
            yield prefix + name, value


def flat(table: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """A table with kohya's names of the original's layers, which have underscores for dots."""
    return {name.replace(".", "_"): parts for name, parts in table.items()}
