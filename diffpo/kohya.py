"""A LoRA by the names of kohya's sd-scripts, the single file that ComfyUI, A1111 and Forge read.

Every layer has `lora_unet_<name>.lora_down.weight` (A), `.lora_up.weight` (B) and `.alpha`; its change of the weight is
alpha / rank * B A, with the rank from the shape. Names: sd-scripts trains SD 1.x and 2.x on diffusers' UNet, SDXL and
FLUX on the original networks, in which FLUX's query, key and value are one layer. diffusers reads them back by
loaders/lora_conversion_utils.py.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import DiffpoError
from .lora import HEADER, _sorted_header, network_of
from .rng import generator

CHECK = "exported"  # the adapter that a written file is read back into

# which layers of diffusers' blocks are side by side in a layer of the original's
FLUX_DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_mod_lin": ("norm1_context.linear",),
}
FLUX_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
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


class Layer(NamedTuple):
    """The change ``scale * up @ down`` of one layer's weight; ``down`` (rank, in, ...), ``up`` (out, rank, ...)."""

    down: Tensor
    up: Tensor
    scale: float


def check_family(pipeline: str) -> None:
    """DiffpoError if there is no such format for the pipeline's class, or none that can be checked here."""
    if pipeline not in NAMES:
        raise DiffpoError(
            f"a LoRA for {pipeline} cannot be written in kohya's format: diffusers reads back that of "
            f"{', '.join(NAMES)} alone, so no other could be verified. Use --to diffusers or --to merged"
        )


def convert(pipeline: str, network: torch.nn.Module, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """The file's tensors for the adapted ``layers``, by their names in ``network``, of the pipeline class ``pipeline``.

    Layers that are one in the original become one LoRA of their ranks' sum: A's stacked, B's on the diagonal, which is
    exact. DiffpoError for a family or a layer without a name in this format.
    """
    check_family(pipeline)
    state: dict[str, Tensor] = {}
    for layer in layers:
        name, parts = NAMES[pipeline](layer, network.config)
        if f"lora_unet_{name}.alpha" in state:
            continue
        down, up, scale = layers[layer] if len(parts) == 1 else _side_by_side(name, parts, network, layers)
        state[f"lora_unet_{name}.lora_down.weight"] = down.contiguous()
        state[f"lora_unet_{name}.lora_up.weight"] = up.contiguous()
        state[f"lora_unet_{name}.alpha"] = torch.tensor(scale * len(down), dtype=torch.float32)
    return state


def serialize(state: Mapping[str, Tensor], pipeline: str, network: torch.nn.Module, about: Mapping[str, Any]) -> bytes:
    """The safetensors file, with what A1111 looks at to tell which models a LoRA is for."""
    from safetensors.torch import save

    second = pipeline == "StableDiffusionPipeline" and network.config.cross_attention_dim == 1024
    version = {"StableDiffusionXLPipeline": "sdxl_base_v1-0", "FluxPipeline": "flux1"}.get(pipeline)
    header = {
        "format": "pt",
        "ss_network_module": "networks.lora_flux" if pipeline == "FluxPipeline" else "networks.lora",
        "ss_base_model_version": version or ("sd_v2" if second else "sd_v1"),
        "ss_v2": str(second),
        HEADER: json.dumps(dict(about), sort_keys=True),
    }
    return _sorted_header(save(dict(state), header))


def _side_by_side(name: str, parts: tuple[str, ...], network: torch.nn.Module, layers: Mapping[str, Layer]) -> Layer:
    there = [layers[part] for part in parts if part in layers]
    (rank, scale), *others = dict.fromkeys((len(layer.down), layer.scale) for layer in there)
    if others:
        raise DiffpoError(
            f"the layers {', '.join(parts)} are one in kohya's format ({name}), and differ in rank or alpha"
        )
    downs, ups = [], []
    for part in parts:
        if part in layers:
            downs.append(layers[part].down)
            ups.append(layers[part].up)
        else:
            weight = network.get_submodule(part).weight
            downs.append(there[0].down.new_zeros(rank, weight.shape[1]))
            ups.append(there[0].up.new_zeros(weight.shape[0], rank))
    return Layer(torch.cat(downs), torch.block_diag(*ups), scale)


# ---- reading back


def write(path: Path, pipe: Any, layers: dict[str, Layer], dtype: str | None, about: dict[str, Any]) -> None:
    """Write the file, and read it back through the pipeline's own loader: each layer's change must be the LoRA's."""
    network = network_of(pipe)
    if dtype:
        wanted = getattr(torch, dtype)
        layers = {name: Layer(a.to(wanted), b.to(wanted), scale) for name, (a, b, scale) in layers.items()}
    pipeline = type(pipe).__name__
    state = convert(pipeline, network, layers)
    for name, value in state.items():
        if not value.isfinite().all():
            raise DiffpoError(f"{name} is too large for {dtype}; use --dtype bfloat16 or leave it out")
    path.write_bytes(serialize(state, pipeline, network, about))
    before = _effects(network)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two adapters are what is wanted
            pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=CHECK)
    except (ValueError, RuntimeError, KeyError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DiffpoError(
            f"diffusers cannot read the LoRA back from kohya's format, so it was not kept ({reason}). The network may "
            f"have another shape than the family's released ones: use --to diffusers or --to merged"
        ) from error
    after = _effects(network, CHECK)
    exact = all(value.dtype == torch.float32 for value in (*state.values(), *network.parameters()))
    for name in {**before, **after}:
        one, other = (each.get(name, torch.zeros(())) for each in (before, after))
        if (one - other).norm() > (1e-5 if exact else 2**-6) * max(one.norm(), other.norm()):
            raise DiffpoError(
                f"kohya's format{f' in {dtype}' if dtype else ''} does not keep what the LoRA does to {name}, so it "
                f"was not kept; leave --dtype out, or use --to diffusers"
            )


def _effects(network: torch.nn.Module, adapter: str | None = None) -> dict[str, torch.Tensor]:
    """What an adapter (the first one) adds to each layer's output, (out,), for one random input."""
    effects = {}
    for name, module in tuned_layers(network).items():
        names = list(module.lora_A)
        chosen = adapter or names[0]
        if chosen not in names:
            continue
        down, up = (getattr(module, part)[chosen].weight.detach().float().flatten(1) for part in ("lora_A", "lora_B"))
        probe = torch.randn(down.shape[1], generator=generator(0, "export", 0))
        effects[name] = module.scaling[chosen] * (up @ (down @ probe))
    return effects


def tuned_layers(network: torch.nn.Module) -> dict[str, Any]:
    """The layers that hold adapters, by their names in the network without them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}


# ---- names: a layer of diffusers' network -> its name here, and all layers that are part of it


def _sd(layer: str, config: Any) -> tuple[str, tuple[str, ...]]:
    return layer.replace(".", "_"), (layer,)


def _sdxl(layer: str, config: Any) -> tuple[str, tuple[str, ...]]:
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
    for blocks, original, table in (
        ("transformer_blocks", "double_blocks", FLUX_DOUBLE),
        ("single_transformer_blocks", "single_blocks", FLUX_SINGLE),
    ):
        if found := re.fullmatch(rf"{blocks}\.(\d+)\.(.+)", layer):
            for name, parts in table.items():
                if found[2] in parts:
                    whole = tuple(f"{blocks}.{found[1]}.{part}" for part in parts)
                    return f"{original}_{found[1]}_{name}", whole
    raise _nameless(layer)


def _nameless(layer: str) -> DiffpoError:
    return DiffpoError(
        f"the LoRA changes {layer}, which has no name in kohya's format; use --to diffusers or --to merged"
    )


NAMES: dict[str, Callable[[str, Any], tuple[str, tuple[str, ...]]]] = {
    "StableDiffusionPipeline": _sd,
    "StableDiffusionXLPipeline": _sdxl,
    "FluxPipeline": _flux,
}
