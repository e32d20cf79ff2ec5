"""A linear combination of LoRAs as one LoRA: w_1 D_1 + w_2 D_2 + ... exactly, with the ranks added up.

COFS-DPO (Qi et al. 2024, arXiv 2406.05534) combines what it learnt from several domains in this way, and rewarded soups
(Rame et al. 2023, arXiv 2306.04488) what was learnt for several rewards: training ends before the weights are chosen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.errors import DiffpoError
from ..common.files import write_atomic
from . import lora_change
from .lora_apply import check_lora
from .lora_change import Change
from .lora_file import FILE_NAME, HEADER, lora_file, read_lora, sorted_header


class Share(NamedTuple):
    """A LoRA file (or the folder of a run) and its weight in the combination."""

    lora: str
    weight: float


def combine(pipe: Any, shares: Sequence[Share], out: Path) -> Path:
    """Write the combination of ``shares``, LoRAs of the network of ``pipe``, into the folder ``out``; its file.

    DiffpoError for fewer than two, a weight that is not finite, a LoRA that is not plain (DoRA, LoKr and others are not
    linear in their factors) or that adapts text encoders, another base, and a file that is there already.
    """
    if len(shares) < 2:
        raise DiffpoError("a combination needs two LoRAs at least: write LORA@WEIGHT LORA@WEIGHT")
    file = out / FILE_NAME
    if file.exists():
        raise DiffpoError(f"{file} is there already; choose another folder with --out")
    component = "unet" if getattr(pipe, "unet", None) is not None else "transformer"
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for share in shares:
        for layer, change in _plain(pipe, share, component).items():
            down, up = change.factors["down"], change.factors["up"]
            parts.setdefault(layer, []).append((down, share.weight * change.scale * up))
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for layer, factors in sorted(parts.items()):
        down, up = torch.cat([each for each, _ in factors]), torch.cat([each for _, each in factors], 1)
        ranks[layer] = len(down)
        state |= {f"{component}.{layer}.lora_A.weight": down, f"{component}.{layer}.lora_B.weight": up}
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(file, _written(state, ranks, shares, component))
    return file


def _plain(pipe: Any, share: Share, component: str) -> dict[str, Change]:
    """What a share does to the network, by layer."""
    path = lora_file(share.lora)
    if not math.isfinite(share.weight):
        raise DiffpoError(f"the weight of {path} must be a finite number, not {share.weight}")
    changes = check_lora(pipe, path)
    if others := sorted(changes.keys() - {component}):
        raise DiffpoError(f"{path} also adapts {', '.join(others)}: only LoRAs of the network can be combined")
    layers = lora_change.by_layer(changes[component])
    if layers is None or lora_change.kind_of(layers) != "lora":
        raise DiffpoError(
            f"{path} is no plain LoRA of whole layers (a DoRA's changes do not add up), so it cannot be combined with "
            f"others exactly. Put it into the model (diffpo export --to merged), and apply the other to that"
        )
    return layers


def _written(state: dict[str, Tensor], ranks: dict[str, int], shares: Sequence[Share], component: str) -> bytes:
    from safetensors.torch import save

    rank = max(ranks.values())
    settings: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": sorted(ranks)}
    if other := {layer: own for layer, own in ranks.items() if own != rank}:
        settings |= {"rank_pattern": other, "alpha_pattern": other}
    abouts = [read_lora(lora_file(share.lora))[1] for share in shares]
    about = next(({"base": each["base"]} for each in abouts if "base" in each), {})
    header = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({f"{component}.{k}": v for k, v in settings.items()}, sort_keys=True),
        HEADER: json.dumps(about, sort_keys=True),
    }
    return sorted_header(save({name: value.contiguous() for name, value in state.items()}, header))
