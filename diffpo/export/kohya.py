"""A LoRA by the names of kohya's sd-scripts, the single file that ComfyUI, A1111 and Forge read.

Every layer has `lora_unet_<name>.lora_down.weight` (A), `.lora_up.weight` (B) and `.alpha`; its change of the weight is
alpha / rank * B A, with the rank from the shape. Names: sd-scripts trains SD 1.x and 2.x on diffusers' UNet, SDXL and
FLUX on the original networks. In the original FLUX query, key and value are one layer. diffusers reads the names by
loaders/lora_conversion_utils.py. A LoKr has the names of its factors from LyCORIS, `.lokr_w1` and so on.

A DoRA is not written. ComfyUI and Forge divide by the norms of the base's weight where LyCORIS and peft divide by those
of the changed one (dora_scale of the output axis; comfy/weight_adapter/base.py, weight_decompose), and A1111 takes
norms along the other axis: no file would be the same LoRA in all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common.errors import DiffpoError
from ..common.rng import generator
from ..models import Family, built_in
from ..models.kohya_names import Kohya
from ..weights.lora import network_of, tuned_layers
from ..weights.lora_file import HEADER, sorted_header

if TYPE_CHECKING:
    from ..weights.lora_change import Change


def format_of(family: type[Family]) -> Kohya:
    """The family's format; DiffpoError if there is none, or none that can be checked here."""
    if family.kohya is None:
        known = [name for name, each in built_in().items() if each.kohya is not None]
        raise DiffpoError(
            f"a LoRA for {' or '.join(family.pipelines)} cannot be written in kohya's format, which diffpo writes only "
            f"for {', '.join(known)} ({family.__name__}.kohya is not set). Use --to diffusers or --to merged"
        )
    return family.kohya


def check_kind(kind: str | None) -> None:
    """DiffpoError for a kind of training whose file programs read differently."""
    if kind == "dora":
        raise DiffpoError(
            "a DoRA in kohya's format would have different effects in ComfyUI, Forge and A1111, which compute its "
            "norms from different weights. Use --to comfyui (it and Forge agree), --to diffusers or --to merged"
        )


def convert(family: type[Family], network: torch.nn.Module, layers: Mapping[str, Change]) -> dict[str, Tensor]:
    """The file's tensors for the changes (LoRA or LoKr) of the ``layers``, by their names in the ``network`` of
    ``family``.

    Layers that are one in the original become one LoRA of their ranks' sum: A's stacked, B's on the diagonal, which is
    exact. DiffpoError for a family or a layer without a name in this format.
    """
    names = format_of(family)
    state: dict[str, Tensor] = {}
    for layer, change in layers.items():
        name, parts = names.name(layer, network.config)
        key = f"lora_unet_{name}"
        if f"{key}.alpha" in state:
            continue
        if change.kind == "lokr":
            state |= _lokr(key, change, parts)
            continue
        down, up, scale = _plain(change) if len(parts) == 1 else _side_by_side(name, parts, network, layers)
        state[f"{key}.lora_down.weight"] = down.contiguous()
        state[f"{key}.lora_up.weight"] = up.contiguous()
        state[f"{key}.alpha"] = torch.tensor(scale * len(down), dtype=torch.float32)
    return state


def _plain(change: Change) -> tuple[Tensor, Tensor, float]:
    return change.factors["down"], change.factors["up"], change.scale


def _lokr(key: str, change: Change, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """LyCORIS' tensors of a LoKr. Of two whole factors, which have no rank, the scale goes into the first."""
    if len(parts) > 1:
        raise DiffpoError(
            f"the layers {', '.join(parts)} are one layer in kohya's format, and their LoKrs cannot be combined; use "
            f"--to comfyui or --to merged"
        )
    factors = dict(change.factors)
    rank = next((len(factors[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in factors), None)
    if rank is None:
        factors["lokr_w1"] = change.scale * factors["lokr_w1"]
    alpha = 1.0 if rank is None else change.scale * rank
    return {f"{key}.{name}": value.contiguous() for name, value in factors.items()} | {
        f"{key}.alpha": torch.tensor(alpha, dtype=torch.float32)
    }


def serialize(
    state: Mapping[str, Tensor], family: type[Family], network: torch.nn.Module, about: Mapping[str, Any]
) -> bytes:
    """The safetensors file, with the header by which A1111 finds the models that a LoRA is for."""
    from safetensors.torch import save

    names = format_of(family)
    header = {"format": "pt", **names.header(network.config), HEADER: json.dumps(dict(about), sort_keys=True)}
    return sorted_header(save(dict(state), header))


def _side_by_side(
    name: str, parts: tuple[str, ...], network: torch.nn.Module, layers: Mapping[str, Change]
) -> tuple[Tensor, Tensor, float]:
    there = {part: _plain(layers[part]) for part in parts if part in layers}
    (rank, scale), *others = dict.fromkeys((len(down), scale) for down, _, scale in there.values())
    some, other, _ = next(iter(there.values()))
    if others:
        raise DiffpoError(
            f"the layers {', '.join(parts)} are one in kohya's format ({name}), but differ in rank or alpha; use --to "
            f"merged"
        )
    downs, ups = [], []
    for part in parts:
        if part in there:
            down, up, _ = there[part]
        else:
            weight = network.get_submodule(part).weight
            down, up = some.new_zeros(rank, weight.shape[1]), other.new_zeros(weight.shape[0], rank)
        downs.append(down)
        ups.append(up)
    return torch.cat(downs), torch.block_diag(*ups), scale


# ---- reading back


def write(
    path: Path,
    family: type[Family],
    pipe: Any,
    layers: dict[str, Change],
    dtype: str | None,
    about: dict[str, Any],
) -> None:
    """Write the file, and read it back: what it does to each layer must be what the LoRA does. A LoRA is read by the
    pipeline's own loader, a LoKr, which diffusers does not read, by ours."""
    network, kinds = network_of(pipe), {change.kind for change in layers.values()}
    before = {name: _effect(change, network.get_submodule(name).weight.shape) for name, change in layers.items()}
    if dtype:
        wanted = getattr(torch, dtype)
        layers = {
            name: change._replace(factors={key: value.to(wanted) for key, value in change.factors.items()})
            for name, change in layers.items()
        }
    state = convert(family, network, layers)
    for name, value in state.items():
        if not value.isfinite().all():
            raise DiffpoError(f"{name} is too large for {dtype}; use --dtype bfloat16 or leave it out")
    path.write_bytes(serialize(state, family, network, about))
    after = _read_by_diffusers(path, pipe) if kinds == {"lora"} else _read_by_us(path, pipe)
    exact = all(value.dtype == torch.float32 for value in (*state.values(), *network.parameters()))
    for name in {**before, **after}:
        one, other = (each.get(name, torch.zeros(())) for each in (before, after))
        if (one - other).norm() > (1e-5 if exact else 2**-6) * max(one.norm(), other.norm()):
            raise DiffpoError(
                f"in kohya's format{f' and {dtype}' if dtype else ''} the LoRA changes {name} differently, so the file "
                f"was not kept; leave --dtype out, or use --to diffusers"
            )


def _probe(width: int) -> Tensor:
    return torch.randn(width, generator=generator(0, "export", 0))


def _effect(change: Change, shape: tuple[int, ...]) -> Tensor:
    """What a change adds to its layer's output, (out,), for one random input."""
    factors = {name: value.float() for name, value in change.factors.items()}
    if change.kind == "lora":
        down, up = factors["down"].flatten(1), factors["up"].flatten(1)
        return change.scale * (up @ (down @ _probe(down.shape[1])))
    delta = change._replace(factors=factors).delta(tuple(shape)).flatten(1)
    return change.scale * (delta @ _probe(delta.shape[1]))


def _read_by_diffusers(path: Path, pipe: Any) -> dict[str, Tensor]:
    """The effects of the file as the pipeline's own loader reads it."""
    try:
        pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    except (ValueError, RuntimeError, KeyError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DiffpoError(
            f"diffusers cannot read the file in kohya's format, so it was not kept ({reason}). The network may have "
            f"another shape than the family's released ones: use --to diffusers or --to merged"
        ) from error
    effects = {}
    for name, module in tuned_layers(network_of(pipe)).items():
        (adapter,) = module.lora_A
        down, up = (getattr(module, part)[adapter].weight.detach().float().flatten(1) for part in ("lora_A", "lora_B"))
        effects[name] = module.scaling[adapter] * (up @ (down @ _probe(down.shape[1])))
    return effects


def _read_by_us(path: Path, pipe: Any) -> dict[str, Tensor]:
    from ..weights import lora_change, lora_forms

    network = network_of(pipe)
    ((_, changed),) = lora_forms.read(path, {"network": network}).items()
    layers = lora_change.by_layer(changed) or {}
    return {name: _effect(change, network.get_submodule(name).weight.shape) for name, change in layers.items()}
