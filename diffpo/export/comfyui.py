"""A LoRA, DoRA or LoKr under the names and by the formula of ComfyUI.

Names (comfy/lora.py): `lora_unet_` and diffusers' name with underscores for a UNet's layers, `transformer.` and
diffusers' name for a transformer's, of which ComfyUI knows the rows in its own stacked layers; `lora_te1_` and so on
for text encoders. Behind them `.lora_down.weight`, `.lora_up.weight`, `.lokr_w1`, ... and `.alpha`, by alpha / rank.

DoRA (comfy/weight_adapter/base.py, weight_decompose, as of 2026): W' = d (W + D) / |W|, by the norms of the *base's*
rows, where peft and LyCORIS have m (W + D) / |W + D|. So `.dora_scale` is d = m |W| / |W + D|, which gives the same W'.
Forge has ComfyUI's formula. Programs with LyCORIS' formula would read another DoRA, so the header says what it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.errors import DiffpoError
from ..models import Family, built_in
from ..weights.header import BASE_NORMS
from ..weights.lora_change import Change
from ..weights.lora_file import HEADER, sorted_header

Layers = dict[str, dict[str, Change]]  # by the pipeline's part and the part's layers
SWAPPED = ("norm_out.linear", "norm1_context.linear")  # ComfyUI swaps halves of the change, and not of the norms


def require(family: type[Family]) -> None:
    """DiffpoError unless the names in ComfyUI are known."""
    if family.comfyui is None:
        known = [name for name, each in built_in().items() if each.comfyui is not None]
        raise DiffpoError(
            f"ComfyUI has no names for LoRAs of {' or '.join(family.pipelines)} that diffpo knows ({family.__name__}."
            f"comfyui is not set; it is for {', '.join(known)}). Use --to diffusers or --to merged"
        )


def convert(family: type[Family], pipe: Any, changes: Layers) -> dict[str, Tensor]:
    """The file's tensors, float32, for the changes of ``pipe``'s parts."""
    state: dict[str, Tensor] = {}
    for part, layers in changes.items():
        for layer, change in layers.items():
            base = pipe.components[part].get_submodule(layer).weight.detach().float()
            key = _name(family, part, layer)
            state |= {f"{key}.{name}": value for name, value in _tensors(layer, change, base)}
    return state


def _name(family: type[Family], part: str, layer: str) -> str:
    if part.startswith("text_encoder"):
        number = part[-1] if part[-1].isdigit() else "1"
        inner = layer if layer.startswith("text_model.") else f"text_model.{layer}"
        return f"lora_te{number}_{inner.replace('.', '_')}"
    assert family.comfyui is not None  # noqa: S101 (`require`)
    return f"{family.comfyui}{layer.replace('.', '_') if family.comfyui.endswith('_') else layer}"


def _tensors(layer: str, change: Change, base: Tensor) -> Iterator[tuple[str, Tensor]]:
    factors = dict(change.factors)
    if change.kind not in ("lora", "lokr") or "mid" in factors or change.bias is not None:
        raise DiffpoError(f"the change of {layer} is no LoRA, DoRA or LoKr that diffpo trains; use --to merged")
    rank: int | None
    if change.kind == "lora":
        rank = len(factors["down"])
        yield "lora_down.weight", factors["down"]
        yield "lora_up.weight", factors["up"]
    else:
        rank = next((len(factors[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in factors), None)
        if rank is None:  # alpha means nothing for two whole factors
            factors["lokr_w1"] = change.scale * factors["lokr_w1"]
        yield from factors.items()
    yield "alpha", torch.tensor(change.scale * rank if rank else 1.0)
    if change.magnitude is not None:
        if layer.endswith(SWAPPED):
            raise DiffpoError(f"ComfyUI computes a DoRA of {layer} with wrong norms; use --to merged, or other targets")
        new = base + change.scale * change.delta(tuple(base.shape))
        yield "dora_scale", change.magnitude * (_rows(base) + torch.finfo(torch.float32).eps) / _rows(new)


def _rows(weight: Tensor) -> Tensor:
    """The norms of a weight's rows, (out, 1, ...)."""
    return torch.linalg.vector_norm(weight, dim=list(range(1, weight.dim())), keepdim=True)


def write(path: Path, family: type[Family], pipe: Any, changes: Layers, dtype: str | None, about: dict) -> None:
    """Write the file, and compare what ComfyUI's formula makes of it with the trained weights. DiffpoError if they
    differ by more than ``dtype`` rounds."""
    state = {name: value.contiguous() for name, value in convert(family, pipe, changes).items()}
    if dtype:
        wanted = getattr(torch, dtype)
        state = {name: value if name.endswith(".alpha") else value.to(wanted) for name, value in state.items()}
    from safetensors.torch import save

    if any(name.endswith(".dora_scale") for name in state):
        about = about | {BASE_NORMS: True}
    path.write_bytes(sorted_header(save(state, {"format": "pt", HEADER: json.dumps(about, sort_keys=True)})))
    exact = all(value.dtype == torch.float32 for value in state.values())
    for part, layers in changes.items():
        for layer, change in layers.items():
            base = pipe.components[part].get_submodule(layer).weight.detach().float()
            key = _name(family, part, layer)
            own = {name[len(key) + 1 :]: value for name, value in state.items() if name.startswith(f"{key}.")}
            found, expected = in_comfyui(base, own), change.weight(base)
            whole = max((expected - base).norm(), (found - base).norm())
            if not found.isfinite().all() or (found - expected).norm() > (1e-5 if exact else 2**-6) * whole:
                if (found - expected).norm() <= 1e-6 * base.norm():  # a change that is near rounding
                    continue
                raise DiffpoError(
                    f"in ComfyUI's format{f' and {dtype}' if dtype else ''} the LoRA changes {layer} differently, so "
                    f"the file was not kept; leave --dtype out, or use --to merged"
                )


def in_comfyui(base: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    """The weight that ComfyUI computes at strength 1 from ``base`` and a layer's tensors in the file, float32."""
    f = {name: value.float() for name, value in own.items()}
    if "lora_up.weight" in f:
        scale = f["alpha"] / len(f["lora_down.weight"])
        delta = f["lora_up.weight"].flatten(1) @ f["lora_down.weight"].flatten(1)
    else:
        low = "lokr_w2_b" in f
        w1, w2 = f["lokr_w1"], f["lokr_w2_a"] @ f["lokr_w2_b"] if low else f["lokr_w2"]
        scale = f["alpha"] / len(f["lokr_w2_b"]) if low else torch.ones(())
        delta = torch.kron(w1.reshape(w1.shape + (1,) * (w2.dim() - 2)), w2.contiguous())
    new = base + scale * delta.reshape(base.shape)
    if "dora_scale" in f:
        new = new * f["dora_scale"] / (_rows(base) + torch.finfo(torch.float32).eps)
    return new
